"""Numbers of a results file to arrays, without numpy's conversions of strings and booleans."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PYTHON_TYPES: dict[type, type] = {np.int64: int, np.float64: float}


def as_integers(values: list[Any]) -> NDArray[np.int64]:
    """Return whole numbers, ``(N,)``; 1.0 is one. ``TypeError`` for others, as true and "1" are."""
    array = _array(values, np.int64)
    whole = array.astype(np.int64, copy=False)
    if (whole != array).any():
        raise TypeError("not whole numbers")
    return whole


def _array(values: list[Any], usual: type[np.int64 | np.float64]) -> NDArray[Any]:
    """Return numbers as an array; numpy alone would also convert strings and booleans.

    Args:
        values: numbers.
        usual: the type that all of them have; others take more time.
    """
    types = set(map(type, values))
    if types <= {_PYTHON_TYPES[usual]}:  # numpy need not find out the type: twice as fast
        return np.array(values, dtype=usual)
    array = np.array(values)
    if array.dtype.kind not in "if" or array.ndim != 1 or not types.isdisjoint({bool, np.bool_}):
        raise TypeError("not numbers")
    return array


def is_whole(value: Any) -> bool:
    """Tell whether `as_integers` takes a value."""
    return type(value) is int or (type(value) is float and value.is_integer())


def as_numbers(values: list[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return finite numbers, or lists of them, in an array; ``TypeError`` for all else.

    Args:
        values: N numbers, or N lists of as many.
        shape: ``(N,)``, or ``(N, length of a list)``.
    """
    if len(shape) == 2:
        if any(length != shape[1] for length in set(map(len, values))):
            raise TypeError("not as many numbers")
        values = list(itertools.chain.from_iterable(values))
    array = _array(values, np.float64).astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        raise TypeError("not finite numbers")
    return array.reshape(shape)


def are_finite_numbers(values: Any, count: int) -> bool:
    """Tell whether a value is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )
