"""Runs jobs in several processes, counting the images that they have done.

Workers are spawned (not forked: the caller may have threads and much memory), end when the caller
ends, however it ends, and leave signals to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bigdet.data.format.manifest import ShardError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[], None]
"""A job calls it after every image."""

REPORT_SECONDS = 0.2
BYTES_PER_PROCESS = 50 * 10**6  # a second or two of work: as long as the start of a process

# In a worker: the images that all of them have done, and whether to stop.
_state: list[Any] = []


class StoppedError(RuntimeError):
    """The job was given up because another one failed."""


def run_jobs(
    work: Callable[[Job, Tick], Result],
    jobs: Iterable[Job],
    processes: int,
    progress: Callable[[int], None],
) -> Iterator[Result]:
    """Yield the results of jobs as they are done, in any order.

    Args:
        work: a function at the top level of a module.
        jobs: its arguments, taken when their turn comes, and pickled.
        processes: how many; with 1 or less, it runs in this one.
        progress: called now and then with the number of images done.
    """
    if processes <= 1:
        yield from _run_here(work, jobs, progress)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("Q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(done, stop))
    waiting: set[Future[Result]] = set()
    remaining = iter(jobs)
    try:
        with pool:
            try:
                while True:
                    for job in remaining:
                        with _without_interrupts():
                            waiting.add(pool.submit(work, job, _tick))
                        if len(waiting) >= 2 * processes:
                            break
                    if not waiting:
                        break
                    finished, waiting = wait(waiting, REPORT_SECONDS, FIRST_COMPLETED)
                    # Read without its lock, which a killed worker may hold.
                    progress(done.get_obj().value)
                    for future in finished:
                        yield future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise ShardError(
            "a process of the conversion was killed, maybe for lack of memory. Start it again, "
            "with fewer --processes if it happens again; finished shards stay."
        ) from None
    finally:
        # A traceback keeps these, and semaphores that are left at the end make Python warn.
        del pool, waiting, done, stop


def useful_processes(num_bytes: int) -> int:
    """Return how many processes are worth starting for images of so many bytes."""
    return 1 + num_bytes // BYTES_PER_PROCESS


def _run_here(
    work: Callable[[Job, Tick], Result], jobs: Iterable[Job], progress: Callable[[int], None]
) -> Iterator[Result]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done)

    for job in jobs:
        yield work(job, tick)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C; permanently in the processes that are started meanwhile.

    It reaches all processes of a terminal, and the caller handles it. It is blocked from the first
    moment: during its imports, a process would end with a traceback.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start_worker(done: Any, stop: Any) -> None:
    _state[:] = [done, stop]
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, where it is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


def _tick() -> None:
    done, stop = _state
    with done.get_lock():
        done.value += 1
    if stop.is_set():
        raise StoppedError("another job failed")
