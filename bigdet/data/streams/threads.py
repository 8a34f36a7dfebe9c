"""Loader threads: read groups ahead in this process, in order.

Decoding, resizing and copying release Python's lock; the rest of a group, and a training loop that
launches kernels, share it. Nothing is copied from process to process, and nothing is forked.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic

import torch
from torch import Tensor

from bigdet.data.examples.collate import PackedGroup
from bigdet.data.format.manifest import ShardError
from bigdet.data.streams.reading import (
    PREFETCHED_GROUPS,
    STOP_SECONDS,
    TRIM_GROUPS,
    Key,
    Read,
    give_back_free_memory,
    read_group,
    stop_signals_held,
)

Result = PackedGroup | ShardError
_Jobs = queue.SimpleQueue[tuple[Key, Future[Result]] | None]  # None ends a thread


class Threads(Generic[Key]):
    """An iterator over the group of each key in order, or the ``ShardError`` of one.

    Another error is raised by ``next``, as it was in the thread.

    Args:
        make_read: makes the function that reads, in each thread its own.
        keys: may be endless.
        count: number of threads.
    """

    def __init__(self, make_read: Callable[[], Read[Key]], keys: Iterable[Key], count: int) -> None:
        self._keys = iter(keys)
        self._jobs: _Jobs[Key] = queue.SimpleQueue()
        self._results: deque[Future[Result]] = deque()
        self._lock = threading.Lock()  # of these three, since another thread may close
        ready = threading.Barrier(count + 1)
        self._threads = [
            # A daemon, because one that waits for a lost disk must not keep the run from ending.
            threading.Thread(target=_work, args=(make_read, self._jobs, ready), daemon=True)
            for _ in range(count)
        ]
        num_threads = torch.get_num_threads()
        try:
            with stop_signals_held():
                for thread in self._threads:
                    thread.start()
            ready.wait()
        except RuntimeError as error:
            ready.abort()
            self.close()
            raise ShardError(
                f"data.workers: {count} loader threads cannot be started ({error}). Lower it, or "
                "raise the limits of this process (`ulimit -u -v`) or of its container."
            ) from error
        finally:
            torch.set_num_threads(num_threads)  # of this thread and new ones, as before
        self._request(count * PREFETCHED_GROUPS)

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        try:
            future = self._results.popleft()
        except IndexError:
            raise StopIteration from None
        result = future.result()
        self._request(1)
        return result

    def _request(self, num_groups: int) -> None:
        with self._lock:
            for key in itertools.islice(self._keys, num_groups):
                future: Future[Result] = Future()
                self._results.append(future)
                self._jobs.put((key, future))

    def close(self) -> None:
        """End the threads when they have read the groups that they are at."""
        with self._lock:
            self._keys = iter(())
            for _ in self._threads:
                self._jobs.put(None)
        with contextlib.suppress(IndexError):  # when it is empty; ``next`` may take some as well
            while True:
                self._results.pop().cancel()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, deadline - time.monotonic()))


def _work(make_read: Callable[[], Read[Key]], jobs: _Jobs[Key], ready: threading.Barrier) -> None:
    """Read the groups that are asked for, until there is no job left."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # the first call in a thread fixes its number
    try:
        ready.wait()
    except threading.BrokenBarrierError:  # another thread cannot be started
        return
    read: Read[Key] | None = None
    num_read = 0
    while (job := jobs.get()) is not None:
        key, future = job
        if not future.set_running_or_notify_cancel():
            continue
        num_read += 1
        if num_read % TRIM_GROUPS == 0:
            give_back_free_memory()
        try:
            read = read or make_read()
            future.set_result(read_group(read, key, _memory))
        except BaseException as error:  # the reader of the future raises it
            future.set_exception(error)
        del job, future  # what has been taken is not kept


def _memory(num_bytes: int) -> Tensor:
    """Return memory, page-locked where there is CUDA."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
