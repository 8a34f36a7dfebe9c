"""Index and manifest for WebDataset tars that somebody else wrote.

A sample is an image (jpg, jpeg, png, webp) and a json, of one key and adjacent; the json is a
record as in ``shards.Sample``. The tars stay as they are. Samples that cannot be used are left out
of the index, counted and listed; a tar that cannot be read to its end is an error. What systems and
tar itself add (names that begin with a dot, ``__MACOSX``, ``PaxHeader``) is passed over.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from bigdet.data.conversion import Progress, no_progress
from bigdet.data.manifest import MANIFEST_NAME, Category, Manifest, Shard, ShardError
from bigdet.data.processes import Tick, run_jobs, useful_processes
from bigdet.data.record_check import annotation_problems, record_problem
from bigdet.data.shard_tar import (
    MAX_U2,
    FinishedShard,
    annotation_flags,
    count_boxes,
    image_flags,
    image_suffix,
)
from bigdet.data.shard_writer import SetInfo, index_bytes, manifest_text, summarize
from bigdet.data.shards import (
    INDEX_DTYPE,
    INDEX_NAME,
    SKIPPED_NAME,
    drop_empty_masks,
    file_sha256,
)
from bigdet.data.sources.image_files import header_size
from bigdet.data.storage import LocalStorage
from bigdet.reading import patiently, why_unread

INCOMPLETE = "not one image (jpg, jpeg, png, webp) and one json"
APART = "its image and its json are not adjacent in the tar: pack it anew with tar --sort=name"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_U4 = 2**32 - 1

Json = dict[str, Any]


@dataclass
class _Found:
    """The files of one key: by extension, where their bytes are."""

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    problem: str | None = None


@dataclass(frozen=True)
class _TarJob:
    path: Path
    categories: list[Category]


@dataclass(frozen=True)
class _TarResult:
    """What was found in a tar; ``problem`` if it cannot be read to its end."""

    name: str
    finished: FinishedShard | None
    problem: str | None


def index_shards(
    folder: Path,
    categories: list[Category],
    *,
    name: str | None = None,
    processes: int = 1,
    progress: Progress = no_progress,
) -> Manifest:
    """Write index and manifest for the tars of a folder, and a list of what is left out.

    Args:
        folder: with the tars.
        categories: in the order of the labels that the records use.
        name: what people call the set; None takes the folder's.
        processes: how many tars are read at a time.
        progress: called with the number of tars done and in all.

    Raises:
        ShardError: a tar cannot be read to its end (all such are told), no sample can be used, or
            there is an index already.
    """
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise ShardError(f"{folder}: no file there ends in .tar. Give the folder of the tars.")
    if found := [n for n in (MANIFEST_NAME, INDEX_NAME) if (folder / n).exists()]:
        raise ShardError(f"{folder}: has {' and '.join(found)} already. Delete it to index anew.")
    results: dict[str, _TarResult] = {}
    jobs = (_TarJob(path, categories) for path in paths)
    num_bytes = sum(path.stat().st_size for path in paths)
    processes = min(processes, len(paths), useful_processes(num_bytes))
    for result in run_jobs(_index_tar, jobs, processes, lambda num_samples: None):
        results[result.name] = result
        progress(len(results), len(paths))
    ordered = [results[path.name] for path in paths]
    if problems := [result.problem for result in ordered if result.problem]:
        raise ShardError("\n".join(problems))
    parts = [result.finished for result in ordered if result.finished is not None]
    info = SetInfo(name or folder.resolve().name, "webdataset", categories, {})
    log = io.StringIO()
    _refuse_repeated(folder, parts)
    manifest, index = summarize(info, parts, log)
    if manifest is None:
        lines = log.getvalue().splitlines() or ["no pair of an image and a json of one key"]
        raise ShardError(f"{folder}: not one sample can be used; the first: {lines[0]}")
    storage = LocalStorage(folder)
    with storage.claim(None):
        if log.getvalue():
            storage.write(SKIPPED_NAME, log.getvalue().encode())
        storage.write(INDEX_NAME, index_bytes(index))
        storage.write(MANIFEST_NAME, manifest_text(manifest).encode())
        storage.clear()
    return manifest


def _index_tar(job: _TarJob, tick: Tick) -> _TarResult:
    try:
        finished = patiently(lambda: _read_tar(job, tick), str(job.path))
    except OSError as error:
        return _TarResult(job.path.name, None, f"{job.path}: {why_unread(error)}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        what = f"{job.path}: cannot be read to its end ({error}). Mend it or take it away."
        return _TarResult(job.path.name, None, what)
    return _TarResult(job.path.name, finished, None)


def _read_tar(job: _TarJob, tick: Tick) -> FinishedShard:
    """Return what a tar holds; raises what the system and ``tarfile`` do."""
    rows: list[tuple[int, ...]] = []
    log: list[Json] = []
    crowd, times = 0, Counter[str]()
    with open(job.path, "rb") as file:
        for found in _samples(file):
            times[found.key] += 1
            row = _row(file, found, job.categories)
            if isinstance(row, str):
                log.append({"skipped": row, "shard": job.path.name, "key": found.key})
            else:
                rows.append(row[0])
                crowd += row[1]
            tick()
    for line in log:
        if line["skipped"] == INCOMPLETE and times[line["key"]] > 1:
            line["skipped"] = APART
    size = job.path.stat().st_size
    shard = Shard(job.path.name, size, len(rows), file_sha256(job.path))
    return FinishedShard(shard, np.array(rows, dtype=INDEX_DTYPE), crowd, log)


def _samples(file: IO[bytes]) -> Iterator[_Found]:
    """Give what stands under each key of a tar; raises what ``tarfile`` does if it is damaged."""
    found: _Found | None = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            if member.isdir() or _is_added(member.name):
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if found is None or found.key != key:
                if found is not None:
                    yield found
                found = _Found(key)
            if not member.isreg() or member.issparse():
                found.problem = "a member is not a file: a link, a device or the like"
            elif suffix.lower() in found.files:
                found.problem = f"two members end in .{suffix.lower()}"
            else:
                found.files[suffix.lower()] = (member.offset_data, member.size)
        end = tar.offset
    # tarfile takes a damaged header for the end; webdataset then drops the rest in silence.
    file.seek(end)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at or before byte {end}")
    if file.tell() - end < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark, so it seems to be cut short")
    if found is not None:
        yield found


def _is_added(name: str) -> bool:
    """Recognize names of no sample: hidden ones, and those that macOS, tar or webdataset add."""
    *folders, base = PurePosixPath(name).parts or ("",)
    is_added = any(part == "__MACOSX" or part.startswith("PaxHeader") for part in folders)
    return is_added or base.startswith((".", "__"))


def _row(
    file: IO[bytes], found: _Found, categories: list[Category]
) -> tuple[tuple[int, ...], int] | str:
    """Return the index record of a sample and its number of crowds, or why it cannot be used."""
    images = [suffix for suffix in found.files if suffix in IMAGE_SUFFIXES]
    if found.problem:
        return found.problem
    if len(images) != 1 or "json" not in found.files:
        return INCOMPLETE
    (image_offset, image_size), (offset, size) = found.files[images[0]], found.files["json"]
    if max(image_size, size) > MAX_U4:
        return "larger than 4 GiB"
    image, text = _read(file, image_offset, image_size), _read(file, offset, size)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"its json cannot be read: {error}"
    problem = record_problem(record)
    if problem is None:
        drop_empty_masks(record)
    problem = problem or next(annotation_problems(record, categories), None)
    problem = problem or _image_problem(image, record)
    if problem:
        return problem
    annotations = record["annotations"]
    num_boxes = count_boxes(annotations)
    flags = image_flags(image) | annotation_flags(annotations)
    sizes = (record["width"], record["height"])
    if max(num_boxes, *sizes) > MAX_U2:
        return f"more pixels or boxes than {MAX_U2}"
    crc = zlib.crc32(text, zlib.crc32(image))
    places = (record["image_id"], image_offset, image_size, offset, size)
    return (*places, crc, *sizes, flags, num_boxes, 0), len(annotations) - num_boxes


def _image_problem(image: bytes, record: Json) -> str | None:
    if image_suffix(image) is None:
        return "the image is not JPEG, PNG or WebP"
    try:
        height, width = header_size(image)
    except ValueError as error:
        return f"the image cannot be read: {error}"
    recorded = (record["height"], record["width"])
    if (height, width) != recorded:
        return f"the image is {height} x {width} pixels, its record says {recorded}"
    return None


def _refuse_repeated(folder: Path, parts: list[FinishedShard]) -> None:
    ids = np.concatenate([part.rows["image_id"] for part in parts])
    found, counts = np.unique(ids, return_counts=True)
    if repeated := found[counts > 1].tolist():
        raise ShardError(
            f"{folder}: {len(repeated)} image ids that more than one sample has: "
            f"{', '.join(map(str, repeated[:5]))}. Give every image its own."
        )


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise tarfile.ReadError(f"it ends after {len(data)} of {size} bytes at {offset}")
    return data
