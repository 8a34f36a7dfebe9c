"""A folder of fetched files that all processes and runs of a host share, within a budget.

A process that needs an absent file takes the file's lock, so that it is fetched once and the others
wait. It is written as ``NAME.part`` and renamed when complete and checked: what a killed process
leaves is never used. To make room, the least recently used files are deleted, but none that a
process has open (it holds a shared lock on it).

    FOLDER/sets/HASH/            manifest.json and index.npy of a shard set; not part of the budget
    FOLDER/shards/HASH           a shard, or a run of bytes of one; HASH is of the full address
    FOLDER/shards/HASH.part      being fetched, of full size from the start, to reserve the space
    FOLDER/shards/HASH.lock      the holder of its lock fetches the file
    FOLDER/shards/lock           the holder of its lock makes room
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from bigdet.host.files import put_in_place

logger = logging.getLogger(__name__)

_PART, _LOCK = ".part", ".lock"
Fill = Callable[[IO[bytes]], object]


def name_of(*parts: object) -> str:
    """Return the name of a cached file from what identifies it: its address and so on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Cache:
    """The files, opened by name.

    Args:
        folder: created if absent.
        limit_bytes: of all files together. If open files need more, it is exceeded with a warning:
            processes do not wait for each other to close files.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._is_warned = False

    def open(self, name: str, size: int, fill: Fill) -> int:
        """Return a file descriptor for reading; the file is in use until it is closed.

        An absent file, of ``size`` bytes, is written by ``fill``.
        """
        path = self.folder / name
        while (file := _open_for_use(path, size)) is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(name + _LOCK)):
                if not _is_complete(path, size):
                    self._make_room(path, size)
                    write_whole(path, fill)
        return file

    def touch(self, name: str, size: int) -> bool:
        """Mark a file as just used; return whether it is there."""
        path = self.folder / name
        is_there = _is_complete(path, size)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return is_there

    def remove(self, name: str, file: int | None) -> None:
        """Delete a file whose content is damaged; it is fetched again when it is needed.

        ``file`` is a descriptor of what was read: one that was fetched since stays. None: any.
        """
        path = self.folder / name
        with locked(path.with_name(name + _LOCK)):
            found = _stat(path)
            if found is not None and (file is None or os.path.samestat(found, os.fstat(file))):
                path.unlink()

    def _make_room(self, path: Path, size: int) -> None:
        """Delete the least recently used files until a new one fits, and reserve its space."""
        with locked(self.folder / "lock"):
            for leftover in (path, path.with_name(path.name + _PART)):
                leftover.unlink(missing_ok=True)
            used, old = 0, []
            for other in self.folder.iterdir():
                if other.suffix == _PART and _remove_unless_locked(other, other.with_suffix(_LOCK)):
                    continue  # its writer was killed
                found = _stat(other) or _stat(other.with_suffix(""))  # a .part may be done by now
                if found is None:
                    continue
                used += found.st_size
                if not other.suffix and other.name != "lock":
                    old.append((found.st_mtime_ns, other, found.st_size))
            for _, other, other_size in sorted(old):
                if used + size <= self.limit_bytes:
                    break
                if _remove_unless_locked(other, other):
                    used -= other_size
            if used + size > self.limit_bytes and not self._is_warned:
                self._is_warned = True
                logger.warning(
                    f"{self.folder}: {(used + size) / 2**30:.2f} GiB are in use at once, "
                    f"data.cache.gib allows {self.limit_bytes / 2**30:.2f}; raise it"
                )
            with open(path.with_name(path.name + _PART), "wb") as part:
                part.truncate(size)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, created if absent; other processes and threads wait.

    A process that was forked meanwhile has the file open too, so closing it would not unlock it.
    """
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def write_whole(path: Path, fill: Fill) -> None:
    """Write a file under the name ``.part`` and rename it when it is complete and on the disk."""
    part = path.with_name(path.name + _PART)
    try:
        with open(part, "r+b" if part.exists() else "wb") as file:
            fill(file)
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def _open_for_use(path: Path, size: int) -> int | None:
    """Return the file descriptor of a complete file and mark it as used; None if it is absent."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    found = os.fstat(file)
    if not found.st_nlink or found.st_size != size:  # deleted meanwhile, or truncated
        os.close(file)
        return None
    os.utime(file)
    return file


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


def _is_complete(path: Path, size: int) -> bool:
    found = _stat(path)
    return found is not None and found.st_size == size


def _remove_unless_locked(path: Path, lock: Path) -> bool:
    """Delete a file unless a process holds the lock of another; return whether it is gone."""
    with os.fdopen(os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # see ``locked``
        return True
