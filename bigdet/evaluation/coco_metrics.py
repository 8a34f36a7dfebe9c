"""Average precision as COCO defines it, of boxes, masks and keypoints.

The numbers equal those of pycocotools to the last bit (tests compare them), but matching runs on
arrays, all images and classes at once.

Letters: T IoU thresholds, R recalls, K classes, A area ranges, D limits of detections per image,
N detections and M objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bigdet.config.evaluation import MAX_DETECTIONS, Metric
from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import FLAG_KEYPOINTS, FLAG_MASKS, ShardSet
from bigdet.evaluation.accumulation import Matched, accumulate
from bigdet.evaluation.detections import DetectionTable, Kind
from bigdet.evaluation.federated import LVIS_DETECTIONS
from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.matching import NOTHING, Pairs, area_bits, joined, match
from bigdet.evaluation.overlaps import detection_areas, overlaps, pair_up
from bigdet.evaluation.sorting import lexsort

METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
"""Names of the numbers and their indices in ``COCOeval.stats``, for 100 detections."""
KEYPOINT_METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APm": 3, "APl": 4, "AR20": 5}
"""The same for keypoints."""
LVIS_METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR300": 6}
"""The same for boxes and masks of a federated set; APr, APc and APf are ``frequency_aps``."""
FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}
KIND_NAMES: dict[Kind, str] = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""Names of the kinds in tables and plots."""

THRESHOLDS = np.linspace(0.5, 0.95, 10)
HIGHEST_THRESHOLD = 1 - 1e-10
ROWS_AT_ONCE = 1 << 16
"""Detections whose overlaps are computed at once."""

Index = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """The numbers that COCO defines for a kind.

    Attributes:
        areas: least and largest area of each range, pixels; the first range has all objects.
        limits: how many detections per image and class count; the last one is for AP.
        stats: the numbers of ``COCOeval.stats`` in their order: precision or recall, IoU threshold
            (None: the mean over all), index into ``areas``, index into ``limits``.
    """

    areas: list[tuple[float, float]]
    limits: list[int]
    stats: list[tuple[str, float | None, int, int]]


_ALL, _SMALL, _MEDIUM, _LARGE = (0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)
_BOX_RULES = Rules(
    areas=[_ALL, _SMALL, _MEDIUM, _LARGE],
    limits=[1, 10, 100],
    stats=[
        ("precision", None, 0, 2), ("precision", 0.5, 0, 2), ("precision", 0.75, 0, 2),
        ("precision", None, 1, 2), ("precision", None, 2, 2), ("precision", None, 3, 2),
        ("recall", None, 0, 0), ("recall", None, 0, 1), ("recall", None, 0, 2),
        ("recall", None, 1, 2), ("recall", None, 2, 2), ("recall", None, 3, 2),
    ],
)  # fmt: skip
_KEYPOINT_RULES = Rules(
    areas=[_ALL, _MEDIUM, _LARGE],
    limits=[20],
    stats=[
        ("precision", None, 0, 0), ("precision", 0.5, 0, 0), ("precision", 0.75, 0, 0),
        ("precision", None, 1, 0), ("precision", None, 2, 0),
        ("recall", None, 0, 0), ("recall", 0.5, 0, 0), ("recall", 0.75, 0, 0),
        ("recall", None, 1, 0), ("recall", None, 2, 0),
    ],
)  # fmt: skip
LVIS_RULES = Rules(
    areas=_BOX_RULES.areas,
    limits=[LVIS_DETECTIONS],
    stats=[
        ("precision", None, 0, 0), ("precision", 0.5, 0, 0), ("precision", 0.75, 0, 0),
        ("precision", None, 1, 0), ("precision", None, 2, 0), ("precision", None, 3, 0),
        ("recall", None, 0, 0),
    ],
)  # fmt: skip
RULES: dict[Kind, Rules] = {"bbox": _BOX_RULES, "segm": _BOX_RULES, "keypoints": _KEYPOINT_RULES}


@dataclass(frozen=True)
class Measured:
    """Precision and recall of one kind.

    Attributes:
        rules: the numbers of this kind.
        labels: the K classes, in the order of their category ids.
        precision: ``(T, R, K, A)`` at each recall; -1 for a class without objects in the range.
        recall: ``(T, K, A, D)``; -1 for the same classes.
    """

    rules: Rules
    labels: list[int]
    precision: Numbers
    recall: Numbers

    def stats(self) -> list[float | None]:
        """Return the numbers of ``COCOeval.stats``; None without objects."""
        return [self._mean(*stat) for stat in self.rules.stats]

    def class_aps(self, threshold: float | None = None) -> dict[int, float | None]:
        """Return the AP of each class by its label, averaged over all thresholds or at one."""
        chosen = _at(self.precision, threshold)[..., 0]
        return {k: mean_of_defined(chosen[:, :, n]) for n, k in enumerate(self.labels)}

    def frequency_aps(self, categories: Sequence[Category]) -> dict[str, float | None]:
        """Return LVIS's AP of rare, common and frequent classes."""
        groups = [categories[label].frequency for label in self.labels]
        chosen = {name: [g == group for g in groups] for name, group in FREQUENCIES.items()}
        return {
            name: mean_of_defined(self.precision[:, :, places, 0])
            for name, places in chosen.items()
        }

    def _mean(self, what: str, threshold: float | None, area: int, limit: int) -> float | None:
        if what == "precision":
            return mean_of_defined(_at(self.precision, threshold)[..., area])
        return mean_of_defined(_at(self.recall, threshold)[..., area, limit])


def rules_of(truth: GroundTruth, kind: Kind, max_detections: int = MAX_DETECTIONS) -> Rules:
    """Return the rules of a kind.

    ``max_detections`` is for boxes and masks; keypoints have a limit of 20, and boxes and masks of
    a federated set have LVIS's limit.
    """
    rules = RULES[kind]
    if kind == "keypoints":
        return rules
    if truth.verified is not None:
        return LVIS_RULES
    return replace(rules, limits=[*rules.limits[:-1], max_detections])


def metric_places(
    truth: GroundTruth, kind: Kind, max_detections: int = MAX_DETECTIONS
) -> dict[str, int]:
    """Return the names of the numbers of a kind, and their indices in ``Measured.stats()``."""
    if kind == "keypoints":
        return KEYPOINT_METRICS
    if truth.verified is not None:
        return LVIS_METRICS
    return {name.replace("100", str(max_detections)): place for name, place in METRICS.items()}


def _at(values: Numbers, threshold: float | None) -> Numbers:
    return values if threshold is None else values[np.isclose(THRESHOLDS, threshold)]


def evaluation_kinds(
    shards: ShardSet,
    with_masks: bool,
    with_keypoints: bool,
    metric: Metric = "coco",
    max_detections: int = MAX_DETECTIONS,
) -> tuple[Kind, ...]:
    """Return the kinds that can be scored: boxes, and what both model and data have.

    Args:
        shards: the validation set.
        with_masks: the model predicts masks.
        with_keypoints: the model predicts keypoints.
        metric: those of VOC are for boxes only.
        max_detections: see ``rules_of``.

    Raises:
        ValueError: metric or max_detections is set, but the set is scored by LVIS's rule.
    """
    if shards.manifest.federated and max_detections != MAX_DETECTIONS:
        raise ValueError(
            f"evaluation.max_detections: found {max_detections}, but {shards.address} is scored by "
            f"LVIS's rule, which counts {LVIS_DETECTIONS} detections per image. Leave it out."
        )
    if metric != "coco":
        if shards.manifest.federated:
            raise ValueError(
                f"evaluation.metric: found {metric}, but in {shards.address} only some classes are "
                f"annotated on each image, as in LVIS; {metric} would count detections of the "
                f"others as mistakes. Write coco, which scores such a set by LVIS's rule."
            )
        return ("bbox",)
    flags = int(np.bitwise_or.reduce(shards.index["flags"], initial=0))
    kinds: list[Kind] = ["bbox"]
    kinds += ["segm"] if with_masks and flags & FLAG_MASKS else []
    kinds += ["keypoints"] if with_keypoints and flags & FLAG_KEYPOINTS else []
    return tuple(kinds)


def category_ids(shards: ShardSet) -> list[int]:
    """Return the data set's category id for each label, K of them."""
    return [category.id for category in shards.categories]


def measure(
    truth: GroundTruth,
    found: DetectionTable,
    kind: Kind,
    max_detections: int = MAX_DETECTIONS,
    known: Pairs | None = None,
) -> Measured:
    """Measure precision and recall of one kind, for each class.

    Args:
        truth: with masks or keypoints if the kind needs them.
        found: detections of any of its images.
        kind: boxes, masks or keypoints.
        max_detections: see ``rules_of``.
        known: all pairs of one class that overlap by 0.5 or more, if they were computed before.
    """
    rules = rules_of(truth, kind, max_detections)
    labels = _measured_labels(truth, kind)
    class_of = np.full(len(truth.categories), -1)
    class_of[labels] = np.arange(len(labels))
    rows, classes, ranks = _best(truth, found, class_of, rules.limits[-1])
    objects = np.argsort(class_of[truth.labels], kind="stable")
    objects = objects[np.count_nonzero(class_of[truth.labels] < 0) :]
    object_classes = class_of[truth.labels[objects]]
    groups = classes * len(truth.image_ids) + found.images[rows]
    object_groups = object_classes * len(truth.image_ids) + truth.images[objects]
    if known is None:
        pairs = _near_pairs(truth, found, kind, (rows, groups), (objects, object_groups))
    else:
        pairs = _renumbered(known, rows, objects, (len(found), len(truth.labels)))
    ranges = np.array(rules.areas)[:, :, None]  # (A, 2, 1)
    is_ignored = never_counts(truth, kind)[objects] | _is_outside(truth.areas[objects], ranges)
    is_crowd = truth.is_crowd[objects] | (kind == "segm" and ~truth.has_mask[objects])
    bits = match(pairs, groups, is_ignored, is_crowd, np.minimum(THRESHOLDS, HIGHEST_THRESHOLD))
    is_outside = _is_outside(detection_areas(found, kind)[rows], ranges)  # (A, N)
    if truth.verified is not None:
        is_outside |= truth.verified.is_partial(found.images[rows], found.labels[rows])
    hit = pairs.any_of_detection(bits, len(rows))
    counting = area_bits(~is_ignored, len(THRESHOLDS))[pairs.objects]
    right = pairs.any_of_detection(bits & counting, len(rows))
    counted = right | (area_bits(~is_outside, len(THRESHOLDS)) & ~hit)
    totals = [np.bincount(object_classes[~each], minlength=len(labels)) for each in is_ignored]
    matched = Matched(classes, found.scores[rows], ranks, right, counted)
    counts = np.stack(totals, axis=1)  # (K, A)
    return Measured(rules, labels, *accumulate(matched, counts, len(THRESHOLDS), rules.limits))


def _measured_labels(truth: GroundTruth, kind: Kind) -> list[int]:
    """Return the labels by category id: means are sums in this order, as in pycocotools."""
    labels = list(range(len(truth.categories)))
    if kind == "keypoints":
        labels = [label for label in labels if truth.categories[label].keypoints]
    return sorted(labels, key=lambda label: truth.categories[label].id)


def _best(
    truth: GroundTruth, found: DetectionTable, class_of: Index, limit: int
) -> tuple[Index, Index, Index]:
    """Return the rows of the detections that count, their classes, and their ranks.

    They are in the order of the classes, then of the images; within an image the best first.

    Args:
        truth: all objects.
        found: all detections.
        class_of: ``(K,)`` class of each label in ``0..K-1``, -1 for one that is not measured.
        limit: how many count per class and image; the first one has rank 0.
    """
    is_used = class_of[found.labels] >= 0
    if truth.verified is not None:
        is_used &= truth.verified.counted(found.images, found.labels, found.scores)
    rows = np.flatnonzero(is_used)
    groups = class_of[found.labels[rows]] * len(truth.image_ids) + found.images[rows]
    order = lexsort(-found.scores[rows], groups)
    rows, groups = rows[order], groups[order]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    ranks = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    kept = ranks < limit
    return rows[kept], class_of[found.labels[rows[kept]]], ranks[kept]


def _near_pairs(
    truth: GroundTruth,
    found: DetectionTable,
    kind: Kind,
    detections: tuple[Index, Index],
    objects: tuple[Index, Index],
) -> Pairs:
    """Return the pairs of a detection and an object of its group that overlap enough to match.

    Args:
        truth: all objects.
        found: all detections.
        kind: boxes, masks or keypoints.
        detections: ``(N,)`` rows, and their groups, rising.
        objects: ``(M,)`` rows, and their groups, rising.
    """
    parts = []
    for first in range(0, max(len(detections[0]), 1), ROWS_AT_ONCE):
        rows, groups = (column[first : first + ROWS_AT_ONCE] for column in detections)
        mine, others = pair_up(groups, objects[1])
        iou = overlaps(kind, truth, found, rows[mine], objects[0][others], THRESHOLDS[0])
        near = iou >= THRESHOLDS[0]
        parts.append((mine[near] + first, others[near], iou[near]))
    return joined(parts)


def _renumbered(known: Pairs, rows: Index, objects: Index, sizes: tuple[int, int]) -> Pairs:
    """Return pairs of these rows of the two tables, which have ``sizes`` rows, by their places."""
    mine, others = (np.full(size, NOTHING) for size in sizes)
    mine[rows], others[objects] = np.arange(len(rows)), np.arange(len(objects))
    pairs = Pairs(mine[known.detections], others[known.objects], known.overlaps)
    order = lexsort(pairs.objects, pairs.detections)
    return pairs.only(order[(pairs.detections[order] >= 0) & (pairs.objects[order] >= 0)])


def never_counts(truth: GroundTruth, kind: Kind) -> NDArray[np.bool_]:
    """Return which objects count neither as found nor as missed, ``(M,)``.

    Crowds; objects without a mask for masks; objects without labeled points for keypoints.
    """
    if kind == "segm":
        return truth.is_crowd | ~truth.has_mask
    if kind == "keypoints":
        return truth.is_crowd | ~(truth.keypoints[:, :, 2] > 0).any(axis=1)
    return truth.is_crowd


def _is_outside(areas: Numbers, ranges: Numbers) -> NDArray[np.bool_]:
    """Return which areas ``(N,)`` are outside of which ranges ``(A, 2, 1)``: ``(A, N)``."""
    return (areas < ranges[:, 0]) | (areas > ranges[:, 1])


def mean_of_defined(values: Numbers) -> float | None:
    """Return the mean of the values that are not -1, None if all are."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None
