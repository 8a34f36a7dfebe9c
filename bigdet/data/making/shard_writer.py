"""Writes a shard set in one process, sample by sample; and index and manifest of any set.

``ShardWriter`` is for samples that are made one after the other; what is read from files is
converted in parallel by ``conversion.py``. The tars get to their place when all are complete, and
the manifest last, so that nothing unfinished looks finished; after an error nothing is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
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
from bigdet.data.format.shard_set import INDEX_DTYPE, INDEX_NAME, SKIPPED_NAME
from bigdet.data.making.shard_tar import FinishedShard, ShardTar, record_text, stored_bytes
from bigdet.data.making.storage import Storage, open_unused
from bigdet.host.strict_json import to_json


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
        """Set what to write; the folder is touched on entering.

        Args:
            folder: target; must not hold a shard set yet.
            name: that of the set, for people.
            source: the kind of data it is made from.
            categories: in the order of the labels.
            options: those of the manifest: how the set is made.
            shard_megabytes: a tar is closed before it grows beyond this (10^6 bytes).
        """
        self.folder = folder
        self.images = 0
        self.manifest: Manifest | None = None
        self._info = SetInfo(name, source, categories, options)
        self._limit = shard_megabytes * 10**6
        self._finished: list[FinishedShard] = []
        self._tar: ShardTar | None = None

    def __enter__(self) -> ShardWriter:
        self._storage = open_unused(self.folder, resumes=False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._storage.claim(None))
            self._scratch = stack.enter_context(self._storage.scratch())
            self._at_end = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._at_end:
            try:
                if kind is None:
                    self._finish()
            finally:
                if self.manifest is None:
                    if self._tar is not None:
                        self._tar.abandon()
                    self._storage.clear()

    def add(self, image: bytes, record: dict[str, Any], orientation: int = 1) -> None:
        """Append one sample, a JPEG, PNG or WebP with its record, see ``shard_set.Sample``.

        ``orientation`` is that of EXIF if the annotations are of the image turned by it.
        """
        size = stored_bytes(len(image), len(record_text(record)))
        if self._tar is not None and self._tar.size + size > self._limit:
            self._close_tar()
        if self._tar is None:
            self._tar = ShardTar(self._scratch / shard_name(len(self._finished)))
        self._tar.add(image, record, orientation)
        self.images += 1

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._finished.append(self._tar.close())
            self._tar = None

    def _finish(self) -> None:
        """Move the tars to their place, and write index and manifest."""
        self._close_tar()
        manifest, index = summarize(self._info, self._finished, io.StringIO())
        if manifest is None:
            raise ShardError(f"{self.folder}: not one image was given. There is nothing to write.")
        for shard in manifest.shards:
            self._storage.take(self._scratch / shard.file, shard.file)
        write_summary(self._storage, manifest, index)
        self.manifest = manifest


def summarize(
    info: SetInfo, finished: Iterable[FinishedShard], log: IO[str]
) -> tuple[Manifest | None, NDArray[np.void]]:
    """Return the manifest of a set of tars and its index; no manifest if there is no sample.

    Args:
        info: what does not depend on the samples.
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


def write_summary(
    storage: Storage, manifest: Manifest, index: NDArray[np.void], log: str = ""
) -> None:
    """Write what makes tars a set, the manifest last; ``log`` lists what was left out."""
    if log:
        storage.write(SKIPPED_NAME, log.encode())
    storage.write(INDEX_NAME, index_bytes(index))
    storage.write(MANIFEST_NAME, manifest_text(manifest).encode())
    storage.clear()
