"""Ranks: the process group and reductions; the number of this process is in ``host/ranks.py``.

Launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or variables of their own,
from which ``host/launchers.py`` derives these.
"""

from __future__ import annotations

import datetime
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigdet.host import errors, launchers, network
from bigdet.host.launchers import first_host as first_host
from bigdet.host.ranks import is_main as is_main
from bigdet.host.ranks import local_rank as local_rank
from bigdet.host.ranks import rank as rank
from bigdet.host.ranks import world_size as world_size

T = TypeVar("T")

JOIN_SECONDS = 300.0
"""How long the first ranks wait for the last one to start; BIGDET_JOIN_SECONDS changes it."""
MARGIN_SECONDS = 60.0
"""Collectives wait for so much longer than the watchdog, which writes where each rank is."""
WAIT_SECONDS = 1800.0
"""How long gloo waits at least, and NCCL where nothing else is said."""
NEVER_SECONDS = 365 * 86400.0
POLL_SECONDS = 0.05
_limits: dict[str, datetime.timedelta] = {}
REPORT_SECONDS = 5.0
"""How long a rank that prints no error waits for the rank that prints it."""
START_SECONDS = 20.0
"""The same before the ranks have connected, when they may be seconds apart on a busy machine."""


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def start(stall_seconds: float | None = None) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs.

    Without a launcher the group has one member and needs no port.

    Args:
        stall_seconds: how long a rank may wait for others, plus `MARGIN_SECONDS`; then NCCL ends
            the process, and gloo raises an error, but no sooner than after 30 minutes. Infinity:
            without end. None: 30 minutes. Variables that are set go before.
    """
    if dist.is_initialized():
        return
    launchers.adopt()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=WAIT_SECONDS)
    if stall_seconds is not None:
        seconds = min(stall_seconds + MARGIN_SECONDS, NEVER_SECONDS)
        timeout = _limits["cpu"] = datetime.timedelta(seconds=max(seconds, WAIT_SECONDS))
        if torch.cuda.is_available():
            _limits["cuda"] = datetime.timedelta(seconds=seconds)
            # What NCCL does then: end the process, also where its own watchdog is stuck.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
            heartbeat = str(math.ceil(seconds))
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", heartbeat)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _make_group(backend, timeout=timeout)  # torchrun's agents have met already
    else:
        _meet_and_make_group(backend, timeout)
    limit_waiting()


def limit_waiting() -> None:
    """Apply the limit that `start` was given to all groups so far; engines make their own."""
    for group in dist.distributed_c10d._world.pg_map:
        for device in {kind.type for kind in group._device_types} & _limits.keys():
            backend: Any = group._get_backend(torch.device(device))
            # The second is that of torch 2.15's new NCCL backend, which lacks the first.
            set_limit = getattr(backend, "_set_default_timeout", None) or backend.set_timeout
            set_limit(_limits[device])


def _meet_and_make_group(backend: str, timeout: datetime.timedelta) -> None:
    """Join the process group of launchers that only set variables, or be alone."""
    alone = "MASTER_ADDR" not in os.environ
    if alone and world_size() != 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size()}, but MASTER_ADDR is not set. Start all ranks with "
            f"deepspeed, torchrun or srun, or unset WORLD_SIZE and RANK to train with one process. "
            f"Under mpirun, pass it on: -x MASTER_ADDR=HOST, with the host of rank 0."
        )
    store = dist.HashStore() if alone else _meet()  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    _make_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)


def _make_group(backend: str, **arguments: Any) -> None:
    """Make the process group; raise ``ValueError`` where this host's network prevents it."""
    try:
        dist.init_process_group(backend, **arguments)
    except RuntimeError as error:
        raise ValueError(network.explain_start(error)) from error


def _number(name: str, default: str) -> float:
    """Return an environment variable as a number; raise ``ValueError`` if it is not one."""
    text = os.environ.get(name, default)
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"{name}: found {text}, expected a number. Correct or unset it."
        ) from error


def _meet() -> Any:
    """Wait until every rank has connected, and return the store, which rank 0 hosts.

    Raises:
        ValueError: this rank cannot reach rank 0, or cannot be reached as rank 0.
        SharedError: on every rank, when some did not connect.
    """
    seconds = _number("BIGDET_JOIN_SECONDS", str(JOIN_SECONDS))
    address, port = os.environ["MASTER_ADDR"], int(_number("MASTER_PORT", "not set"))
    # Rank 0 gives up first: it knows which ranks are missing.
    timeout = datetime.timedelta(seconds=seconds if is_main() else seconds + 10)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world_size(), is_main(), timeout, wait_for_workers=False
        )
    except dist.DistError as error:
        problem = str(error).splitlines()[0].rstrip(".")
        if is_main():
            raise ValueError(network.explain_address(error, address, port)) from error
        if unresolved := network.resolve_problem(address):
            raise ValueError(unresolved) from error
        raise ValueError(
            f"rank {rank()} on {socket.gethostname()} did not reach rank 0 at {address}:{port} "
            f"within {timeout.seconds} s: {problem}. Check that this host can reach that one, and "
            f"that python starts there."
        ) from error
    try:
        store.set(f"host/{rank()}", socket.gethostname())
        if is_main():
            problem = _wait_for_all(store, seconds)
            store.set("problem", problem)
        problem = store.get("problem").decode()
    except dist.DistError as error:
        raise SharedError(f"rank 0 at {address}:{port} is gone: {error}") from error
    if problem:
        time.sleep(is_main())  # else the others would lose the store before they have read it
        raise SharedError(problem)
    return store


def _wait_for_all(store: Any, seconds: float) -> str:
    """Wait until every rank has written its host into the store (rank 0).

    Returns:
        A message that names the missing ranks; empty when all have connected.
    """
    deadline = time.monotonic() + seconds
    missing = list(range(world_size()))
    while missing := [number for number in missing if not store.check([f"host/{number}"])]:
        if time.monotonic() > deadline:
            came = sorted(set(range(world_size())) - set(missing))
            names = sorted({store.get(f"host/{number}").decode() for number in came})
            return (
                f"only {len(came)} of {world_size()} ranks connected within {seconds:g} s, from "
                f"{', '.join(names)}; missing: {', '.join(map(str, missing[:16]))}. A host of the "
                f"hostfile cannot be reached, python does not start there, or it cannot reach "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}. See what the launcher "
                f"reports above, and try `ssh HOST true`. BIGDET_JOIN_SECONDS sets the time limit."
            )
        time.sleep(POLL_SECONDS)
    return ""


def lost_peer(error: BaseException) -> str:
    """Explain an error of a collective, usually that another rank is gone; "" for other errors."""
    if not network.is_lost_peer(error):
        return network.explain_nccl(error)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"lost the connection to another rank ({text}). The rank that ended first says why, above "
        f"or in its own log (OUTPUT/logs/rank-N.log); if it was killed, its host says why (out of "
        f"memory?). The same command continues from the newest checkpoint."
    )


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor of equal shape over all ranks; every rank gets the result."""
    total = tensor.clone()
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor of equal shape over all ranks; every rank gets the result."""
    return sum_over_ranks(tensor) / world_size()


class _SumWithGradient(torch.autograd.Function):
    """A sum over ranks whose gradient is that of the losses of all ranks together."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Add up a tensor of equal shape over all ranks, in the forward and in the backward pass.

    Every rank has to run both, and in the same order. (torch's own, ``torch.distributed.nn``, is
    deprecated.)
    """
    total: Tensor = _SumWithGradient.apply(tensor)
    return total


def stack_over_ranks(tensor: Tensor) -> Tensor:
    """Stack a tensor ``(N,)`` of all ranks, in their order, on every rank: ``(ranks, N)``."""
    if not dist.is_initialized() or world_size() == 1:
        return tensor[None]
    parts = tensor.new_empty(world_size(), len(tensor))
    dist.all_gather(list(parts.unbind()), tensor)
    return parts


def begin_gather(share: Tensor) -> tuple[Tensor, Callable[[], Any]]:
    """Begin to put the shares of all ranks, all of one length, behind each other on every rank.

    Returns:
        ``(ranks x N,)``, and what waits until it is there (on a GPU, only lets its stream wait).
    """
    whole = share.new_empty(world_size() * len(share))
    parts = whole.view(torch.uint8), share.view(torch.uint8)  # gloo does not know all types
    work = dist.all_gather_into_tensor(*parts, async_op=True)
    assert work is not None
    return whole, work.wait


def any_rank(flag: bool) -> bool:
    """Return on every rank whether the flag is set on at least one."""
    return bool(sum_over_ranks(torch.tensor(int(flag))).item() > 0)


def broadcast_object(value: T) -> T:
    """Give every rank the value of rank 0 (small: it is pickled between our own processes)."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Collect the values of all ranks, in order of rank, on rank 0; others get an empty list."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values: list[T] | None = [value] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values or []


def barrier() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized() and world_size() > 1:
        sum_over_ranks(torch.zeros(()))


def all_gather_objects(value: T) -> list[T]:
    """Collect the values of all ranks, in order of rank, on every rank (small values)."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


class SharedError(ValueError):
    """An error that every rank raises at the same point, so that it is reported once."""


def must_report(error: BaseException) -> bool:
    """Return whether this rank is the one that prints an error, so that each is printed once.

    Before the ranks have connected, those of one host are assumed to see the same files.
    """
    if isinstance(error, SharedError):
        return is_main()
    return reports_first() if dist.is_initialized() else local_rank() == 0


def reports_first() -> bool:
    """Return whether no other rank has called this before; not a collective.

    Ranks that lose their connection to a failed rank call this after it.
    """
    if not dist.is_initialized() or world_size() == 1:
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("reported", 1) == 1)
    except RuntimeError:
        return True  # rank 0 is gone, and the store with it


@dataclass
class Wish:
    """What any rank may ask all of them for, in the message of ``together``.

    Attributes:
        is_asked: in the block, whether this rank asks; after it, whether any rank did.
    """

    is_asked: bool = False


def wait_for_report() -> None:
    """Wait until another rank has printed an error; launchers end all ranks as soon as one ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, once that rank has ended
    time.sleep(REPORT_SECONDS if dist.is_initialized() else START_SECONDS)


@contextmanager
def together() -> Iterator[Wish]:
    """Run a block without collectives in it; an error on one rank is raised on all.

    While nothing fails, this costs one reduction of two numbers.

    Raises:
        SharedError: on every rank, with the message of the lowest rank that failed.
    """
    problem: Exception | None = None
    wish = Wish()
    try:
        yield wish
    except (ValueError, OSError) as error:
        problem = error
    own = torch.tensor([problem is not None, wish.is_asked], dtype=torch.int32)
    num_failed, num_asking = sum_over_ranks(own).tolist()
    wish.is_asked = num_asking > 0
    if not num_failed:
        return
    messages = all_gather_objects(None if problem is None else errors.explain(problem))
    failed = [(number, text) for number, text in enumerate(messages) if text is not None]
    number, text = failed[0]
    where = "" if len(failed) == len(messages) else f"rank {number}: "
    raise SharedError(f"{where}{text}") from problem


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """Give every rank the values of rank 0; the shape and type are the same on all ranks."""
    sent = tensor.detach().clone(memory_format=torch.contiguous_format)
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast(sent, src=0)
    return sent
