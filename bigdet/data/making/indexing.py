"""Index and manifest for WebDataset tars that somebody else wrote.

A sample is an image (jpg, jpeg, png, webp) and a json, of one key and adjacent; the json is a
record as in ``shard_set.Sample``. The tars stay as they are. Samples that cannot be used are left
out of the index, counted and listed; a tar that cannot be read to its end is an error. What systems
and tar itself add (names that begin with a dot, ``__MACOSX``, ``PaxHeader``) is skipped.
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
import orjson

from bigdet.data.format.class_counts import ClassCounter
from bigdet.data.format.manifest import MANIFEST_NAME, Category, Manifest, Shard, ShardError
from bigdet.data.format.orientation import ORIENTATION_KEY, as_seen, seen_orientation
from bigdet.data.format.shard_set import (
    INDEX_DTYPE,
    INDEX_NAME,
    LABEL_LISTS,
    STRING_IDS,
    drop_empty_outlines,
)
from bigdet.data.making.annotations import IGNORE_FLAGS, are_relative
from bigdet.data.making.conversion import Progress, no_progress
from bigdet.data.making.loose_values import truth_value
from bigdet.data.making.processes import Tick, run_jobs, useful_processes
from bigdet.data.making.record_check import annotation_problems, record_problem
from bigdet.data.making.shard_tar import (
    MAX_U2,
    FinishedShard,
    annotation_flags,
    count_boxes,
    image_flags,
    image_suffix,
    turn_flags,
)
from bigdet.data.making.shard_writer import SetInfo, summarize, write_summary
from bigdet.data.making.sources.image_headers import read_header
from bigdet.data.making.storage import PLAN_NAME, LocalStorage
from bigdet.host.files import file_sha256
from bigdet.host.reading import patiently, why_unread
from bigdet.pictures.pixels import Exif, turned_size

INCOMPLETE = "not one image (jpg, jpeg, png, webp) and one json"
DOTTED = f"{INCOMPLETE}: the key of a sample ends at the first dot of a name, and these have more"
APART = "its image and its json are not adjacent in the tar: pack it again with tar --sort=name"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_U4 = 2**32 - 1

Json = dict[str, Any]


@dataclass
class _Found:
    """The files of one key, by extension: where their bytes are."""

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    problem: str | None = None


@dataclass(frozen=True)
class _TarJob:
    path: Path
    categories: list[Category]
    exif: Exif


@dataclass(frozen=True)
class _TarResult:
    """What was found in a tar; ``problem`` if it cannot be read to its end."""

    name: str
    finished: FinishedShard | None
    problem: str | None
    keys: set[str] = field(default_factory=set)  # of all records


def index_shards(
    folder: Path,
    categories: list[Category],
    *,
    name: str | None = None,
    processes: int = 1,
    progress: Progress = no_progress,
    exif: Exif = "shown",
) -> Manifest:
    """Write index and manifest for the tars of a folder, and a list of what is left out.

    Args:
        folder: with the tars.
        categories: in the order of the labels that the records use.
        name: that of the set, for people; None takes the folder's.
        processes: how many tars are read at a time.
        progress: called with the number of tars done and in all.
        exif: which image the records are of if EXIF turns it and the recorded size does not decide.

    Raises:
        ShardError: a tar cannot be read to its end (all of these are listed), no sample can be
            used, or there is an index already.
    """
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise ShardError(f"{folder}: no file there ends in .tar. Give the folder of the tars.")
    if (folder / PLAN_NAME).exists():
        raise ShardError(
            f"{folder}: holds the beginning of a conversion, whose command continues it. Give "
            "the folder of tars that somebody else wrote."
        )
    storage = LocalStorage(folder)
    with storage.claim(None):
        if found := [n for n in (MANIFEST_NAME, INDEX_NAME) if (folder / n).exists()]:
            raise ShardError(
                f"{folder}: has {' and '.join(found)} already. Delete it to index again."
            )
        results = _index_tars(paths, categories, exif, processes, progress)
        parts = [result.finished for result in results if result.finished is not None]
        keys = set[str]().union(*(result.keys for result in results))
        options = STRING_IDS if "source_id" in keys else {}
        is_federated = not keys.isdisjoint(LABEL_LISTS)
        name = name or folder.resolve().name
        info = SetInfo(name, "webdataset", categories, options, is_federated)
        log = io.StringIO()
        _refuse_repeated(folder, parts)
        manifest, index = summarize(info, parts, log)
        if manifest is None:
            lines = log.getvalue().splitlines() or ["no pair of an image and a json of one key"]
            raise ShardError(f"{folder}: not one sample can be used; the first: {lines[0]}")
        write_summary(storage, manifest, index, log.getvalue())
    return manifest


def _index_tars(
    paths: list[Path], categories: list[Category], exif: Exif, processes: int, progress: Progress
) -> list[_TarResult]:
    """Return what is found in each tar; ``ShardError`` with all that cannot be read."""
    results: dict[str, _TarResult] = {}
    jobs = (_TarJob(path, categories, exif) for path in paths)
    num_bytes = sum(path.stat().st_size for path in paths)
    processes = min(processes, len(paths), useful_processes(num_bytes))
    for result in run_jobs(_index_tar, jobs, processes, lambda num_samples: None):
        results[result.name] = result
        progress(len(results), len(paths))
    ordered = [results[path.name] for path in paths]
    if problems := [result.problem for result in ordered if result.problem]:
        raise ShardError("\n".join(problems))
    return ordered


def _index_tar(job: _TarJob, tick: Tick) -> _TarResult:
    try:
        return patiently(lambda: _read_tar(job, tick), str(job.path))
    except OSError as error:
        return _TarResult(job.path.name, None, f"{job.path}: {why_unread(error)}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        what = f"{job.path}: cannot be read to its end ({error}). Repair or remove it."
        return _TarResult(job.path.name, None, what)


def _read_tar(job: _TarJob, tick: Tick) -> _TarResult:
    """Return what a tar holds; raises what the system and ``tarfile`` do."""
    rows: list[tuple[int, ...]] = []
    log: list[Json] = []
    classes, keys, times = ClassCounter(), set[str](), Counter[str]()
    with open(job.path, "rb") as file:
        for found in _samples(file):
            times[found.key] += 1
            about = {"shard": job.path.name, "key": found.key}
            row = _row(file, found, job)
            if isinstance(row, str):
                log.append({"skipped": row, **about})
            else:
                rows.append(row[0])
                classes.add(row[1]["annotations"])
                keys |= row[1].keys()
                if row[2] is not None:
                    log.append({"changed": row[2], **about})
            tick()
    for line in log:
        if line.get("skipped") == INCOMPLETE and times[line["key"]] > 1:
            line["skipped"] = APART
    size = job.path.stat().st_size
    shard = Shard(job.path.name, size, len(rows), file_sha256(job.path))
    index = np.array(rows, dtype=INDEX_DTYPE)
    return _TarResult(job.path.name, FinishedShard(shard, index, classes.listed(), log), None, keys)


def _samples(file: IO[bytes]) -> Iterator[_Found]:
    """Yield the files of each key of a tar; raises as ``tarfile`` does if it is damaged."""
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
    """Return whether a name is of no sample: hidden, or added by macOS, tar or webdataset."""
    *folders, base = PurePosixPath(name).parts or ("",)
    is_added = any(part == "__MACOSX" or part.startswith("PaxHeader") for part in folders)
    return is_added or base.startswith((".", "__"))


def _row(
    file: IO[bytes], found: _Found, job: _TarJob
) -> tuple[tuple[int, ...], Json, str | None] | str:
    """Return a sample's index record, its record and a note; or why it cannot be used."""
    images = [suffix for suffix in found.files if suffix in IMAGE_SUFFIXES]
    if found.problem:
        return found.problem
    if len(images) != 1 or "json" not in found.files:
        return DOTTED if any("." in suffix for suffix in found.files) else INCOMPLETE
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
        drop_empty_outlines(record)
    problem = problem or next(annotation_problems(record, job.categories), None)
    problem = problem or _meaning_problem(record) or _text_problem(text)
    if problem:
        return problem
    turn = _orientation(image, record, job.exif)
    if isinstance(turn, str):
        return turn
    record = as_seen(record)
    annotations = record["annotations"]
    num_boxes = count_boxes(annotations)
    flags = image_flags(image) | annotation_flags(annotations) | turn_flags(turn[0])
    sizes = (record["width"], record["height"])
    if max(num_boxes, *sizes) > MAX_U2:
        return f"more pixels or boxes than {MAX_U2}"
    crc = zlib.crc32(text, zlib.crc32(image))
    places = (record["image_id"], image_offset, image_size, offset, size)
    return (*places, crc, *sizes, flags, num_boxes, 0), record, turn[1]


def _orientation(image: bytes, record: Json, exif: Exif) -> tuple[int, str | None] | str:
    """Return how an image is turned, and a note about that; or what is wrong with it."""
    if image_suffix(image) is None:
        return "the image is not JPEG, PNG or WebP"
    try:
        header = read_header(image)
    except ValueError as error:
        return f"the image cannot be read: {error}"
    height, width = header.size
    recorded, shown = (record["height"], record["width"]), turned_size(header.size, header.tag)
    if ORIENTATION_KEY in record:  # made by bigdet, and of the stored pixels
        tag = record[ORIENTATION_KEY]
        if tag == header.tag and recorded == header.size:
            return tag, None
        return f"{ORIENTATION_KEY} is {tag!r}, the image has {header.tag} and {height} x {width}"
    if recorded in (header.size, shown):
        return seen_orientation(header.tag, header.size, recorded, exif)
    turned = f" (shown {shown[0]} x {shown[1]} by its EXIF)" if shown != header.size else ""
    return f"the image is {height} x {width} pixels{turned}, its record says {recorded}"


def _text_problem(text: bytes) -> str | None:
    """Return why readers of shards, which are stricter than ``json``, cannot read a record."""
    try:
        orjson.loads(text)
    except ValueError as error:
        return f"its json is not strict JSON in UTF-8 without byte order mark: {error}"
    return None


def _meaning_problem(record: Json) -> str | None:
    """Return which annotations would be misunderstood."""
    annotations, sides = record["annotations"], (record["height"], record["width"])
    if annotations and max(sides) > 2 and all(max(entry["bbox"]) <= 1 for entry in annotations):
        return "its boxes are within 0 to 1: relative coordinates, expected pixels"
    for name in ("neg_category_ids", "not_exhaustive_category_ids"):
        if name in record:
            return f"has {name}, which shards have by label, as {' and '.join(LABEL_LISTS)}"
    for entry in annotations:
        if are_relative(entry.get("keypoints", []), entry["bbox"]):
            return f"annotation {entry['id']}: keypoints within 0 to 1: relative, expected pixels"
    for flag in IGNORE_FLAGS:
        for entry in annotations:
            if not entry["iscrowd"] and truth_value(entry.get(flag)) is not False:
                return f"annotation {entry['id']} has {flag} set, which shards write as iscrowd: 1"
    return None


def _refuse_repeated(folder: Path, parts: list[FinishedShard]) -> None:
    ids = np.concatenate([part.rows["image_id"] for part in parts])
    found, counts = np.unique(ids, return_counts=True)
    if repeated := found[counts > 1].tolist():
        raise ShardError(
            f"{folder}: {len(repeated)} image ids are used by more than one sample: "
            f"{', '.join(map(str, repeated[:5]))}. Give every image its own id."
        )


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise tarfile.ReadError(f"it ends after {len(data)} of {size} bytes at {offset}")
    return data
