"""Whether a shard set is intact: every byte, every image, every count."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigdet.config.data import CacheConfig
from bigdet.data.examples.decode import decode_pixels
from bigdet.data.format.manifest import Manifest, Shard, ShardError
from bigdet.data.format.remote import is_remote
from bigdet.data.format.shard_set import (
    MISSING,
    Sample,
    ShardSet,
    UnavailableShardError,
    size_problem,
)
from bigdet.data.making.conversion import Progress, no_progress
from bigdet.data.making.processes import Tick, run_jobs, useful_processes
from bigdet.data.making.record_check import annotation_problems, record_problem
from bigdet.data.making.shard_tar import annotation_flags, count_boxes, image_flags, turn_flags
from bigdet.host.files import file_sha256
from bigdet.host.reading import patiently, why_unread

ANY_SIZE = 1e9  # GiB; of a cache whose shards' sizes are not known yet


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        place: the file, and the key of the sample if it is about one.
        what: what is wrong with it.
    """

    place: str
    what: str


@dataclass(frozen=True)
class _Job:
    path: str
    cache: CacheConfig
    shard: int


def check_shards(
    path: str | Path,
    *,
    processes: int = 1,
    progress: Progress = no_progress,
    tally: Counter[str] | None = None,
) -> Iterator[Problem]:
    """Read a whole shard set and yield its problems.

    Args:
        path: folder or address of the set. From an address everything is fetched again, whatever
            is in a cache, and deleted afterwards.
        processes: how many shards are read at a time.
        progress: called now and then with the number of samples done and in all.
        tally: gets the counts of what could be read: ``images``, ``instances``, ``crowd``,
            ``pixels``, and by label ``instances of label 0``, ``crowd of label 0``, ...

    Raises:
        ShardError: manifest or index are missing or are not of one set.
    """
    with tempfile.TemporaryDirectory(prefix="bigdet-check-") as cache_folder:
        shards = _open(path, CacheConfig(folder=cache_folder, gib=ANY_SIZE))
        sizes = [shard.bytes for shard in shards.manifest.shards]
        processes = min(processes, len(sizes), useful_processes(sum(sizes)))
        room = (processes + 1) * max(sizes) / 2**30
        cache = CacheConfig(folder=cache_folder, gib=room)
        jobs = (_Job(str(path), cache, number) for number in range(len(sizes)))
        found: Counter[str] = Counter() if tally is None else tally
        for problems, counts in run_jobs(
            _check_shard, jobs, processes, lambda done: progress(done, len(shards))
        ):
            yield from problems
            found.update(counts)
        yield from _count_problems(shards, found)


def load_manifest(path: str | Path) -> Manifest:
    """Return the manifest of a set in a folder or at an address."""
    with tempfile.TemporaryDirectory(prefix="bigdet-check-") as cache_folder:
        return _open(path, CacheConfig(folder=cache_folder, gib=ANY_SIZE)).manifest


def _open(path: str | Path, cache: CacheConfig) -> ShardSet:
    return ShardSet(path, cache=cache, check_files=False)


def _check_shard(job: _Job, tick: Tick) -> tuple[list[Problem], Counter[str]]:
    """Return what is wrong with a tar and its samples, and the counts of what could be read."""
    shards = _open(job.path, job.cache)
    shard = shards.manifest.shards[job.shard]
    found: Counter[str] = Counter()
    try:
        problem = None if is_remote(job.path) else _file_problem(Path(job.path), shard)
    except OSError as error:
        return [Problem(shard.file, why_unread(error))], found
    problems = [] if problem is None else [Problem(shard.file, problem)]
    if problem == MISSING:
        return problems, found  # reported once for all of its samples
    for row in np.flatnonzero(shards.index["shard"] == job.shard).tolist():
        place = f"{shard.file} {shards.key(row)}"
        try:
            sample = shards.read(row)
        except UnavailableShardError as error:  # size and SHA-256 are checked on the way
            return [Problem(shard.file, str(error))], found
        except ShardError as error:
            problems.append(Problem(place, error.finding))
        else:
            whats = list(sample_problems(shards, row, sample))
            problems += [Problem(place, what) for what in whats]
            if record_problem(sample.record) is None:
                num_boxes = count_boxes(sample.record["annotations"])
                found["images"] += 1
                found["crowd"] += len(sample.record["annotations"]) - num_boxes
                found["instances"] += num_boxes
                found["pixels"] += sample.record["height"] * sample.record["width"]
                for entry in sample.record["annotations"]:
                    kind = "crowd" if entry["iscrowd"] else "instances"
                    found[f"{kind} of label {entry['label']}"] += 1
        tick()
    shards.close()
    return problems, found


def _file_problem(folder: Path, shard: Shard) -> str | None:
    """Return what is wrong with the file of a local tar."""
    problem = size_problem(folder, shard)
    path = folder / shard.file
    if problem is None and patiently(lambda: file_sha256(path), str(path)) != shard.sha256:
        problem = "SHA-256 is not that of the manifest"
    return problem


def sample_problems(shards: ShardSet, row: int, sample: Sample) -> Iterator[str]:
    """Yield what is wrong with a sample whose bytes are those that were written."""
    entry, record = shards.index[row], sample.record
    if problem := record_problem(record):
        yield f"record: {problem}"
        return
    recorded = (record["height"], record["width"])
    try:
        decoded = tuple(decode_pixels(sample.image_bytes, None, sample.orientation).shape[:2])
    except ValueError as error:
        yield f"image cannot be decoded: {error}"
    else:
        if decoded != recorded:
            yield f"image is {decoded} pixels, its record says {recorded}"
    if (entry["height"], entry["width"]) != recorded:
        yield f"index says {entry['height']} x {entry['width']}, the record {recorded}"
    annotations = record["annotations"]
    num_boxes = count_boxes(annotations)
    if entry["num_boxes"] != num_boxes:
        yield f"index says {entry['num_boxes']} boxes, the record has {num_boxes}"
    flags = image_flags(sample.image_bytes) | annotation_flags(annotations)
    flags |= turn_flags(sample.orientation)
    if entry["flags"] != flags:
        yield f"index has flags {entry['flags']}, expected {flags}"
    yield from annotation_problems(record, shards.categories)


def _count_problems(shards: ShardSet, found: Counter[str]) -> Iterator[Problem]:
    """Compare the counts of the manifest with what is there, if all of it could be read."""
    manifest = shards.manifest
    if found["images"] == manifest.images:
        expectations = {name: getattr(manifest, name) for name in ("instances", "crowd", "pixels")}
        for name in ("instances", "crowd"):
            for label, count in enumerate(getattr(manifest, f"{name}_per_class") or []):
                expectations[f"{name} of label {label}"] = count
        for name, expected in expectations.items():
            if found[name] != expected:
                yield Problem("manifest.json", f"{name}: {expected}, found {found[name]}")
    per_shard = np.bincount(shards.index["shard"], minlength=len(manifest.shards))
    for shard, count in zip(manifest.shards, per_shard.tolist(), strict=True):
        if shard.samples != count:
            yield Problem(shard.file, f"{count} samples, the manifest says {shard.samples}")
    ids, counts = np.unique(shards.index["image_id"], return_counts=True)
    for image_id in ids[counts > 1].tolist():
        yield Problem("index.npy", f"image {image_id} is there more than once")
