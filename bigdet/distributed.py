"""Ranks: who this process is, the process group, reductions. Nobody else reads RANK."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 when started without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the rank that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def start() -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs; one process makes a group of its own.

    Without a launcher the group has one member and needs no port.
    """
    if dist.is_initialized():
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"Slurm started {os.environ['SLURM_NTASKS']} tasks, but RANK is not set, so each would "
            f"train alone. Start one task per node that runs torchrun, or set RANK, WORLD_SIZE, "
            f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Slurm's variables."
        )
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(minutes=30)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


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


def group() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    world = dist.group.WORLD
    assert world is not None, "start() comes first"
    return world


def max_over_ranks(value: float) -> float:
    """Return the highest of the ranks' numbers, on every rank."""
    highest = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.item()


def any_rank(flag: bool) -> bool:
    """Tell on every rank whether the flag is set on at least one."""
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
    values: list[T | None] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return [] if values is None else [item for item in values if item is not None]


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized() and world_size() > 1:
        sum_over_ranks(torch.zeros(()))


def all_gather_objects(value: T) -> list[T]:
    """Collect the values of all ranks, in order of rank, on every rank (small values)."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


class SharedError(ValueError):
    """An error that every rank raises at the same point, so that it is told once."""


def is_on_all_ranks(error: BaseException) -> bool:
    """Tell whether every rank raises this error: then rank 0 alone needs to print it.

    Before the ranks have met, those of one host are taken to see the same files.
    """
    if not dist.is_initialized():
        return local_rank() > 0
    return isinstance(error, SharedError)


@contextmanager
def together() -> Iterator[None]:
    """Run a block without collectives in it; what fails on one rank is raised on all.

    While nothing fails, that is one reduction of one number.

    Raises:
        SharedError: on every rank, with the message of the lowest rank that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    if not any_rank(problem is not None):
        return
    messages = all_gather_objects(None if problem is None else str(problem))
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


CHUNK_BYTES = 16 << 20


def send_bytes(file: IO[bytes], num_bytes: int) -> None:
    """Send what comes next in a file to rank 0, which calls ``receive_bytes``."""
    while num_bytes:
        part = bytearray(file.read(min(num_bytes, CHUNK_BYTES)))
        dist.send(torch.frombuffer(part, dtype=torch.uint8), dst=0)
        num_bytes -= len(part)


def receive_bytes(sender: int, num_bytes: int) -> Iterator[bytes]:
    """Yield what another rank sends to rank 0, in parts."""
    while num_bytes:
        part = torch.empty(min(num_bytes, CHUNK_BYTES), dtype=torch.uint8)
        dist.recv(part, src=sender)
        yield part.numpy().tobytes()
        num_bytes -= len(part)
