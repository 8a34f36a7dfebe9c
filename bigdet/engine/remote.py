"""Copies of checkpoints elsewhere, such as s3://bucket/run, for machines that lose their disks.

An address has what the folder of checkpoints has: ``PHASE-STEP`` with the pieces, the index and,
last, ``state.json``; and ``latest``. Other files of the run folder that a checkpoint relies on are
there by their path in the run folder. Ranks copy what they have written, all at the same time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from bigdet import distributed, messages
from bigdet.engine import keeping
from bigdet.engine.writing import Disks, Save
from bigdet.host.files import put_in_place, write_text
from bigdet.host.reading import RETRY_SECONDS
from bigdet.pieces.index import STATE_FILE, index_file, is_pieces, number_in, pieces_file

logger = logging.getLogger(__name__)
T = TypeVar("T")
FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError)
"""Errors that another attempt does not change."""


class Remote:
    """The checkpoints of a run at an address that fsspec knows."""

    def __init__(self, address: str) -> None:
        """Take the address.

        Raises:
            ValueError: nothing is known of its kind.
        """
        self.address = address.rstrip("/")
        try:
            fsspec.core.url_to_fs(self.address)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"checkpoint.remote: {address}: cannot be written to ({error}). Give an address of "
                f"a kind that fsspec has installed, such as s3://bucket/run with s3fs."
            ) from error

    def copy(
        self,
        save: Save,
        is_kept: Callable[[str], bool],
        must_end: Callable[[], bool] = lambda: False,
        needed: Mapping[str, Path] | None = None,
    ) -> None:
        """Copy this rank's pieces of a complete checkpoint; on rank 0 also the rest, at the end.

        Called on all ranks, by threads or not; no collective.

        Args:
            save: that is written.
            is_kept: tells of the name of a checkpoint whether it stays at the address (rank 0).
            must_end: tells when to wait for the other ranks no longer.
            needed: files that the checkpoint relies on, such as a frozen backbone, by their names
                below the address; copied first, unless they are there.

        Raises:
            OSError: it cannot be copied.
        """
        rank, others = distributed.rank(), range(1, distributed.world_size())
        notes = messages.Notes() if others else None
        state = "" if rank else (save.folder / STATE_FILE).read_text(encoding="utf-8")
        answer = self._copy_pieces(save)
        if notes is not None and rank:
            notes.leave(f"{save.notes}/copied by {rank}", json.dumps(answer))
        answers = [answer]
        if notes is not None and not rank:
            names = [f"{save.notes}/copied by {other}" for other in others]
            answers += [json.loads(notes.take(name, must_end)) for name in names]
        if problem := next(filter(None, (problem for _, problem in answers)), ""):
            raise OSError(problem)
        if rank == 0:
            named = json.loads(state)["files"].keys()
            if gone := set(filter(is_pieces, named)) - {name for name, _ in answers}:
                raise OSError(f"{save.folder / min(gone)}: deleted before it was copied")
            for name, source in (needed or {}).items():
                self._put_once(source, name)
            index = index_file(save.number)
            self._put(save.folder / index, f"{save.folder.name}/{index}")
            # As they were at the start: the next save may have begun.
            self._put_text(state, f"{save.folder.name}/{STATE_FILE}")
            self._put_text(f"{save.folder.name}\n", "latest")
            self._clean(save, named, is_kept)

    def _copy_pieces(self, save: Save) -> tuple[str, str]:
        """Copy what this rank wrote; return the name of the file, if any, and the problem."""
        file = pieces_file(save.number, distributed.rank())
        try:
            if not (save.folder / file).is_file():
                return "", ""
            self._put(save.folder / file, f"{save.folder.name}/{file}")
        except (OSError, ValueError, ImportError) as error:
            return "", f"{self.address}: {error!r}"
        return file, ""

    def newest(self) -> tuple[str, Mapping[str, Any]] | None:
        """Return the name and ``state.json`` of the newest complete checkpoint, None if none is."""
        try:
            name = self._read("latest").strip()
            state: dict[str, Any] = json.loads(self._read(f"{name}/{STATE_FILE}"))
        except FileNotFoundError:
            return None
        return name, state

    def fetch(self, checkpoints: Path, disks: Disks) -> bool:
        """Copy the newest checkpoint to every disk that lacks it, unless rank 0 has a newer one.

        Where it is copied, it becomes the latest. Collective.

        Returns:
            Whether it was copied to the disk of this rank.

        Raises:
            SharedError: it cannot be copied.
        """
        name = None
        with distributed.together():
            if distributed.is_main() and (found := self.newest()) is not None:
                numbers, number = keeping.numbers(checkpoints), found[1]["number"]
                own = max(numbers.values(), default=0)
                if own < number or own == number == numbers.get(found[0]):
                    name = found[0]
        name = distributed.broadcast_object(name)
        if name is None:
            return False
        is_new = self.fetch_one(name, checkpoints, disks)
        with distributed.together():
            if is_new and disks.is_owner:
                keeping.mark_latest(checkpoints / name)
        return is_new

    def fetch_one(
        self, name: str, checkpoints: Path, disks: Disks, *, only_newer: bool = False
    ) -> bool:
        """Copy a checkpoint to every disk that lacks it, if it is at the address (collective).

        The ranks of a disk share the work. The files are checked when they are loaded.

        Args:
            name: of the checkpoint.
            checkpoints: the folder of checkpoints.
            disks: which ranks share it.
            only_newer: one of this name here stays if it was saved later than the one there.

        Returns:
            Whether it was copied to the disk of this rank.

        Raises:
            SharedError: it cannot be copied.
        """
        state: dict[str, Any] | None = None
        with distributed.together():
            if distributed.is_main():
                with contextlib.suppress(FileNotFoundError):
                    state = json.loads(self._read(f"{name}/{STATE_FILE}"))
        state = distributed.broadcast_object(state)
        if state is None:
            return False
        # A folder of this name and another number is of a save before the run went back.
        number, own = state["number"], keeping.numbers(checkpoints).get(name, -1)
        lacks = bool(own < number if only_newer else own != number)
        lacking = distributed.all_gather_objects(lacks)
        if any(lacking):
            hosts = {
                host for host, is_lacking in zip(disks.hosts, lacking, strict=True) if is_lacking
            }
            logger.info(
                f"{self.address}/{name} is copied to {checkpoints} of {', '.join(sorted(hosts))}"
            )
        folder, sharing = checkpoints / name, disks.sharing
        with distributed.together():
            for number, file in enumerate(state["files"] if lacks else ()):
                if sharing[number % len(sharing)] == distributed.rank():
                    self.get(f"{name}/{file}", folder / file)
        with distributed.together():
            if lacks and disks.is_owner:
                write_text(folder / STATE_FILE, self._read(f"{name}/{STATE_FILE}"))
                keeping.remove_unnamed(folder, state["files"])
        return lacks

    def _clean(self, save: Save, named: Collection[str], is_kept: Callable[[str], bool]) -> None:
        """Delete checkpoints that are not kept, and what earlier saves of this name have left.

        Args:
            save: that was copied; other ranks may be copying the next one of this name.
            named: files of its ``state.json``.
            is_kept: see `copy`.
        """
        for path, is_folder in self._entries(self._path("")):
            name = _last(path)
            if name == save.folder.name:
                for file, _ in self._entries(path):
                    last = _last(file)
                    is_old = keeping.is_of_a_save(last) and number_in(last) <= save.number
                    if is_old and last not in named:
                        self._files.rm(file)
            elif is_folder and not is_kept(name):
                self._delete(path, save.number)

    def _delete(self, path: str, number: int) -> None:
        """Delete a checkpoint, unless anything else is in its folder or it is a later one.

        Args:
            path: of its folder.
            number: of this run's newest checkpoint.
        """
        files, inside, state = self._files, self._entries(path), f"{path}/{STATE_FILE}"
        ours = [keeping.is_of_a_save(_last(file)) or file == state for file, _ in inside]
        if not all(ours) or any(is_folder for _, is_folder in inside):
            return
        if (state, False) in inside:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill
                if json.loads(files.cat_file(state))["number"] > number:
                    return
            files.rm(state)  # first, so that no half a checkpoint looks complete
        if files.exists(path):  # an object store has no empty folders
            files.rm(path, recursive=True)

    def _entries(self, path: str) -> list[tuple[str, bool]]:
        """List a folder: the path of each entry, and whether it is a folder."""
        found = self._files.ls(path, detail=True)
        return [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in found]

    def _put_once(self, source: Path, name: str) -> None:
        files, path = self._files, self._path(name)
        if not files.exists(path) or files.size(path) != source.stat().st_size:
            self._put(source, name)

    def _put(self, source: Path, name: str) -> None:
        def put() -> None:
            files, path = self._files, self._path(name)
            files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            files.put_file(str(source), path)

        self._patiently(put, name)

    def _put_text(self, text: str, name: str) -> None:
        self._patiently(lambda: self._files.pipe_file(self._path(name), text.encode()), name)

    def get(self, name: str, file: Path) -> None:
        """Copy a file from the address.

        Args:
            name: below the address.
            file: to be written.

        Raises:
            OSError: it is not there, or cannot be copied.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        self._patiently(lambda: self._files.get_file(self._path(name), str(temporary)), name)
        put_in_place(temporary, file)

    def _read(self, name: str) -> str:
        content: bytes = self._patiently(lambda: self._files.cat_file(self._path(name)), name)
        return content.decode()

    def _patiently(self, work: Callable[[], T], name: str) -> T:
        """Do something that may fail for a while, such as a copy over a network."""
        for pause in RETRY_SECONDS:
            try:
                return work()
            except FINAL:
                raise
            except Exception as error:  # each file system has errors of its own, of no common class
                logger.warning(f"{self.address}/{name}: {error!r}; again in {pause:.1f} s")
            time.sleep(pause)
        try:
            return work()
        except FINAL:
            raise
        except Exception as error:
            raise OSError(f"{self.address}/{name}: {error!r}") from error

    @property
    def _files(self) -> Any:
        files = fsspec.core.url_to_fs(self.address)[0]
        files.invalidate_cache()  # other machines write here too
        return files

    def _path(self, name: str) -> str:
        root: str = fsspec.core.url_to_fs(self.address)[1]
        return f"{root.rstrip('/')}/{name}".rstrip("/")


def _last(path: str) -> str:
    """Return the last part of a path at the address."""
    return path.rsplit("/", 1)[-1]
