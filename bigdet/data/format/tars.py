"""The tars of a shard set as bytes: of a local folder, or from an address through the cache."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bigdet.config.data import CacheConfig
from bigdet.config.rules import ConfigError
from bigdet.data.format.cache import Cache, locked, name_of, write_whole
from bigdet.data.format.manifest import Shard
from bigdet.data.format.remote import (
    RemoteFile,
    UnreachableError,
    fetch,
    file_address,
    is_remote,
    shown,
)
from bigdet.host.files import file_sha256
from bigdet.host.reading import MAY_PASS, patiently

MAX_OPEN_FILES = 64  # per process; Objects365 has more tars than a process may have open files
RUN_BYTES = 8 << 20
"""What is fetched at a time if shards are not fetched whole: some 50 photographs."""

Span = tuple[int, int, int]
"""Number of a tar, its first byte, and the byte after the last."""


class _OpenFile:
    """A file descriptor that is closed when its last user drops it: threads may share it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            with contextlib.suppress(OSError):  # of a disk that is gone
                os.close(self.descriptor)


class LocalTars:
    """Reads the tars of a local folder, in any thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: dict[int, _OpenFile] = {}

    def for_thread(self) -> LocalTars:
        """Return these tars: all threads share the open files, and so their limit."""
        return self

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Return bytes of a tar, fewer where it ends; ``OSError`` if it cannot be read."""
        return patiently(lambda: self._read(shard, start, size), str(self._paths[shard]))

    def _read(self, shard: int, start: int, size: int) -> bytes:
        try:
            files = self._files  # another thread may change or replace it at any time
            file = files.get(shard)
            if file is None:
                file = files[shard] = _OpenFile(self._paths[shard])
                for old in list(files)[:-MAX_OPEN_FILES]:
                    files.pop(old, None)
            return os.pread(file.descriptor, size, start)
        except OSError:
            self.close()  # reopens a stale file, and frees some if too many are open
            raise

    def forget(self, shard: int, start: int, stop: int) -> bool:
        """Return False: there is no other copy of what is damaged here."""
        return False

    def expect(self, spans: Sequence[Span]) -> None:
        """Do nothing: all files are local."""

    def close(self) -> None:
        """Close what is open; it is opened again when needed."""
        self._files = {}


@dataclass(frozen=True)
class _Piece:
    """What is fetched at a time: bytes ``start`` to ``stop`` of a file; ``name`` in the cache."""

    name: str
    file: RemoteFile
    start: int
    stop: int


class CachedTars:
    """Reads the tars of a remote shard set through the cache.

    One file is open at a time, so that a process keeps only one from being deleted. Files that are
    expected count as just used, and are fetched ahead by a thread.

    Args:
        files: the tars, in order, with their sizes.
        cache: where they are kept.
        run_bytes: size of the pieces that are fetched; None for whole tars.
    """

    def __init__(self, files: Sequence[RemoteFile], cache: Cache, run_bytes: int | None) -> None:
        self._files = files
        self._cache = cache
        self._run_bytes = run_bytes
        self._open: tuple[str, int] | None = None  # name and file descriptor
        self._forgotten: set[str] = set()  # names
        self._ahead: list[_Piece] = []  # to be fetched ahead
        self._thread: threading.Thread | None = None
        self._is_fetching = False  # the thread will look at the list once more
        self._lock = threading.Lock()  # of the list and of this

    def for_thread(self) -> CachedTars:
        """Return the same tars with an open file and a fetching thread of their own."""
        return CachedTars(self._files, self._cache, self._run_bytes)

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Return bytes of a tar, fewer where it ends; ``UnreachableError`` if not fetched."""
        parts = []
        stop = min(start + size, self._size(shard))
        while start < stop:
            piece = self._piece(shard, start)
            count = min(stop, piece.stop) - start
            read = partial(self._read, piece, count, start - piece.start)
            parts.append(patiently(read, shown(self._files[shard].address)))
            start += count
        return b"".join(parts)  # of one part that part itself

    def _read(self, piece: _Piece, size: int, start: int) -> bytes:
        try:
            return os.pread(self._descriptor(piece), size, start)
        except OSError:
            self._close_file()  # the cache may be on a network folder, where one can become stale
            raise

    def forget(self, shard: int, start: int, stop: int) -> bool:
        """Delete what the cache has of a damaged part of a tar, but each piece only once.

        Returns whether reading it again may find something else.
        """
        may_differ = False
        while start < min(stop, self._size(shard)):
            piece = self._piece(shard, start)
            if piece.name not in self._forgotten:
                self._forgotten.add(piece.name)
                name, file = self._open or ("", None)
                with contextlib.suppress(OSError):  # what cannot be deleted is found again
                    self._cache.remove(piece.name, file if name == piece.name else None)
                may_differ = True
            start = piece.stop
        self._close_file()
        return may_differ

    def expect(self, spans: Sequence[Span]) -> None:
        """Keep what will be read soon, in this order, and fetch it ahead if it fits in twice."""
        pieces: dict[str, _Piece] = {}
        for shard, start, stop in spans:
            while start < min(stop, self._size(shard)):
                piece = self._piece(shard, start)
                pieces[piece.name] = piece
                start = piece.stop
        ahead = [p for p in pieces.values() if not self._cache.touch(p.name, p.stop - p.start)]
        # With less room, processes would remove each other's files.
        has_room = 2 * sum(p.stop - p.start for p in pieces.values()) <= self._cache.limit_bytes
        with self._lock:
            self._ahead = ahead if has_room else []
            if self._ahead and not self._is_fetching:
                self._is_fetching = True
                self._thread = threading.Thread(target=self._fetch_ahead, daemon=True)
                self._thread.start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._lock:
                ahead = self._ahead
                if not ahead:
                    self._is_fetching = False  # the thread still counts as alive for a moment
                    return
                piece = ahead.pop(0)
            try:
                os.close(self._fetched(piece))
            except OSError:  # its reader will report it; a newer list is still fetched
                ahead.clear()

    def close(self) -> None:
        """Close what is open, and fetch no more ahead; it is opened again when needed."""
        self._ahead = []
        self._close_file()

    def _close_file(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _size(self, shard: int) -> int:
        size = self._files[shard].bytes
        assert size is not None
        return size

    def _piece(self, shard: int, position: int) -> _Piece:
        """Return the piece of a tar that contains a byte."""
        file, start, stop = self._files[shard], 0, self._size(shard)
        if self._run_bytes is not None:
            start = position // self._run_bytes * self._run_bytes
            stop = min(start + self._run_bytes, stop)
        # The hash distinguishes a shard from an older one at the same address.
        return _Piece(name_of(file.address, file.sha256, start, stop), file, start, stop)

    def _descriptor(self, piece: _Piece) -> int:
        if self._open is None or self._open[0] != piece.name:
            self._close_file()
            try:
                self._open = (piece.name, self._fetched(piece))
            except UnreachableError:
                raise
            except OSError as error:  # not damage either
                if error.errno in MAY_PASS:
                    raise
                raise UnreachableError(f"the cache cannot be written: {error}") from error
        return self._open[1]

    def _fetched(self, piece: _Piece) -> int:
        """Return a file descriptor of a piece, fetched if it is not in the cache."""
        size = piece.stop - piece.start
        part = (0, None) if size == piece.file.bytes else (piece.start, piece.stop)
        return self._cache.open(piece.name, size, lambda to: fetch(piece.file, to, *part))


Tars: TypeAlias = LocalTars | CachedTars


def open_tars(path: str, shards: Sequence[Shard], config: CacheConfig) -> Tars:
    """Return the reader of the tars of a set, which is in a folder or at an address."""
    if not is_remote(path):
        return LocalTars([Path(path) / shard.file for shard in shards])
    run_bytes = None if config.mode == "shards" else RUN_BYTES
    largest = run_bytes or max(shard.bytes for shard in shards)
    if _limit_bytes(config) < 2 * largest:
        raise ConfigError(
            f"data.cache.gib: found {config.gib}, but {shown(path)} is read in pieces of "
            f"{largest / 2**30:.3f} GiB, of which two must fit. Raise it, or set "
            f"data.cache.mode: ranges (pieces of {RUN_BYTES / 2**30:.3f} GiB)."
        )
    files = [
        RemoteFile(file_address(path, shard.file), shard.bytes, shard.sha256) for shard in shards
    ]
    cache = Cache(_folder(config) / "shards", _limit_bytes(config))
    return CachedTars(files, cache, run_bytes)


def check_random_reads(bytes_at: Mapping[str, int], config: CacheConfig) -> None:
    """Raise ``ConfigError`` if reading in any order would fetch shards over and over.

    ``bytes_at`` are those of sets that are read in turns, by path or address.
    """
    fetched = {shown(path): count for path, count in bytes_at.items() if is_remote(path)}
    num_bytes = sum(fetched.values())
    if num_bytes > _limit_bytes(config):
        raise ConfigError(
            f"data.cache.gib: found {config.gib}, but {' and '.join(fetched)} "
            f"{'are' if len(fetched) > 1 else 'is'} read in random order, so that "
            f"{num_bytes / 2**30:.3f} GiB would be fetched over and over. Raise it so that they "
            "fit."
        )


def local_copy(path: str, config: CacheConfig) -> Path:
    """Return the folder that holds manifest and index: the set's own, or that of the copies.

    The manifest is fetched whenever a set is opened, so that a set made again at the same
    address is noticed. The index is fetched once per host, and again if the copy is damaged.
    """
    if not is_remote(path):
        return Path(path)
    content = io.BytesIO()
    fetch(RemoteFile(file_address(path, "manifest.json")), content)
    text = content.getvalue()
    folder = _folder(config) / "sets" / name_of(path.rstrip("/"), text)
    folder.mkdir(parents=True, exist_ok=True)
    index = RemoteFile(file_address(path, "index.npy"), sha256=_index_sha256(text))
    with locked(folder / "lock"):
        if not _is_whole(folder, text, index.sha256):
            write_whole(folder / "index.npy", lambda file: fetch(index, file))
            write_whole(folder / "manifest.json", lambda file: file.write(text))
    return folder


def _is_whole(folder: Path, manifest: bytes, index_sha256: str | None) -> bool:
    """Return whether a folder holds these copies, the index with this hash where it is known."""
    own, index = folder / "manifest.json", folder / "index.npy"
    if not own.is_file() or own.read_bytes() != manifest or not index.is_file():
        return False
    return index_sha256 is None or file_sha256(index) == index_sha256


def _index_sha256(manifest: bytes) -> str | None:
    """Return the hash of the index; None if the manifest is not valid, which is reported later."""
    try:
        values = json.loads(manifest)
    except ValueError:
        return None
    return values.get("index_sha256") if isinstance(values, dict) else None


def _folder(config: CacheConfig) -> Path:
    return Path(config.folder).expanduser()


def _limit_bytes(config: CacheConfig) -> int:
    return round(config.gib * 2**30)
