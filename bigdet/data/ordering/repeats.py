"""How often a pass shows each sample: weights of data sets, repeat factors of rare classes.

Numpy only. A sample with 1.4 repeats comes once in every pass and, in 2 of 5 passes, once more.
In which passes is drawn per (seed, phase, pass) so that every pass has equally many entries: any
step is found without counting the passes before it. Whole numbers are exact: a sample with 1 repeat
comes exactly once.

Letters: N samples, P entries of a pass, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bigdet.ops.random import permutation, words

_UNIT = 2**32  # fractions are counted in parts of this: sums of integers are the same everywhere


class Repeats:
    """Draws how often each sample comes in a pass.

    Attributes:
        num_entries: P of every pass: the sum of ``repeats``, rounded down.

    Args:
        repeats: ``(N,)`` float64, 0 or more: the mean number of times in a pass.
    """

    def __init__(self, repeats: NDArray[np.float64]) -> None:
        whole = np.floor(repeats)
        self._whole = whole.astype(np.int32)
        self._parts = np.rint((repeats - whole) * _UNIT).astype(np.int64)
        self._total = int(self._parts.sum())
        self._num_extra = self._total // _UNIT
        self.num_entries = int(self._whole.sum(dtype=np.int64)) + self._num_extra

    def draw(self, *key: int | str) -> NDArray[np.int64]:
        """Draw the entries of a pass; ``key`` is seed, phase, pass.

        Returns:
            ``(N,)``: sample i has the entries ``ends[i - 1]`` to ``ends[i] - 1``.
        """
        counts = self._whole.astype(np.int64)
        if self._num_extra:
            # Systematic sampling: points at equal distances on a line on which each sample takes
            # as much as its fraction; in random order, because points never hit close neighbors.
            order = permutation("extra", *key, count=len(counts))
            line = np.cumsum(self._parts[order])
            distance = self._total // self._num_extra  # at least _UNIT: no sample is hit twice
            first = int(words("first extra", *key, count=1)[0]) % distance
            points = first + distance * np.arange(self._num_extra)
            counts[order[np.searchsorted(line, points, side="right")]] += 1
        ends: NDArray[np.int64] = np.cumsum(counts)
        return ends


def repeat_factors(
    classes: NDArray[np.int64], offsets: NDArray[np.int64], num_classes: int, threshold: float
) -> NDArray[np.float64]:
    """Return how often a pass should show each image, so that rare classes are seen more often.

    A class on a fraction f of the images asks for ``sqrt(threshold / f)``; an image gets the
    largest number among its classes, at least 1 (LVIS, Gupta et al. 2019, appendix).

    Args:
        classes: labels on the images, one image after the other, each once per image.
        offsets: ``(N + 1,)``: image i has ``classes[offsets[i]:offsets[i + 1]]``.
        num_classes: K.
        threshold: in (0, 1]: the fraction of the images below which a class is rare.

    Returns:
        ``(N,)`` float64, at least 1.
    """
    num_images = len(offsets) - 1
    frequencies = np.bincount(classes, minlength=num_classes) / max(1, num_images)
    of_class = np.sqrt(threshold / np.maximum(frequencies, 1e-300))
    factors = np.ones(num_images)
    image_of = np.repeat(np.arange(num_images), np.diff(offsets))
    np.maximum.at(factors, image_of, of_class[classes])
    return factors
