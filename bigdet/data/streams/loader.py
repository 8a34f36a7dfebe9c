"""Loader processes: read groups ahead of the training process, in order, and end with it.

The caller's function reads; this file is about processes, signals, errors and shared memory
(``threads.py`` has threads in their place). The start method is fork, by choice: a start takes
milliseconds and the index stays shared, while spawn and forkserver would import the whole command
again in each process, which takes seconds. It is safe here, because the children run one thread,
never use CUDA or the process group, and call nothing whose lock a thread of the parent may hold.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bigdet.data.examples.collate import PackedGroup, fresh_memory
from bigdet.data.format.manifest import ShardError
from bigdet.data.streams.reading import (
    PREFETCHED_GROUPS,
    STOP_SECONDS,
    STOP_SIGNALS,
    TRIM_GROUPS,
    Key,
    Read,
    give_back_free_memory,
    read_group,
    stop_signals_held,
)
from bigdet.data.streams.slots import Slots, Stored
from bigdet.data.streams.threads import Threads
from bigdet.host import errors


class _Reads(Dataset[Any], Generic[Key]):
    """A function as torch's DataLoader needs it, with results in shared memory.

    A ``ShardError`` is returned, not raised: from a loader process it would arrive wrapped in two
    tracebacks.
    """

    def __init__(self, read: Read[Key], slots: Slots | None) -> None:
        self._read = read
        self._slots = slots
        self._num_read = 0  # in this process

    def __getitem__(self, key: Key) -> PackedGroup | Stored | ShardError:
        worker = get_worker_info()
        self._num_read += 1
        if worker is not None and self._num_read % TRIM_GROUPS == 0:
            give_back_free_memory()
        if self._slots is None or worker is None:
            return read_group(self._read, key, fresh_memory)
        self._slots.begin(worker.id)
        group = read_group(self._read, key, self._slots.allocate)
        return self._slots.store(group) if isinstance(group, PackedGroup) else group


class Loader(Generic[Key]):
    """An iterator over ``read(key, ...)`` for each key in order, read ahead.

    Args:
        read: makes the group of a key, in memory from its second argument; depends on nothing that
            changes.
        keys: may be endless.
        workers: processes or threads; 0 reads in this process, when asked.
        group_bytes: estimate of the largest group; processes pass on a larger one more slowly.
        thread_read: called in each thread for its own ``read``, which shares no open file with
            those of others; None for processes.
    """

    def __init__(
        self,
        read: Read[Key],
        keys: Iterable[Key],
        *,
        workers: int,
        group_bytes: int,
        thread_read: Callable[[], Read[Key]] | None = None,
    ) -> None:
        give_back_free_memory()
        self._slots: Slots | None = None
        self._finalizer: weakref.finalize[..., Loader[Key]]
        if workers and thread_read is not None:
            threads = Threads(thread_read, keys, workers)
            self._items: list[Iterator[Any]] = [threads]
            self._finalizer = weakref.finalize(self, threads.close)
            return
        # One more than are read ahead: the one that is being copied out.
        per_worker = PREFETCHED_GROUPS + 1
        self._slots = Slots(workers, per_worker, group_bytes) if workers else None
        with _no_advice():
            loader: DataLoader[Any] = DataLoader(
                _Reads(read, self._slots),
                sampler=keys,
                batch_size=None,  # a key is a whole group
                num_workers=workers,
                collate_fn=lambda item: item,
                prefetch_factor=PREFETCHED_GROUPS if workers else None,
                worker_init_fn=_begin_worker,
                multiprocessing_context="fork" if workers else None,
                generator=torch.Generator(),  # for its seed, instead of the global one
            )
        before = set(multiprocessing.active_children())
        self._items = [_start(loader)]
        processes = set(multiprocessing.active_children()) - before
        # Also at exit, before multiprocessing waits for children, which ignore its SIGTERM.
        self._finalizer = weakref.finalize(self, _stop, self._items, processes)

    def __iter__(self) -> Iterator[PackedGroup]:
        return self

    def __next__(self) -> PackedGroup:
        if not self._items:
            raise StopIteration
        try:
            item = next(self._items[0])
        except RuntimeError as error:
            if killed := errors.explain_killed(error):
                self.close()
                raise ShardError(killed) from error
            raise
        if isinstance(item, ShardError):
            self.close()
            raise item
        if isinstance(item, Stored):
            assert self._slots is not None
            return self._slots.take(item)
        assert isinstance(item, PackedGroup)
        return item

    def close(self) -> None:
        """End the processes or threads; what they read ahead is lost."""
        self._finalizer()


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Silence warnings of Python and torch about what is intended.

    Python 3.12 and later warn of any fork of a process with threads; torch, at every start, of more
    processes than cores, which the stream logs in one line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Fork the processes, with stop signals blocked until each process ignores them."""
    with stop_signals_held(), _no_advice():
        return iter(loader)


def _begin_worker(_: int) -> None:
    """Ignore stop signals; torch itself limits the process to one thread."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()  # never scan what the parent left, hundreds of thousands of objects


def _stop(items: list[Iterator[Any]], processes: set[Any]) -> None:
    """End the processes: dropping torch's iterator asks them to, and those that stay are killed."""
    items.clear()
    for process in processes:
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
