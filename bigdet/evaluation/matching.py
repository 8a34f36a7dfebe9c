"""Which detection finds which object: COCO's greedy rule, for many images at once.

Detections choose in the order of their scores. Each takes the free object that it overlaps most,
independently for each IoU threshold and area range. The loop is over ranks: first the best
detections of all images choose, then the second best, and so on.

Letters: N detections, M objects, Q pairs of the two, T IoU thresholds, A area ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.evaluation.sorting import lexsort

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

    def only(self, kept: NDArray[np.bool_] | Index) -> Pairs:
        """Return the pairs that a mask ``(Q,)`` keeps, or those at some indices."""
        return Pairs(self.detections[kept], self.objects[kept], self.overlaps[kept])

    def best(self, num_detections: int) -> tuple[Index, NDArray[np.float64]]:
        """Return the object that each detection overlaps most, ``(N,)``, and by how much.

        Of equal overlaps the first object; ``NOTHING`` and 0 for a detection without pairs.
        """
        order = lexsort(self.objects, -self.overlaps, self.detections)
        first = order[np.flatnonzero(np.diff(self.detections[order], prepend=-1))]
        best, most = np.full(num_detections, NOTHING), np.zeros(num_detections)
        best[self.detections[first]] = self.objects[first]
        most[self.detections[first]] = self.overlaps[first]
        return best, most

    def any_of_detection(self, bits: Index, num_detections: int) -> Index:
        """Return the bits ``(N,)`` that some pair of each detection has in ``(Q,)``."""
        starts = np.flatnonzero(np.diff(self.detections, prepend=-1))
        found = np.zeros(num_detections, dtype=np.int64)
        if len(starts):
            found[self.detections[starts]] = np.bitwise_or.reduceat(bits, starts)
        return found


def joined(parts: Sequence[tuple[Index, Index, NDArray[np.float64]]]) -> Pairs:
    """Return pairs in several parts, in this order, as one; there is at least one part."""
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def match(
    pairs: Pairs,
    groups: Index,
    is_ignored: NDArray[np.bool_],
    is_crowd: NDArray[np.bool_],
    thresholds: NDArray[np.float64],
) -> Index:
    """Match detections to objects, for all thresholds and areas at once: each is a bit.

    An object that counts has priority over an ignored one, whatever the overlaps. A crowd may be
    found many times. Of equal overlaps the later object wins, as in pycocotools.

    Args:
        pairs: detections and the objects of their group.
        groups: ``(N,)``, the group of each detection, such as its image: detections of a group
            compete, and no object is paired with two groups.
        is_ignored: ``(A, M)``; a detection of an ignored object is neither right nor wrong.
        is_crowd: ``(M,)``.
        thresholds: ``(T,)`` least overlaps, rising.

    Returns:
        ``(Q,)``: bit ``t * A + a`` of a pair says whether its detection finds its object at
        threshold t in area range a.
    """
    matched = np.zeros(len(pairs.objects), dtype=np.int64)
    near = np.flatnonzero(pairs.overlaps >= thresholds[0])
    pairs = Pairs(pairs.detections[near], pairs.objects[near], pairs.overlaps[near])
    by_overlap = lexsort(-pairs.objects, -pairs.overlaps, pairs.detections)
    objects = pairs.objects[by_overlap]
    num_passed = np.searchsorted(thresholds, pairs.overlaps[by_overlap], side="right")
    passed = (1 << num_passed * len(is_ignored)) - 1
    counts = area_bits(~is_ignored, len(thresholds))
    always_free = np.where(is_crowd, -1, 0)
    is_taken = np.zeros(len(is_crowd), dtype=np.int64)
    found = np.zeros(len(objects), dtype=np.int64)
    rows, firsts, lengths = np.unique(pairs.detections, return_index=True, return_counts=True)
    for turn in _turns(groups[rows], lengths):
        first, length = firsts[turn], lengths[turn]
        open_bits = np.full(len(turn), -1)
        for wanted in (counts, ~counts):
            for place in range(length[0]):
                some = slice(np.searchsorted(-length, -place))  # those with more candidates
                pair = first[some] + place
                chosen = objects[pair]
                is_free = always_free[chosen] | ~is_taken[chosen]
                bits = passed[pair] & wanted[chosen] & open_bits[some] & is_free
                is_taken[chosen] |= bits
                open_bits[some] &= ~bits
                found[pair] |= bits
    matched[near[by_overlap]] = found
    return matched


def area_bits(flags: NDArray[np.bool_], num_thresholds: int) -> Index:
    """Return the bits of flags ``(A, N)`` that are the same at each threshold, ``(N,)``."""
    num_areas = len(flags)
    assert num_thresholds * num_areas < 64
    at_first = (flags.T << np.arange(num_areas)).sum(axis=1)
    bits: Index = at_first * (1 << np.arange(num_thresholds) * num_areas).sum()
    return bits


def _turns(groups: Index, lengths: Index) -> list[Index]:
    """Return indices into ``groups``: the first of each group, then the second of each, ...

    Those of one turn are in the order of falling ``lengths``.
    """
    if not len(groups):
        return []
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    sizes = np.diff(np.append(starts, len(groups)))
    turns = np.arange(len(groups)) - np.repeat(starts, sizes)
    order = lexsort(-lengths, turns)
    return np.split(order, np.cumsum(np.bincount(turns))[:-1])
