"""LVIS's rule for federated sets: only some classes were annotated on each image (CVPR 2019).

The best 300 detections of an image over all classes count, if their class is annotated on the image
or known to be absent. If a class is there but not all of its objects are annotated, its detections
that find nothing are neither right nor wrong.

Letters: I images, K classes, N detections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigdet.evaluation.sorting import lexsort

LVIS_DETECTIONS = 300

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Verified:
    """Which classes are annotated on which images: pairs ``image * K + label`` in rising order.

    Attributes:
        num_classes: K.
        known: pairs whose class is annotated on the image or known to be absent.
        partial: pairs with objects that are not annotated.
    """

    num_classes: int
    known: Index
    partial: Index

    def is_known(self, images: Index, labels: Index) -> Flags:
        """Return which detections are of classes that are known on their images, ``(N,)``."""
        return _are_among(images * self.num_classes + labels, self.known)

    def is_partial(self, images: Index, labels: Index) -> Flags:
        """Return which detections may be of objects that are not annotated, ``(N,)``."""
        return _are_among(images * self.num_classes + labels, self.partial)

    def counted(self, images: Index, labels: Index, scores: NDArray[np.float64]) -> Flags:
        """Return which of all detections count, ``(N,)``; of equal scores the first ones."""
        by_image = lexsort(-scores, images)
        ranks = np.arange(len(images)) - np.searchsorted(images[by_image], images[by_image])
        counts = self.is_known(images, labels)
        counts[by_image[ranks >= LVIS_DETECTIONS]] = False
        return counts


def verified(
    num_classes: int, present: Index, absent: Iterable[int], partial: Iterable[int]
) -> Verified:
    """Make ``Verified`` from pairs ``image * K + label`` in any order.

    Args:
        num_classes: K.
        present: classes of the objects.
        absent: classes that are known to be absent.
        partial: classes with objects that are not annotated.
    """
    looked_for = np.fromiter(absent, dtype=np.int64)
    known = np.unique(np.concatenate([present, looked_for]))
    return Verified(num_classes, known, np.unique(np.fromiter(partial, dtype=np.int64)))


def _are_among(pairs: Index, rising: Index) -> Flags:
    """Return which pairs are in a list; ``numpy.isin`` would sort it for every class."""
    return np.searchsorted(rising, pairs, "right") > np.searchsorted(rising, pairs, "left")
