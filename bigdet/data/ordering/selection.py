"""Which images of a training set a phase uses, and how often each comes in a pass.

All of it follows from config and index (and, for repeat factors, the annotations), so every
machine gets the same result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bigdet.config.data import TrainSplitConfig
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import MixedSet
from bigdet.data.format.shard_set import ShardSet, source_ids
from bigdet.data.ordering.repeats import Repeats, repeat_factors
from bigdet.data.ordering.windows import Windows
from bigdet.ops.random import permutation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The samples of a phase; N of them.

    Attributes:
        rows: ``(N,)`` int32 rows of the set, rising.
        repeats: how often a pass shows each; None is once.
        windows: for the order ``windowed``; None is ``shuffled``.
        state: the plain values that a position in the order depends on; None for options that are
            not used, so that checkpoints from before they existed still fit.
    """

    rows: NDArray[np.int32]
    repeats: Repeats | None
    windows: Windows | None
    state: dict[str, Any]


_selections: WeakKeyDictionary[ShardSet, tuple[TrainSplitConfig, Selection]] = WeakKeyDictionary()
"""The last selection of each set: all phases share it, and reading annotations takes long."""


def select(shards: ShardSet, split: TrainSplitConfig, key: str = "data.train") -> Selection:
    """Return the samples that a config asks for; kept for the next phase.

    Args:
        shards: the training set.
        split: which of its samples.
        key: of the split in the config, for messages.
    """
    known = _selections.get(shards)
    if known is None or known[0] != split:
        known = _selections[shards] = (split, _select(shards, split, key))
    return known[1]


def _select(shards: ShardSet, split: TrainSplitConfig, key: str) -> Selection:
    rows = np.arange(len(shards), dtype=np.int32)
    if not split.keep_empty:
        rows = np.flatnonzero(shards.index["num_boxes"]).astype(np.int32)
    if split.min_keypoints:
        rows = _with_keypoints(shards, rows, split.min_keypoints, f"{key}.min_keypoints")
    if split.subset is not None:
        rows = _subset(shards, rows, split, key)
    windows = None
    if split.order == "windowed":
        windows = Windows(shards.index["shard"][rows], split.window)
    subset = None
    if split.subset is not None:
        subset = hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
    state = {
        "samples": len(rows),
        "index": shards.index_hash(),
        "window": None if windows is None else windows.size,
        "subset": subset,
        "weights": None if split.weights is None else list(split.weights),
        "repeat_threshold": split.repeat_threshold,
        "min_keypoints": split.min_keypoints or None,
    }
    return Selection(rows, _repeats(shards, rows, split, key), windows, state)


def left_out(shards: ShardSet, split: TrainSplitConfig, key: str = "data.train") -> str:
    """Return why images of a set are not used; empty if all are."""
    num_empty = len(shards) - int(np.count_nonzero(shards.index["num_boxes"]))
    if split.keep_empty or not num_empty:
        return ""
    manifest = shards.manifest
    if not manifest.instances and manifest.crowd:
        return f" All {manifest.crowd} objects are crowd (iscrowd: 1), which is not learned."
    return (
        f" {num_empty} of {len(shards)} images have no object that is not crowd; "
        f"{key}.keep_empty=true includes them."
    )


def _with_keypoints(
    shards: ShardSet, rows: NDArray[np.int32], least: int, key: str
) -> NDArray[np.int32]:
    """Return the rows whose objects have so many labeled keypoints together; crowds do not count.

    Raises:
        ShardError: no image is left, or annotations cannot be read, see ``read_classes``.
    """
    start = time.perf_counter()
    counts = np.zeros(len(rows), np.int64)
    for number, row in enumerate(rows.tolist()):
        for entry in _annotations(shards, row, key):
            if not entry["iscrowd"]:
                counts[number] += sum(seen > 0 for seen in entry.get("keypoints", [])[2::3])
    kept = rows[counts >= least]
    logger.info(
        f"{key}: {len(kept):,} of {len(rows):,} images have {least} or more labeled keypoints; "
        f"read in {time.perf_counter() - start:.1f} s"
    )
    if not len(kept):
        raise ShardError(
            f"{key}: found {least}, but no image of {shards.address} has so many labeled "
            f"keypoints. Set a smaller number, or make the shards with --keypoints."
        )
    return kept


def _annotations(shards: ShardSet, row: int, option: str) -> list[dict[str, Any]]:
    """Return the annotations of a row for an option that needs those of every image."""
    try:
        found: list[dict[str, Any]] = shards.record(row)["annotations"]
        for entry in found:
            entry["label"], entry["iscrowd"], [*entry.get("keypoints", [])]
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{shards.path(row)}: the annotations of sample {shards.key(row)} (row {row}) are "
            f"not as expected ({error!r}). {option} needs those of every "
            f"image: make the shards again, or leave it out."
        ) from error
    return found


def read_classes(
    shards: ShardSet, rows: NDArray[np.int32], option: str = "data.train.repeat_threshold"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which classes are on which image, from the annotations; crowds do not count.

    Returns:
        Labels, one image after the other, each once per image; and ``(N + 1,)`` offsets: image i
        has ``labels[offsets[i]:offsets[i + 1]]``.

    Raises:
        ShardError: annotations cannot be read; leaving an image out here would give machines
            different orders.
    """
    start = time.perf_counter()
    labels: list[int] = []
    offsets = [0]
    for row in rows.tolist():
        annotations = _annotations(shards, row, option)
        labels += sorted({entry["label"] for entry in annotations if not entry["iscrowd"]})
        offsets.append(len(labels))
    seconds = time.perf_counter() - start
    logger.info(f"{option}: read the classes of {len(rows):,} images in {seconds:.1f} s")
    return np.array(labels, np.int64), np.array(offsets)


def _subset(
    shards: ShardSet, rows: NDArray[np.int32], split: TrainSplitConfig, key: str
) -> NDArray[np.int32]:
    """Return some of the rows, rising."""
    assert split.subset is not None
    subset = split.subset
    if subset.images is not None:
        if subset.images > len(rows):
            more = f", or {key}.keep_empty=true for those without objects"
            more = "" if split.keep_empty else more
            raise ShardError(
                f"{key}.subset.images: found {subset.images}, but {shards.address} has "
                f"{len(rows)} images to train on. Write at most that{more}."
            )
        drawn = permutation("subset", subset.seed, count=len(rows))[: subset.images]
        return rows[np.sort(drawn)]
    assert subset.ids is not None
    key = f"{key}.subset.ids"
    ids = _read_ids(key, Path(subset.ids), source_ids(shards))
    absent = ids[~np.isin(ids, shards.index["image_id"])]
    if len(absent):
        raise ShardError(
            f"{key}: {subset.ids} lists {len(absent)} images that {shards.address} "
            f"does not have: {', '.join(map(str, absent[:5].tolist()))}. Remove them."
        )
    chosen = rows[np.isin(shards.index["image_id"][rows], ids)]
    if len(chosen) < len(ids):
        logger.info(
            f"{key}: {len(ids) - len(chosen)} of the {len(ids)} images have no "
            "objects and are left out"
        )
    return chosen


def _read_ids(key: str, path: Path, numbers: Mapping[str, int]) -> NDArray[np.int64]:
    """Return the image ids that a file lists; ``ShardError`` if it is no such list.

    Args:
        key: of the option, for messages.
        path: a JSON list, or ids between blanks or line ends.
        numbers: ids of the images whose own ids are strings, which the file may list.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else text.split()
        ids = np.array([numbers.get(value) or int(value) for value in values], np.int64)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ShardError(
            f"{key}: {path} is not a list of image ids ({error}). Write a JSON "
            f"list, or numbers separated by blanks or line ends."
        ) from error
    unique, counts = np.unique(ids, return_counts=True)
    if not len(ids) or (counts > 1).any():
        twice = f"the image {unique[counts > 1][0]} more than once" if len(ids) else "no image"
        raise ShardError(f"{key}: {path} lists {twice}. Correct the list.")
    return unique


def _repeats(
    shards: ShardSet, rows: NDArray[np.int32], split: TrainSplitConfig, key: str
) -> Repeats | None:
    """Return how often a pass shows each row, None if each comes once."""
    if split.weights is None and split.repeat_threshold is None:
        return None
    repeats = np.ones(len(rows))
    if split.weights is not None:
        repeats *= _weights_of_rows(shards, rows, split.weights)
    if split.repeat_threshold is not None:
        classes, offsets = read_classes(shards, rows, f"{key}.repeat_threshold")
        repeats *= repeat_factors(classes, offsets, shards.num_classes, split.repeat_threshold)
    return Repeats(repeats) if (repeats != 1).any() else None


def _weights_of_rows(
    shards: ShardSet, rows: NDArray[np.int32], weights: list[float]
) -> NDArray[np.float64]:
    """Return the weight of the set that each row is of, ``(N,)``."""
    starts = shards.starts if isinstance(shards, MixedSet) else np.array([0, len(shards)])
    return np.array(weights, np.float64)[np.searchsorted(starts, rows, side="right") - 1]
