"""Whether a shard set is whole: every byte, every image, every count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigdet.data.decode import decode_image
from bigdet.data.shard_tar import annotation_flags, image_flags
from bigdet.data.shards import Sample, ShardError, ShardSet, file_sha256, size_problem

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        place: the file, and the key of the sample if it is one.
        what: what is wrong with it.
    """

    place: str
    what: str


def check_shards(folder: Path, progress: Progress = lambda done, total: None) -> Iterator[Problem]:
    """Read a whole shard set and give its problems one by one.

    Args:
        folder: of the set.
        progress: called after every sample with their number so far and in all.

    Raises:
        ShardError: manifest or index are missing or are not of one set.
    """
    shards = ShardSet(folder, check_files=False)
    for shard in shards.manifest.shards:
        problem = size_problem(folder, shard)
        if problem is None and file_sha256(folder / shard.file) != shard.sha256:
            problem = "SHA-256 is not that of the manifest"
        if problem is not None:
            yield Problem(shard.file, problem)
    found: Counter[str] = Counter()
    for row in range(len(shards)):
        if not shards.path(row).is_file():
            continue  # told once for all of its samples
        place = f"{shards.path(row).name} {shards.key(row)}"
        try:
            sample = shards.read(row)
        except ShardError as error:
            yield Problem(place, error.finding)
        else:
            yield from (Problem(place, what) for what in sample_problems(shards, row, sample))
            crowd = sum(bool(entry["iscrowd"]) for entry in sample.record["annotations"])
            found["images"] += 1
            found["crowd"] += crowd
            found["instances"] += len(sample.record["annotations"]) - crowd
            found["pixels"] += sample.record["height"] * sample.record["width"]
        progress(row + 1, len(shards))
    yield from _count_problems(shards, found)


def sample_problems(shards: ShardSet, row: int, sample: Sample) -> Iterator[str]:
    """Tell what is wrong with a sample whose bytes are those that were written."""
    entry, record = shards.index[row], sample.record
    recorded = (record["height"], record["width"])
    try:
        decoded = tuple(decode_image(sample.image_bytes).shape[1:])
    except ValueError as error:
        yield f"image cannot be decoded: {error}"
    else:
        if decoded != recorded:
            yield f"image is {decoded} pixels, its record says {recorded}"
    if (entry["height"], entry["width"]) != recorded:
        yield f"index says {entry['height']} x {entry['width']}, the record {recorded}"
    annotations = record["annotations"]
    num_boxes = sum(not annotation["iscrowd"] for annotation in annotations)
    if entry["num_boxes"] != num_boxes:
        yield f"index says {entry['num_boxes']} boxes, the record has {num_boxes}"
    flags = image_flags(sample.image_bytes) | annotation_flags(annotations)
    if entry["flags"] != flags:
        yield f"index has flags {entry['flags']}, expected {flags}"
    for annotation in annotations:
        if what := _annotation_problem(annotation, recorded, shards.num_classes):
            yield f"annotation {annotation['id']}: {what}"


def _annotation_problem(
    annotation: dict[str, Any], image_size: tuple[int, int], num_classes: int
) -> str | None:
    height, width = image_size
    x, y, w, h = annotation["bbox"]
    if not 0 <= annotation["label"] < num_classes:
        return f"label {annotation['label']}, there are {num_classes} classes"
    # One pixel of tolerance: where exactly an edge may lie is the converter's business.
    is_inside = min(x, y) >= -1 and x + w <= width + 1 and y + h <= height + 1
    return None if w > 0 and h > 0 and is_inside else f"box {annotation['bbox']} in {image_size}"


def _count_problems(shards: ShardSet, found: Counter[str]) -> Iterator[Problem]:
    """Compare the counts of the manifest with what is there, if all of it could be read."""
    manifest = shards.manifest
    if found["images"] == manifest.images:
        for name in ("instances", "crowd", "pixels"):
            expected = getattr(manifest, name)
            if found[name] != expected:
                yield Problem("manifest.json", f"{name}: {expected}, found {found[name]}")
    per_shard = np.bincount(shards.index["shard"], minlength=len(manifest.shards))
    for shard, count in zip(manifest.shards, per_shard.tolist(), strict=True):
        if shard.samples != count:
            yield Problem(shard.file, f"{count} samples, the manifest says {shard.samples}")
    ids, counts = np.unique(shards.index["image_id"], return_counts=True)
    for image_id in ids[counts > 1].tolist():
        yield Problem("index.npy", f"image {image_id} is there more than once")
