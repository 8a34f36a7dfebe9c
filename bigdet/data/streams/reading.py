"""What loader processes and loader threads have in common."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

from bigdet.data.examples.collate import Allocate, PackedGroup
from bigdet.data.format.manifest import ShardError
from bigdet.host.reading import why_unread

Key = TypeVar("Key")
Read = Callable[[Key, Allocate], PackedGroup]

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
"""Signals that ask a run to stop; launchers send them to loader processes too, to no effect."""

PREFETCHED_GROUPS = 2  # per process or thread: being read or ready
TRIM_GROUPS = 200  # after so many, a process or thread returns unused memory to the system
STOP_SECONDS = 10  # for a process, or all threads, to finish what they read


def read_group(read: Read[Key], key: Key, allocate: Allocate) -> PackedGroup | ShardError:
    """Return the group of a key, or the error of data or memory that its reader is to raise."""
    try:
        return read(key, allocate)
    except ShardError as error:
        return error
    except MemoryError as error:
        return ShardError(f"a group of images {why_unread(error)}")


def give_back_free_memory() -> None:
    """Return freed arrays to the system: before reading begins, and now and then during it.

    The C library keeps up to twice the largest array ever freed: the order of 1.75 million samples
    leaves 30 MB. And images of many sizes leave gaps: up to 170 MB after some thousand of 800x1333.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has and needs it
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Block stop signals; processes and threads that start meanwhile begin with them blocked."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
