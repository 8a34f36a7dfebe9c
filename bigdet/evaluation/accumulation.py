"""Precision and recall of all classes, from detections that were matched to objects.

Letters: T IoU thresholds, R recalls, K classes, A area ranges, D limits of detections per image,
N detections of all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.evaluation.sorting import lexsort

RECALLS = np.linspace(0.0, 1.0, 101)

Index = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """The verdict on each detection; in the bits, bit ``t * A + a`` is that of t and a.

    Attributes:
        classes: ``(N,)`` in ``0..K-1``, rising.
        scores: ``(N,)``.
        ranks: ``(N,)`` place among the detections of its class on its image, the best is 0.
        right: ``(N,)`` bits: it found an object that counts.
        counted: ``(N,)`` bits: it is right or wrong, and not ignored.
    """

    classes: Index
    scores: Numbers
    ranks: Index
    right: Index
    counted: Index


def accumulate(
    matched: Matched, totals: Index, num_thresholds: int, limits: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """Return the precision ``(T, R, K, A)`` and the recall ``(T, K, A, D)``.

    Both are -1 for a class without objects in an area range.

    Args:
        matched: the detections.
        totals: ``(K, A)`` number of objects to find.
        num_thresholds: T.
        limits: D numbers of detections per class and image.
    """
    num_classes, num_areas = totals.shape
    precision = np.empty((num_thresholds, len(RECALLS), num_classes, num_areas))
    recall = np.empty((num_thresholds, num_classes, num_areas, len(limits)))
    by_score = lexsort(-matched.scores, matched.classes)
    right, counted = matched.right[by_score], matched.counted[by_score]
    bounds = np.searchsorted(matched.classes, np.arange(num_classes + 1))
    others, same = _wrong_everywhere(right, counted, bounds, totals.shape[1], num_thresholds)
    right, counted, ranks = right[others], counted[others], matched.ranks[by_score[others]]
    bounds = np.searchsorted(others, bounds)
    reached = first_places(totals)
    exists = totals > 0
    seen = np.zeros(len(right) + 1, dtype=np.int32)
    for threshold, area in np.ndindex(num_thresholds, num_areas):
        bit = 1 << (threshold * num_areas + area)
        places = np.flatnonzero(right & bit != 0)  # ten times as fast as of integers
        np.cumsum(counted & bit != 0, out=seen[1:])
        until, before = same[area, places] + seen[places + 1], same[area, bounds] + seen[bounds]
        values = precision_at_recalls(places, until, before, bounds, reached[:, area])
        precision[threshold, :, :, area] = np.where(exists[:, area], values, -1.0)
        for number, limit in enumerate(limits):
            among = places if limit == limits[-1] else places[ranks[places] < limit]
            num_right = np.diff(np.searchsorted(among, bounds))
            found = num_right / np.maximum(totals[:, area], 1)
            recall[threshold, :, area, number] = np.where(exists[:, area], found, -1.0)
    return precision, recall


def _wrong_everywhere(
    right: Index, counted: Index, bounds: Index, num_areas: int, num_thresholds: int
) -> tuple[Index, NDArray[np.int32]]:
    """Cumulate the detections that are wrong, or ignored, at all thresholds: most of them.

    Args:
        right: ``(N,)`` bits, by class, then by falling score.
        counted: ``(N,)`` bits.
        bounds: ``(K + 1,)`` index of the first detection of each class.
        num_areas: A.
        num_thresholds: T.

    Returns:
        ``(M,)`` rising indices of all other detections, with the first one of each class; and
        ``(A, M + 1)`` how many of the former are before each of the latter, and how many there are.
    """
    at_each = sum(1 << threshold * num_areas for threshold in range(num_thresholds))
    is_same = (right == 0) & ((counted & (1 << num_areas) - 1) * at_each == counted)
    is_same[bounds[bounds < len(right)]] = False
    others = np.flatnonzero(~is_same)
    before = np.zeros((num_areas, len(others) + 1), dtype=np.int32)
    for area in range(num_areas):
        seen = np.cumsum(is_same & (counted & 1 << area != 0), dtype=np.int32)
        before[area] = np.append(seen[others], seen[-1:].sum())
    return others, before


def first_places(totals: Index) -> Index:
    """Return how many objects must be found before each recall is reached, minus 1.

    Args:
        totals: ``(...)`` number of objects to find.

    Returns:
        ``(..., R)``.
    """
    unique, inverse = np.unique(totals, return_inverse=True)
    places = [np.searchsorted(np.arange(1, n + 1) / n, RECALLS) for n in unique.tolist()]
    found: Index = np.array(places, dtype=np.int64).reshape(-1, len(RECALLS))[inverse]
    return found.reshape(*totals.shape, len(RECALLS))


def precision_at_recalls(
    places: Index,
    seen: NDArray[np.integer[Any]],
    before: NDArray[np.integer[Any]],
    bounds: Index,
    reached: Index,
) -> Numbers:
    """Return the highest precision at or beyond each recall, ``(R, K)``.

    Precision rises only at right detections, so the others are not needed.

    Args:
        places: indices of the right detections, by class, then by falling score.
        seen: for each of them, how many detections count until then, itself included.
        before: ``(K + 1,)`` how many count before the first detection of each class.
        bounds: ``(K + 1,)`` index of the first detection of each class.
        reached: ``(K, R)`` number of right detections before each recall is reached.
    """
    starts = np.searchsorted(places, bounds)
    lengths = np.diff(starts)
    num_right = np.arange(1, len(places) + 1) - np.repeat(starts[:-1], lengths)
    num_seen = seen - np.repeat(before[:-1], lengths)
    precision = num_right / (num_seen + np.spacing(1))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        backwards = precision[start:end][::-1]
        np.maximum.accumulate(backwards, out=backwards)
    values = np.append(precision, 0.0)
    at = np.where(reached < lengths[:, None], starts[:-1, None] + reached, len(precision))
    found: Numbers = values[at].T
    return found
