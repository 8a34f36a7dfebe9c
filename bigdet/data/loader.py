"""Loader processes: read groups ahead of the training process, in order, and die with it.

What the processes read is the caller's function; this file knows of processes, signals and errors.
Start method is fork, by choice: a start takes milliseconds and the index stays shared, where spawn
and forkserver would import the whole command again in each process, seconds each. It is safe here,
as the children run one thread, never touch CUDA or the process group, and call nothing that a
thread of the parent may hold a lock of.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from bigdet.data.collate import PackedGroup
from bigdet.data.shards import ShardError

Key = TypeVar("Key")

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
"""What asks a run to stop; launchers send it to loader processes too, which must go on."""

PREFETCHED_GROUPS = 2  # per process, beside the one in work
STOP_SECONDS = 10  # what a process gets to finish its group before it is killed


class _Reads(Dataset[Any], Generic[Key]):
    """A function as torch's DataLoader wants it; a ``ShardError`` is handed over, not raised.

    Raised in a loader process it would come out wrapped in two tracebacks.
    """

    def __init__(self, read: Callable[[Key], PackedGroup]) -> None:
        self._read = read

    def __getitem__(self, key: Key) -> PackedGroup | ShardError:
        try:
            return self._read(key)
        except ShardError as error:
            return error


class Loader(Generic[Key]):
    """An iterator over ``read(key)`` for each key in order, read ahead by processes.

    Args:
        read: makes a group; a function of the key and of nothing that changes.
        keys: may be endless.
        workers: processes; 0 reads in this one, when asked.
    """

    def __init__(
        self, read: Callable[[Key], PackedGroup], keys: Iterable[Key], workers: int
    ) -> None:
        loader: DataLoader[Any] = DataLoader(
            _Reads(read),
            sampler=keys,
            batch_size=None,  # a key is a whole group
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCHED_GROUPS if workers else None,
            worker_init_fn=_begin_worker,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # it draws a seed, from the global generator by default
        )
        before = set(multiprocessing.active_children())
        self._items: list[Iterator[Any]] = [_start(loader)]
        processes = set(multiprocessing.active_children()) - before
        # Also at exit, before multiprocessing waits for children that do not heed its SIGTERM.
        self._finalizer = weakref.finalize(self, _stop, self._items, processes)

    def __iter__(self) -> Iterator[PackedGroup]:
        return self

    def __next__(self) -> PackedGroup:
        if not self._items:
            raise StopIteration
        item = next(self._items[0])
        if isinstance(item, ShardError):
            self.close()
            raise item
        assert isinstance(item, PackedGroup)
        return item

    def close(self) -> None:
        """End the processes; what they read ahead is lost."""
        self._finalizer()


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Fork the processes, with stop signals held back until each has said that it ignores them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any fork of a process with threads; see above.
            warnings.simplefilter("ignore", DeprecationWarning)
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _begin_worker(_: int) -> None:
    """Ignore what asks a run to stop; torch itself limits the process to one thread."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _stop(items: list[Iterator[Any]], processes: set[Any]) -> None:
    """End the processes: dropping torch's iterator asks them to, and what stays is killed."""
    items.clear()
    for process in processes:
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()


def _as_it_is(item: Any) -> Any:
    return item
