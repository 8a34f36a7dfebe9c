"""Where shards are written to: a local folder, or any address that fsspec knows (s3://, gs://).

A file is complete or absent: locally it gets its name when it is complete, and object stores show
an upload when it has ended. What is not finished is in the folder ``.unfinished``.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import fsspec

from bigdet.data.format.manifest import MANIFEST_NAME, ShardError
from bigdet.data.format.shard_set import INDEX_NAME
from bigdet.host import locks
from bigdet.host.files import put_in_place

UNFINISHED = ".unfinished"
PLAN_NAME = f"{UNFINISHED}/plan.json"  # of a conversion, see ``conversion.py``
LOCK_NAME = "lock"  # in it: who makes the set


@dataclass
class LocalStorage:
    """A local folder; names of files may begin with ``.unfinished/``."""

    folder: Path

    def __post_init__(self) -> None:
        self._made: list[Path] = []

    @property
    def address(self) -> str:
        """Return the folder, for messages."""
        return str(self.folder)

    def names(self) -> list[str]:
        """Return the names of the files outside of ``.unfinished``."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ShardError(f"{self.folder}: not a folder. Give a folder for the shards.")
        if not self.folder.exists():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is not there."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.scratch() as scratch:
            (scratch / "file").write_bytes(data)
            self.take(scratch / "file", name)

    def take(self, path: Path, name: str) -> None:
        """Move a complete file from ``scratch`` to its place."""
        put_in_place(path, self.folder / name)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder for files under way, on the same disk, so that they are renamed."""
        with tempfile.TemporaryDirectory(dir=self.folder / UNFINISHED, prefix="writing-") as path:
            yield Path(path)

    def check_free(self) -> None:
        """Raise ``ShardError`` if another process writes the whole set."""
        with _as_shard_error():
            locks.refuse_held(self.folder, self.folder / UNFINISHED / LOCK_NAME)

    @contextlib.contextmanager
    def claim(self, part: str | None) -> Iterator[None]:
        """Keep other processes from writing the same, and remove what killed ones left half-done.

        Args:
            part: of the set, ``"2/3"``: other parts may be written at the same time; None for all.
        """
        unfinished = self.folder / UNFINISHED
        above = list(itertools.takewhile(lambda path: not path.exists(), unfinished.parents))
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(
                f"{self.folder}: cannot be written to: {error.strerror}. Give another folder."
            ) from error
        self._made = above  # innermost first
        own = LOCK_NAME if part is None else f"{LOCK_NAME}-{part.replace('/', '-of-')}"
        with contextlib.ExitStack() as at_end:
            at_end.callback(_remove_if_empty, unfinished)
            with _as_shard_error():
                self.check_free()
                at_end.enter_context(locks.held(self.folder, unfinished / own))
                # After its own lock is there: of two that begin at a time, one sees the other.
                pattern = f"{LOCK_NAME}-*" if part is None else LOCK_NAME
                for other in unfinished.glob(pattern):
                    locks.refuse_held(self.folder, other)
            if part is None:
                for path in unfinished.glob("writing-*"):
                    shutil.rmtree(path)
            yield

    def clear(self) -> None:
        """Remove ``.unfinished``, and the folder if ``claim`` created it and it is empty."""
        shutil.rmtree(self.folder / UNFINISHED)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True)
class RemoteStorage:
    """A folder of an object store. There are no locks: give each part to one process only."""

    address: str

    def names(self) -> list[str]:
        """Return the names of the files outside of ``.unfinished``."""
        try:
            found = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # errors of file systems have no common class
            raise ShardError(
                f"{self.address}: cannot be reached ({type(error).__name__}: {error}). Give an "
                "address that you may write to, with the credentials that its file system needs."
            ) from error
        return sorted(e["name"].rsplit("/", 1)[-1] for e in found if e["type"] == "file")

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is not there."""
        try:
            return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        data: bytes = self._files.cat_file(self._path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._files.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)
        self._files.pipe_file(self._path(name), data)

    def take(self, path: Path, name: str) -> None:
        """Upload a complete file from ``scratch``."""
        self._files.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)
        self._files.put_file(str(path), self._path(name))
        path.unlink()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder among the temporary files of this machine (TMPDIR)."""
        with tempfile.TemporaryDirectory(prefix="bigdet-shards-") as path:
            yield Path(path)

    def check_free(self) -> None:
        """Do nothing: object stores have no locks."""

    @contextlib.contextmanager
    def claim(self, part: str | None) -> Iterator[None]:
        """Do nothing: object stores have no locks."""
        yield

    def clear(self) -> None:
        """Remove ``.unfinished``."""
        if self._files.exists(self._path(UNFINISHED)):
            self._files.rm(self._path(UNFINISHED), recursive=True)

    @property
    def _files(self) -> Any:
        files = fsspec.core.url_to_fs(self.address)[0]
        files.invalidate_cache()  # other machines write here too
        return files

    @property
    def _root(self) -> str:
        root: str = fsspec.core.url_to_fs(self.address)[1]
        return root

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # there is something in it, or it is gone
        folder.rmdir()


@contextlib.contextmanager
def _as_shard_error() -> Iterator[None]:
    try:
        yield
    except locks.LockedError as error:
        raise ShardError(str(error)) from error


Storage: TypeAlias = LocalStorage | RemoteStorage


def open_storage(out: str | Path) -> Storage:
    """Return the storage of a path or address; ``ShardError`` if nothing is known of its kind."""
    protocol, separator, path = str(out).partition("://")
    if not separator:
        return LocalStorage(Path(out))
    if protocol in ("file", "local"):
        return LocalStorage(Path(path))
    try:
        fsspec.core.url_to_fs(str(out))
    except (ValueError, ImportError) as error:
        raise ShardError(
            f"{out}: cannot be written to ({error}). Give a folder, or an address of a kind that "
            "fsspec has installed."
        ) from error
    return RemoteStorage(str(out))


def open_unused(out: str | Path, *, resumes: bool = True) -> Storage:
    """Open a folder or address for a new shard set, or to resume a conversion.

    Raises:
        ShardError: another process writes there, or there are shards of something else.
    """
    storage = open_storage(out)
    storage.check_free()
    refuse_shards(storage, resumes)
    return storage


def refuse_shards(storage: Storage, resumes: bool = True) -> None:
    """Raise ``ShardError`` if there are shards, except those of a conversion to resume."""
    names = storage.names()
    found = [MANIFEST_NAME] if MANIFEST_NAME in names else []
    if not found and not (resumes and storage.size(PLAN_NAME) is not None):
        found = [name for name in names if name == INDEX_NAME or name.endswith(".tar")]
    if found:
        raise ShardError(
            f"{storage.address}: has shards already ({', '.join(found[:3])}). Give another folder, "
            "or delete this one first."
        )
