"""Sorting in linear time: numpy sorts 16-bit integers so, and nothing longer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def lexsort(*keys: NDArray[np.number[Any]]) -> NDArray[np.int64]:
    """Return what ``numpy.lexsort(keys)`` does: the last key matters most, equal ones keep order.

    Args:
        keys: ``(N,)`` each, int64 or finite float64.
    """
    order = np.arange(len(keys[0]))
    for key in keys:
        numbers = _as_integers(key)
        for shift in range(0, int(numbers.max(initial=0)).bit_length(), 16):
            digits = (numbers >> np.uint64(shift)).astype(np.uint16)
            order = order[np.argsort(digits[order], kind="stable")]
    return order


def _as_integers(key: NDArray[np.number[Any]]) -> NDArray[np.uint64]:
    """Return integers from 0 on in the same order."""
    if key.dtype.kind == "f":
        bits = (key + 0.0).view(np.int64)  # -0.0 becomes 0.0
        key = bits ^ (bits >> 63 & np.iinfo(np.int64).max)  # the larger, the more negative
    return (key - key.min(initial=np.iinfo(np.int64).max)).view(np.uint64)
