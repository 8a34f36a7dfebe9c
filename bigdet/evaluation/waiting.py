"""Long work on rank 0 while the other ranks wait, without a collective that times out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from bigdet import distributed

POLL_SECONDS = 0.5

T = TypeVar("T")


def work_on_main(work: Callable[[], T], must_stop: Callable[[], bool]) -> T | None:
    """Run a function in a thread of rank 0 (a collective).

    Meanwhile the ranks run a collective twice a second, so the work may take any time, and requests
    to stop are noticed.

    Args:
        work: called on rank 0 only; without collectives.
        must_stop: called repeatedly on all ranks (a collective); must return the same on all.

    Returns:
        On every rank the result of rank 0; None when asked to stop, while the work still runs.

    Raises:
        SharedError: on every rank, for an error of the work that a user can cause.
    """
    future: Future[T] | None = None
    if distributed.is_main():
        pool = ThreadPoolExecutor(max_workers=1)
        future = pool.submit(work)
        pool.shutdown(wait=False)
    while not distributed.broadcast_object(_is_done(future)):
        if must_stop():
            return None
    result: T | None = None
    with distributed.together():
        if future is not None:
            result = future.result()
    return distributed.broadcast_object(result)


def _is_done(future: Future[T] | None) -> bool:
    """Wait a little, then return whether the work is done; False on ranks without work."""
    return future is not None and bool(wait([future], timeout=POLL_SECONDS).done)
