"""Run a test function in several real processes that talk over gloo.

``results = run_ranks(function, world_size, tmp_path, *args)`` calls ``function(*args)`` on every
rank with the process group started, and returns what the ranks returned, in order. The function is
found again by its module and name, so it must stand at the top level of a test file; arguments and
results are pickled between our own processes.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 5.0  # for the other ranks to end by themselves once one has failed
POLL_SECONDS = 0.02


class RankError(RuntimeError):
    """What went wrong first on any rank, with its traceback and the end of its output."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout_seconds: float = 240.0,
    gpus: str = "",
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks and return their results in rank order.

    ``gpus`` are the numbers of those that the ranks see, such as ``0,1``; none by default.

    Raises:
        RankError: a rank failed, died or did not end in time. The message is that of the rank
            that failed first, by time stamp: its peers only lose their connection to it.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    name = (function.__module__, function.__qualname__)
    (folder / "call.pickle").write_bytes(pickle.dumps((name, args, timeout_seconds)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_start(folder, rank, world_size, port, gpus) for rank in range(world_size)]
    try:
        failures = _wait(folder, processes, time.time() + timeout_seconds)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failures:
        _, rank, message = min(failures)
        output = (folder / f"rank-{rank}.out").read_text(errors="replace")[-3000:]
        raise RankError(f"rank {rank} of {world_size} failed first:\n{message}\n{output}")
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _start(
    folder: Path, rank: int, world_size: int, port: int, gpus: str
) -> subprocess.Popen[bytes]:
    """Start one rank; its output goes to a file."""
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": gpus,
        # The test modules must be found under the names they have in this process.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    with (folder / f"rank-{rank}.out").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.spawn", str(folder)],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(
    folder: Path, processes: list[subprocess.Popen[bytes]], deadline: float
) -> list[tuple[float, int, str]]:
    """Wait for all ranks; return (time, rank, message) of each that failed by itself."""
    failures: dict[int, tuple[float, int, str]] = {}
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if rank not in failures and process.poll() not in (None, 0):
                failures[rank] = _failure(folder, rank, process.returncode)
                deadline = min(deadline, time.time() + GRACE_SECONDS)
        if time.time() > deadline:
            if not failures:
                late = [rank for rank, p in enumerate(processes) if p.poll() is None]
                failures[late[0]] = (deadline, late[0], f"no end in time on ranks {late}")
            return list(failures.values())
        time.sleep(POLL_SECONDS)
    for rank, process in enumerate(processes):
        is_failed = process.returncode != 0 or not (folder / f"{rank}.result").exists()
        if rank not in failures and is_failed:
            failures[rank] = _failure(folder, rank, process.returncode)
    return list(failures.values())


def _failure(folder: Path, rank: int, exit_code: int) -> tuple[float, int, str]:
    """What a rank wrote about its end, or, for one that was killed, when that was noticed."""
    record = folder / f"{rank}.error"
    if record.exists():
        when, message = pickle.loads(record.read_bytes())
        return when, rank, message
    # A killed rank leaves no time stamp, and its peers notice at once, within one poll.
    return time.time() - 5 * POLL_SECONDS, rank, f"ended with exit code {exit_code}, no exception"


def _run_rank(folder: Path) -> int:
    """The process of one rank: call the function, leave its result or its exception."""
    rank = os.environ["RANK"]
    (module, qualname), args, timeout_seconds = pickle.loads((folder / "call.pickle").read_bytes())
    faulthandler.dump_traceback_later(max(1.0, timeout_seconds - 3.0))  # shows where it hangs
    try:
        from bigdet import distributed

        distributed.start()
        function: Any = __import__(module, fromlist=["_"])
        for part in qualname.split("."):
            function = getattr(function, part)
        result = pickle.dumps(function(*args))
        distributed.barrier()  # rank 0 holds the store: it must not leave before the others
    except BaseException:
        record = pickle.dumps((time.time(), traceback.format_exc()))
        (folder / f"{rank}.error.part").write_bytes(record)
        (folder / f"{rank}.error.part").rename(folder / f"{rank}.error")
        return 1
    (folder / f"{rank}.result").write_bytes(result)
    return 0


if __name__ == "__main__":
    code = _run_rank(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # As the commands end: on the way out, gloo's threads can abort a process that is done.
    os._exit(code)
