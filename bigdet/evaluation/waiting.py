"""Rank 0 works on something long while the others wait, and no collective can time out."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from bigdet import distributed

POLL_SECONDS = 0.5

T = TypeVar("T")


def work_on_main(work: Callable[[], T], must_stop: Callable[[], bool]) -> T | None:
    """Run a function on rank 0, beside its main thread; every rank must call it.

    Meanwhile the ranks meet twice a second, so the work may take as long as it likes, and a request
    to stop is heard.

    Args:
        work: what rank 0 does, without collectives.
        must_stop: asked on all ranks again and again (a collective); the same answer on all.

    Returns:
        On every rank what rank 0 got; None when they had to stop. The work is then left alone.

    Raises:
        SharedError: on every rank, when a user's mistake came out in the work.
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
    """Tell whether the work is done, after waiting a little; False on ranks that do none."""
    return future is not None and bool(wait([future], timeout=POLL_SECONDS).done)
