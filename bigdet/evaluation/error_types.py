"""The error types of TIDE (Bolya et al., ECCV 2020), and how much AP each costs.

All at an IoU of 0.5 with the best 100 detections of an image, or evaluation.max_detections if that
is more (of a federated set, those that LVIS counts). A detection that finds no object is, by the
first rule that holds:

    localization    it overlaps an object of its class by 0.1 to 0.5
    classification  it overlaps an object of another class by 0.5 or more
    duplicate       it overlaps an object of its class by 0.5, which a better detection has found
    background      it overlaps no object by more than 0.1
    both            the rest: wrong class and wrong place

An object is missed if no detection finds it and no localization or classification error is on it.
The cost of a type is how much the AP rises if all its errors are corrected: the best detection on
an object that is not found becomes right, all others of the type are removed, and missed objects
are removed. The numbers are those of the authors' ``tidecv``, except for classes without objects,
which do not count here, as in COCO.

Letters: N detections, M objects, Q pairs of them that overlap by 0.1 or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.evaluation.accumulation import first_places, precision_at_recalls
from bigdet.evaluation.coco_metrics import Index, Numbers, never_counts
from bigdet.evaluation.detections import DetectionTable, Kind
from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.matching import NOTHING, Pairs, joined, match
from bigdet.evaluation.overlaps import overlaps, pair_up
from bigdet.evaluation.sorting import lexsort

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
IMAGES_AT_ONCE = 1024

_RIGHT, _MISSED = len(TYPES), 5
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Cover:
    """The best detections of every image, and the objects that they overlap.

    Attributes:
        rows: ``(N,)`` rows of the detection table by image, within an image the best first.
        images: ``(N,)``.
        labels: ``(N,)``.
        scores: ``(N,)``.
        pairs: overlaps of 0.1 or more with objects of any class that count.
        same_class: all overlaps of 0.5 or more with objects of the same class, numbered by the rows
            of the two tables; None if some detections of the table are not among the best.
        in_crowd: ``(N,)`` more than half of the detection is in an ignored region of its class, or
            not all objects of its class are annotated on the image.
    """

    rows: Index
    images: Index
    labels: Index
    scores: Numbers
    pairs: Pairs
    same_class: Pairs | None
    in_crowd: Flags


def find_cover(
    truth: GroundTruth, found: DetectionTable, kind: Kind, max_detections: int = MAX_DETECTIONS
) -> Cover:
    """Return the best detections of each image and their overlaps with objects of all classes."""
    rows = lexsort(-found.scores, found.images)
    images = found.images[rows]
    kept = np.arange(len(rows)) - np.searchsorted(images, images) < max_detections
    if truth.verified is not None:
        kept = truth.verified.counted(found.images, found.labels, found.scores)[rows]
    rows, images = rows[kept], images[kept]
    is_ignored = never_counts(truth, kind)
    in_crowd = np.zeros(len(rows), dtype=np.bool_)
    parts, of_same = [], []
    for first in range(0, len(truth.image_ids), IMAGES_AT_ONCE):
        start, end = np.searchsorted(images, [first, first + IMAGES_AT_ONCE])
        detections, objects = pair_up(images[start:end], truth.images)
        detections += start
        iou = overlaps(kind, truth, found, rows[detections], objects, BACKGROUND_IOU)
        of_crowd = is_ignored[objects]
        is_same = found.labels[rows[detections]] == truth.labels[objects]
        in_crowd[detections[of_crowd & is_same & (iou > FOREGROUND_IOU)]] = True
        same = is_same & (iou >= FOREGROUND_IOU)
        of_same.append((rows[detections[same]], objects[same], iou[same]))
        near = ~of_crowd & (iou >= BACKGROUND_IOU)
        parts.append((detections[near], objects[near], iou[near]))
    if truth.verified is not None:  # such errors do not count
        in_crowd |= truth.verified.is_partial(images, found.labels[rows])
    pairs, same_class = joined(parts), joined(of_same) if len(rows) == len(found) else None
    return Cover(rows, images, found.labels[rows], found.scores[rows], pairs, same_class, in_crowd)


@dataclass(frozen=True)
class Errors:
    """The verdict on each detection and each object.

    Attributes:
        types: ``(N,)`` indices into ``TYPES``, or ``len(TYPES)`` for a right detection.
        corrected: ``(N,)`` the label with which a classification or localization error would be
            right; -1 if its correction is to remove it.
        is_missed: ``(M,)`` by the rule above.
        is_unfound: ``(M,)`` objects that count and that no detection finds.
    """

    types: Index
    corrected: Index
    is_missed: Flags
    is_unfound: Flags


def find_errors(truth: GroundTruth, cover: Cover, kind: Kind) -> Errors:
    """Return for each detection whether it is right or which error it is."""
    counts = ~never_counts(truth, kind)
    finds = match_all(truth, cover, same_class=True)  # (N,)
    is_found = np.zeros(len(counts), dtype=np.bool_)
    is_found[finds[finds != NOTHING]] = True
    is_same = cover.labels[cover.pairs.detections] == truth.labels[cover.pairs.objects]
    count = len(cover.rows)
    own, own_iou = cover.pairs.only(is_same).best(count)
    other, other_iou = cover.pairs.only(~is_same).best(count)
    _, used_iou = cover.pairs.only(is_same & is_found[cover.pairs.objects]).best(count)
    types = np.full(count, TYPES.index("both"))
    types[np.maximum(own_iou, other_iou) <= BACKGROUND_IOU] = TYPES.index("background")
    types[used_iou >= FOREGROUND_IOU] = TYPES.index("duplicate")
    types[other_iou >= FOREGROUND_IOU] = TYPES.index("classification")
    is_near = (own_iou >= BACKGROUND_IOU) & (own_iou <= FOREGROUND_IOU)
    types[is_near] = TYPES.index("localization")
    types[finds != NOTHING] = _RIGHT
    target = np.where(types == TYPES.index("localization"), own, NOTHING)
    target = np.where(types == TYPES.index("classification"), other, target)
    # Of each object the best detection is corrected; earlier images come first.
    corrected = np.full(count, -1)
    claims = np.flatnonzero(target != NOTHING)
    claims = claims[~is_found[target[claims]]]
    claims = claims[np.argsort(-cover.scores[claims], kind="stable")]
    claimed, first = np.unique(target[claims], return_index=True)
    corrected[claims[first]] = truth.labels[claimed]
    is_unfound = counts & ~is_found
    is_missed = is_unfound.copy()
    is_missed[claimed] = False
    return Errors(types, corrected, is_missed, is_unfound)


def match_all(
    truth: GroundTruth, cover: Cover, same_class: bool, min_score: float = -np.inf
) -> Index:
    """Return the object that each detection finds, ``(N,)``, or ``NOTHING``.

    Args:
        truth: the objects.
        cover: the detections and their overlaps.
        same_class: find objects of the same class only.
        min_score: detections below it find nothing.
    """
    pairs, num_objects = cover.pairs, len(truth.labels)
    kept = cover.scores[pairs.detections] >= min_score
    if same_class:
        kept &= cover.labels[pairs.detections] == truth.labels[pairs.objects]
    nothing = np.zeros((1, num_objects), dtype=np.bool_)
    pairs = pairs.only(kept)
    bits = match(pairs, cover.images, nothing, nothing[0], np.array([FOREGROUND_IOU]))
    found = pairs.only(bits > 0)
    finds = np.full(len(cover.rows), NOTHING)
    finds[found.detections] = found.objects
    return finds


def error_costs(
    truth: GroundTruth, cover: Cover, errors: Errors, kind: Kind
) -> dict[str, dict[str, float | int | None]]:
    """Return the number of errors of each type and their cost.

    Returns:
        ``count`` by type; ``dAP`` by type, the gain in AP at IoU 0.5 if they were corrected, in
        0..1; and ``special``: that AP (``AP50``), and its gain if no detection was wrong
        (``false_positives``) or if all objects were found (``false_negatives``).
    """
    totals = np.bincount(truth.labels[~never_counts(truth, kind)], minlength=len(truth.categories))
    order = np.argsort(-cover.scores, kind="stable")
    types, corrected = errors.types[order], errors.corrected[order]
    own_labels = cover.labels[order]
    is_right = types == _RIGHT
    counts = is_right | ~cover.in_crowd[order]  # errors in a crowd do not count, unless corrected
    now = _mean_ap(own_labels[counts], is_right[counts], totals, totals)
    costs: dict[str, float | int | None] = {}
    for number, name in enumerate(TYPES):
        kept, labels, right, asked = counts, own_labels, is_right, totals
        if number == _MISSED:
            asked = totals - np.bincount(truth.labels[errors.is_missed], minlength=len(totals))
        else:
            wrong = types == number
            right = is_right | (wrong & (corrected >= 0))
            kept = (counts & ~wrong) | right
            labels = np.where(wrong & right, corrected, labels)
        better = _mean_ap(labels[kept], right[kept], totals, asked)
        costs[name] = None if now is None or better is None else max(better - now, 0.0)
    asked = totals - np.bincount(truth.labels[errors.is_unfound], minlength=len(totals))
    all_found = _mean_ap(own_labels[counts], is_right[counts], totals, asked)
    right_first = np.argsort(~is_right[counts], kind="stable")
    no_wrong = _mean_ap(
        own_labels[counts][right_first], is_right[counts][right_first], totals, totals
    )
    number_of = np.bincount(errors.types, minlength=_RIGHT).tolist()
    number_of[_MISSED] = int(errors.is_missed.sum())
    return {
        "count": dict(zip(TYPES, number_of, strict=False)),
        "dAP": costs,
        "special": {
            "AP50": now,
            "false_positives": _minus(no_wrong, now),
            "false_negatives": _minus(all_found, now),
        },
    }


def _minus(better: float | None, now: float | None) -> float | None:
    return None if better is None or now is None else better - now


def _mean_ap(labels: Index, is_right: Flags, totals: Index, asked: Index) -> float | None:
    """Return the AP over 101 recalls, averaged over the classes with objects.

    Args:
        labels: ``(N,)`` labels of the detections that count, by falling score.
        is_right: ``(N,)``.
        totals: ``(K,)`` number of objects of each class; classes without any are left out.
        asked: ``(K,)`` number of objects that are still to be found; a class for which it is 0 has
            an AP of 0 if there are detections of it, else it is left out.
    """
    small = np.uint16 if len(totals) < 1 << 16 else np.int64  # numpy sorts uint16 10 times faster
    order = np.argsort(labels.astype(small), kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(totals) + 1))
    right = np.flatnonzero(is_right[order])
    values = precision_at_recalls(right, right + 1, bounds, bounds, first_places(asked))  # (R, K)
    means = np.ascontiguousarray(values.T).mean(axis=1)
    is_asked = (totals > 0) & ((asked > 0) | (np.diff(bounds) > 0))
    aps = np.where(asked > 0, means, 0.0)[is_asked].tolist()
    return sum(aps) / len(aps) if aps else None
