"""Which detection finds which object: COCO's greedy rule, for many images at once.

Detections choose in the order of their scores. Each takes the free object that it overlaps most,
independently for each IoU threshold and area range. The loop is over ranks: first the best
detections of all images choose, then the second best, and so on.

Letters: N detections, M objects, Q pairs of the two, T IoU thresholds, A area ranges, S detections
that overlap some object enough to match it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]

NOTHING = -1


@dataclass(frozen=True)
class Pairs:
    """Detections and objects that overlap.

    Attributes:
        detections: ``(Q,)`` in ``0..N-1``, rising. They are in the order of the images, and within
            an image in that of the scores.
        objects: ``(Q,)`` in ``0..M-1``, rising within a detection.
        overlaps: ``(Q,)`` IoU, or OKS for keypoints, in [0, 1].
    """

    detections: Index
    objects: Index
    overlaps: NDArray[np.float64]

    def only(self, kept: NDArray[np.bool_]) -> Pairs:
        """Return the pairs that a mask ``(Q,)`` keeps."""
        return Pairs(self.detections[kept], self.objects[kept], self.overlaps[kept])

    def best(self, num_detections: int) -> tuple[Index, NDArray[np.float64]]:
        """Return the object that each detection overlaps most, ``(N,)``, and by how much.

        Of equal overlaps the first object; ``NOTHING`` and 0 for a detection without pairs.
        """
        order = np.lexsort((self.objects, -self.overlaps, self.detections))
        first = order[np.flatnonzero(np.diff(self.detections[order], prepend=-1))]
        best, most = np.full(num_detections, NOTHING), np.zeros(num_detections)
        best[self.detections[first]] = self.objects[first]
        most[self.detections[first]] = self.overlaps[first]
        return best, most


def match(
    pairs: Pairs,
    groups: Index,
    is_ignored: NDArray[np.bool_],
    is_crowd: NDArray[np.bool_],
    thresholds: NDArray[np.float64],
) -> tuple[Index, Index]:
    """Match detections to objects.

    An object that counts has priority over an ignored one, whatever the overlaps. A crowd may be
    found many times. Of equal overlaps the later object wins, as in pycocotools.

    Args:
        pairs: detections and the objects of their group.
        groups: ``(N,)``, the group of each detection, such as its image: detections of a group
            compete, and no object is paired with two groups.
        is_ignored: ``(A, M)``; a detection of an ignored object is neither right nor wrong.
        is_crowd: ``(M,)``.
        thresholds: ``(T,)`` least overlaps.

    Returns:
        The detections with a pair above the lowest threshold, ``(S,)`` rising, and the object that
        each one found, ``(T, A, S)``, or ``NOTHING``.
    """
    pairs = pairs.only(pairs.overlaps >= thresholds.min())
    objects, overlaps = pairs.objects, pairs.overlaps
    rows, firsts, counts = np.unique(pairs.detections, return_index=True, return_counts=True)
    num_thresholds, num_areas = len(thresholds), len(is_ignored)
    found = np.full((num_thresholds, num_areas, len(rows)), NOTHING)
    is_taken = np.zeros((num_thresholds, num_areas, is_ignored.shape[1]), dtype=np.bool_)
    least = thresholds[:, None, None, None]
    for turn in _turns(groups[rows]):
        places = np.arange(counts[turn].max())
        is_pair = places < counts[turn][:, None]
        pair = np.where(is_pair, firsts[turn][:, None] + places, 0)  # (n, c): candidates of each
        candidates = objects[pair]
        overlap = np.where(is_pair, overlaps[pair], -1.0)
        can = (overlap >= least) & (~is_taken[:, :, candidates] | is_crowd[candidates])
        counting = can & ~is_ignored[:, candidates]
        can = np.where(counting.any(axis=-1, keepdims=True), counting, can)  # (T, A, n, c)
        value = np.where(can, overlap, -1.0)
        best = value.shape[-1] - 1 - value[..., ::-1].argmax(axis=-1)  # the last of equal ones
        chosen = np.where(can.any(axis=-1), candidates[np.arange(len(turn)), best], NOTHING)
        found[:, :, turn] = chosen
        threshold, area, place = np.nonzero(chosen != NOTHING)
        is_taken[threshold, area, chosen[threshold, area, place]] = True
    return rows, found


def _turns(groups: Index) -> list[Index]:
    """Return indices into ``groups``: the first of each group, then the second of each, ..."""
    if not len(groups):
        return []
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    lengths = np.diff(np.append(starts, len(groups)))
    turns = np.arange(len(groups)) - np.repeat(starts, lengths)
    order = np.argsort(turns, kind="stable")
    return np.split(order, np.cumsum(np.bincount(turns))[:-1])
