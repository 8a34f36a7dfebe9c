"""Writes a shard set in one process, sample by sample; and index and manifest of any set.

``ShardWriter`` is for samples that are made one after the other; what is read from files is
converted in parallel by ``conversion.py``. All files are written in the folder ``.unfinished``
inside the target and move up when complete, the manifest last, so nothing unfinished ever looks
finished; after an error nothing is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from operator import add
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.manifest import (
    MANIFEST_NAME,
    VERSION,
    Category,
    Manifest,
    Shard,
    ShardError,
    manifest_sha256,
)
from bigdet.data.format.shard_set import INDEX_DTYPE, INDEX_NAME
from bigdet.data.making.shard_tar import FinishedShard, ShardTar, record_text, stored_bytes
from bigdet.host import locks
from bigdet.host.files import put_in_place
from bigdet.host.strict_json import to_json

UNFINISHED = ".unfinished"
LOCK_NAME = "lock"  # in it: who makes the set


@dataclass(frozen=True)
class SetInfo:
    """What a manifest says that does not depend on the samples, see ``manifest.Manifest``."""

    name: str
    source: str
    categories: list[Category]
    options: dict[str, Any]
    federated: bool = False


class ShardWriter:
    """A context manager that takes samples one by one; leaving it without error finishes the set.

    ``images`` may be read on the way, for a progress line, and ``manifest`` at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        source: str,
        categories: list[Category],
        options: dict[str, Any],
        shard_megabytes: int = 256,
    ) -> None:
        """Say what to write; the folder is touched on entering.

        Args:
            folder: target; must not hold a shard set yet.
            name: what people call the set.
            source: the kind of data it is made from.
            categories: in the order of the labels.
            options: what the set is made with, for the manifest.
            shard_megabytes: a tar is closed before it grows beyond this (10^6 bytes).
        """
        self.folder = folder
        self.images = 0
        self.manifest: Manifest | None = None
        self._info = SetInfo(name, source, categories, options)
        self._limit = shard_megabytes * 10**6
        self._finished: list[FinishedShard] = []
        self._tar: ShardTar | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        refuse_shards(self.folder)
        self._made_folders = make_folders(self.folder / UNFINISHED)
        file = self.folder / UNFINISHED / LOCK_NAME
        try:
            self._lock.enter_context(locks.held(self.folder, file))
        except locks.LockedError as error:
            raise ShardError(str(error)) from error
        for path in (self.folder / UNFINISHED).iterdir():  # left by a process that was killed
            if path != file:
                path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as clean_up:  # does all of it even if a part fails
            clean_up.callback(self._remove_made_folders)
            clean_up.callback(self._lock.close)
            clean_up.callback(shutil.rmtree, self.folder / UNFINISHED)
            if kind is None:
                self._finish()
            elif self._tar is not None:
                self._tar.abandon()

    def add(self, image: bytes, record: dict[str, Any], orientation: int = 1) -> None:
        """Append one sample, see ``shards.Sample``.

        Args:
            image: the encoded image, JPEG, PNG or WebP.
            record: its annotations.
            orientation: the image's own, if the annotations are of the image turned so.
        """
        size = stored_bytes(len(image), len(record_text(record)))
        if self._tar is not None and self._tar.size + size > self._limit:
            self._close_tar()
        if self._tar is None:
            self._tar = ShardTar(self.folder / UNFINISHED / shard_name(len(self._finished)))
        self._tar.add(image, record, orientation)
        self.images += 1

    def _remove_made_folders(self) -> None:
        if self.manifest is None:
            for folder in self._made_folders[1:]:  # innermost first; the first was .unfinished
                folder.rmdir()

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._finished.append(self._tar.close())
            self._tar = None

    def _finish(self) -> None:
        """Write index and manifest and move everything to its place, the manifest last."""
        self._close_tar()
        manifest, index = summarize(self._info, self._finished, io.StringIO())
        if manifest is None:
            raise ShardError(f"{self.folder}: not one image was given. There is nothing to write.")
        unfinished = self.folder / UNFINISHED
        (unfinished / INDEX_NAME).write_bytes(index_bytes(index))
        (unfinished / MANIFEST_NAME).write_text(manifest_text(manifest))
        names = [shard.file for shard in manifest.shards]
        for name in [*names, INDEX_NAME, MANIFEST_NAME]:
            put_in_place(unfinished / name, self.folder / name)
        self.manifest = manifest


def summarize(
    info: SetInfo, finished: Iterable[FinishedShard], log: IO[str]
) -> tuple[Manifest | None, NDArray[np.void]]:
    """Return the manifest of a set of tars and its index; no manifest if there is no sample.

    Args:
        info: what to say about it.
        finished: its tars, in order; those without samples are left out.
        log: gets the lines of ``skipped.jsonl``.
    """
    shards: list[Shard] = []
    rows = [np.zeros(0, dtype=INDEX_DTYPE)]
    counts: dict[str, Counter[str]] = {"skipped": Counter(), "changed": Counter()}
    classes: dict[int, list[int]] = {label: [0, 0] for label in range(len(info.categories))}
    for part in finished:
        for line in part.log:
            kind = "skipped" if "skipped" in line else "changed"
            counts[kind][line[kind]] += 1
            log.write(to_json(line) + "\n")
        if part.shard.samples:
            part.rows["shard"] = len(shards)
            rows.append(part.rows)
            shards.append(part.shard)
            for label, *counts_of_label in part.classes:
                sums = classes.setdefault(label, [0, 0])
                sums[:] = map(add, sums, counts_of_label)
    index = np.concatenate(rows)
    manifest = Manifest(
        version=VERSION,
        **vars(info),
        images=len(index),
        instances=int(index["num_boxes"].sum(dtype=np.int64)),
        crowd=sum(crowd for _, crowd in classes.values()),
        pixels=int((index["height"].astype(np.int64) * index["width"]).sum()),
        skipped=dict(sorted(counts["skipped"].items())),
        changed=dict(sorted(counts["changed"].items())),
        shards=shards,
        index_sha256=hashlib.sha256(index_bytes(index)).hexdigest(),
        instances_per_class=[classes[label][0] for label in range(len(info.categories))],
        crowd_per_class=[classes[label][1] for label in range(len(info.categories))],
    )
    if len(index):
        return manifest, index
    return None, index


def only_log(lines: list[dict[str, Any]]) -> FinishedShard:
    """Return lines for ``skipped.jsonl`` that belong to no tar, in the form of an empty one."""
    return FinishedShard(Shard("", 0, 0, ""), np.zeros(0, dtype=INDEX_DTYPE), [], lines)


def shard_name(number: int) -> str:
    """Return the file name of a tar."""
    return f"{number:06d}.tar"


def refuse_shards(folder: Path) -> None:
    """Raise ``ShardError`` if a folder holds shards already, or is none."""
    if folder.exists() and not folder.is_dir():
        raise ShardError(f"{folder}: not a folder. Give the folder that is to hold the shards.")
    names = [folder / MANIFEST_NAME, folder / INDEX_NAME, *sorted(folder.glob("*.tar"))]
    refuse_names(str(folder), [path.name for path in names if path.exists()])


def refuse_names(address: str, found: list[str]) -> None:
    """Raise ``ShardError`` if there are files of a shard set."""
    if found:
        raise ShardError(
            f"{address}: has shards already ({', '.join(found[:3])}). Give another folder, or "
            "delete this one first."
        )


def index_bytes(index: NDArray[np.void]) -> bytes:
    """Return the content of ``index.npy``."""
    file = io.BytesIO()
    np.save(file, index, allow_pickle=False)
    return file.getvalue()


def manifest_text(manifest: Manifest) -> str:
    """Return the content of ``manifest.json``."""
    values = asdict(manifest)
    values["categories"] = [category_values(category) for category in manifest.categories]
    if not manifest.federated:
        del values["federated"]
    values["sha256"] = manifest_sha256(values)
    return json.dumps(values, indent=1) + "\n"


def category_values(category: Category) -> dict[str, Any]:
    """Return a category as manifests hold it: without what it does not have."""
    return {name: value for name, value in asdict(category).items() if value is not None}


def make_folders(folder: Path) -> list[Path]:
    """Make a folder with all above it; return those that were not there, innermost first."""
    missing = []
    for path in [folder, *folder.parents]:
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return missing
