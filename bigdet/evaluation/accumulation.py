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
    by_score = np.lexsort((-matched.scores, matched.classes))
    right, counted = matched.right[by_score], matched.counted[by_score]
    ranks = matched.ranks[by_score]
    bounds = np.searchsorted(matched.classes, np.arange(num_classes + 1))
    reached = first_places(totals)
    exists = totals > 0
    seen = np.zeros(len(right) + 1, dtype=np.int32)
    for threshold, area in np.ndindex(num_thresholds, num_areas):
        bit = 1 << (threshold * num_areas + area)
        places = np.flatnonzero(right & bit != 0)  # ten times as fast as of integers
        np.cumsum(counted & bit != 0, out=seen[1:])
        values = precision_at_recalls(places, seen, bounds, reached[:, area])
        precision[threshold, :, :, area] = np.where(exists[:, area], values, -1.0)
        for number, limit in enumerate(limits):
            among = places if limit == limits[-1] else places[ranks[places] < limit]
            num_right = np.diff(np.searchsorted(among, bounds))
            found = num_right / np.maximum(totals[:, area], 1)
            recall[threshold, :, area, number] = np.where(exists[:, area], found, -1.0)
    return precision, recall


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
    places: Index, seen: NDArray[np.integer[Any]], bounds: Index, reached: Index
) -> Numbers:
    """Return the highest precision at or beyond each recall, ``(R, K)``.

    Precision rises only at right detections, so the others are not needed.

    Args:
        places: indices of the right detections, by class, then by falling score.
        seen: ``(N + 1,)`` how many of the first 0 to N detections count, over all classes.
        bounds: ``(K + 1,)`` index of the first detection of each class.
        reached: ``(K, R)`` number of right detections before each recall is reached.
    """
    starts = np.searchsorted(places, bounds)
    lengths = np.diff(starts)
    num_right = np.arange(1, len(places) + 1) - np.repeat(starts[:-1], lengths)
    num_seen = seen[places + 1] - np.repeat(seen[bounds[:-1]], lengths)
    precision = num_right / (num_seen + np.spacing(1))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        backwards = precision[start:end][::-1]
        np.maximum.accumulate(backwards, out=backwards)
    values = np.append(precision, 0.0)
    at = np.where(reached < lengths[:, None], starts[:-1, None] + reached, len(precision))
    found: Numbers = values[at].T
    return found
