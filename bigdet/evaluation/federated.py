"""LVIS's rule for sets in which on each image only some classes were looked for (CVPR 2019).

Of the best 300 detections of an image, whatever their classes, those count whose class is on the
image or is known not to be. A class may also be there without all of its objects annotated: its
detections that find nothing are neither right nor wrong.

Letters: I images, K classes, N detections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LVIS_DETECTIONS = 300

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Verified:
    """What is known of the classes on each image, as pairs ``image * K + label``, rising.

    Attributes:
        num_classes: K.
        known: pairs of which it is known whether the class is there, or how many objects.
        partial: pairs of which not all objects are annotated.
    """

    num_classes: int
    known: Index
    partial: Index

    def is_known(self, images: Index, labels: Index) -> Flags:
        """Tell which detections are of classes that were looked for on their images, ``(N,)``."""
        return _are_among(images * self.num_classes + labels, self.known)

    def is_partial(self, images: Index, labels: Index) -> Flags:
        """Tell which detections may be of objects that nobody has annotated, ``(N,)``."""
        return _are_among(images * self.num_classes + labels, self.partial)

    def counted(self, images: Index, labels: Index, scores: NDArray[np.float64]) -> Flags:
        """Tell which of all detections count at all, ``(N,)``; of equal scores the first ones."""
        by_image = np.lexsort((-scores, images))
        ranks = np.arange(len(images)) - np.searchsorted(images[by_image], images[by_image])
        counts = self.is_known(images, labels)
        counts[by_image[ranks >= LVIS_DETECTIONS]] = False
        return counts


def verified(
    num_classes: int, present: Index, absent: Iterable[int], partial: Iterable[int]
) -> Verified:
    """Return what is known, of pairs ``image * K + label``.

    Args:
        num_classes: K.
        present: of the objects.
        absent: of classes that were looked for and are not there.
        partial: of classes of which not all objects are annotated.
    """
    looked_for = np.fromiter(absent, dtype=np.int64)
    known = np.unique(np.concatenate([present, looked_for]))
    return Verified(num_classes, known, np.unique(np.fromiter(partial, dtype=np.int64)))


def _are_among(pairs: Index, rising: Index) -> Flags:
    """Tell which pairs are in a list; ``numpy.isin`` would sort it again for every class."""
    return np.searchsorted(rising, pairs, "right") > np.searchsorted(rising, pairs, "left")
