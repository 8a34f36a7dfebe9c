"""Masks as compressed RLE: whether they are valid, and their areas.

pycocotools checks nothing: with counts that are negative or do not add up to the image it runs
forever, and with counts that end too early it writes beyond its memory.

Letters: N masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.data.making.annotations import are_numbers

_AT_ONCE = 256  # masks whose counts fit into a cache
_MORE, _SIGN, _VALUE = 0x20, 0x10, 0x1F
_DIGIT_BITS = 5
_MAX_DIGITS = 6  # 30 bits with the sign: images of up to 2^29 pixels

Index = NDArray[np.int64]


def mask_counts(mask: Any, size: list[int]) -> bytes:
    """Return a mask in any form that pycocotools accepts as counts of compressed RLE.

    Args:
        mask: RLE, compressed (then it is not checked further) or not, or polygons.
        size: height and width of its image.

    Raises:
        ValueError: it is none of these, or has another size.
    """
    if isinstance(mask, list):
        if not are_outlines(mask, size):
            raise ValueError("no polygons")
        polygons: bytes = coco_mask.merge(coco_mask.frPyObjects(mask, *size))["counts"]
        return polygons
    counts = mask["counts"]
    if list(mask["size"]) != size:
        raise ValueError("another size")
    if isinstance(counts, list):
        if not are_numbers(counts) or any(n < 0 or n % 1 for n in counts):
            raise ValueError("no run lengths")
        if sum(counts) != size[0] * size[1]:  # pycocotools would write beyond the bitmap
            raise ValueError("not as many pixels as the image")
        whole = {"size": size, "counts": [int(n) for n in counts]}
        compressed: bytes = coco_mask.frPyObjects(whole, *size)["counts"]
        return compressed
    return counts if isinstance(counts, bytes) else str.encode(counts, "ascii")


def all_counts(masks: Sequence[Any], sizes: list[list[int]]) -> list[bytes]:
    """Return ``mask_counts`` of many masks."""
    if {dict}.issuperset(map(type, masks)) and [mask["size"] for mask in masks] == sizes:
        counts = [mask["counts"] for mask in masks]
        if {str}.issuperset(map(type, counts)):
            return list(map(str.encode, counts))  # a character that is not ASCII is no digit
    return [mask_counts(mask, size) for mask, size in zip(masks, sizes, strict=True)]


def are_outlines(parts: list[Any], size: list[int]) -> bool:
    """Return whether these are polygons of an image of this height and width."""
    height, width = size
    return (
        bool(parts)
        and all(
            are_numbers(part)
            and len(part) >= 6
            and len(part) % 2 == 0
            # pycocotools allocates by the length of edges: no point may be far outside.
            and all(-width <= x <= 2 * width for x in part[::2])
            and all(-height <= y <= 2 * height for y in part[1::2])
            for part in parts
        )
    )


def mask_areas(
    masks: Sequence[bytes], num_pixels: Index
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the areas of masks, and which masks are valid.

    Args:
        masks: counts of compressed RLE.
        num_pixels: ``(N,)`` height times width of the image.

    Returns:
        ``(N,)`` float64 areas in pixels, 0 for invalid masks; and ``(N,)`` bool, True for counts
        that are well-formed, not negative, and add up to the image.
    """
    is_mask = np.array([b"0" <= text[-1:] < b"P" for text in masks], dtype=np.bool_)
    areas = np.zeros(len(masks))
    if not is_mask.all():  # a count goes on in the next mask
        ended = np.flatnonzero(is_mask)
        part = [masks[n] for n in ended.tolist()]
        areas[ended], is_mask[ended] = mask_areas(part, num_pixels[ended])
        return areas, is_mask
    for start in range(0, len(masks), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        areas[some], is_mask[some] = _areas(masks[some], num_pixels[some])
    return np.where(is_mask, areas, 0.0), is_mask


def _areas(masks: Sequence[bytes], num_pixels: Index) -> tuple[Index, NDArray[np.bool_]]:
    """Return the areas of masks that end with a count, ``(N,)``, and which masks are valid.

    Counts of background and mask alternate, and background comes first. From the fourth count on,
    the difference to the count two places before is written.
    """
    lengths = np.array(list(map(len, masks)), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    digits = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)
    counts, is_last, is_long = _written_counts(digits)
    number = np.add.reduceat(is_last.view(np.uint8), starts, dtype=np.int64)  # of counts
    firsts = np.cumsum(number) - number
    background = counts[firsts].astype(np.int64)
    counts[firsts] = 0  # to which the third count is no difference
    is_mask = (background >= 0) & (np.maximum.reduceat(digits, starts) < 2 * _MORE)
    if is_long.any():
        is_mask &= ~np.logical_or.reduceat(is_long, starts)
    sums = np.zeros((2, len(masks)), dtype=np.int64)
    for parity in (0, 1):  # every second count of all masks
        differences = np.ascontiguousarray(counts[parity::2])
        first = (firsts + 1 - parity) // 2
        number = np.diff(first, append=len(differences))
        before = np.zeros(len(differences) + 1, dtype=np.int32)
        np.cumsum(differences, dtype=np.int32, out=before[1:])
        runs = before[1:] - np.repeat(before[first], number)
        is_mask[np.searchsorted(first, np.flatnonzero(runs < 0), side="right") - 1] = False
        total = np.append(0, np.cumsum(runs, dtype=np.int64))
        sums[parity] = total[first + number] - total[first]
    areas = sums[1 - firsts % 2, np.arange(len(masks))]
    background += sums.sum(axis=0) - areas
    return areas, is_mask & (areas + background == num_pixels)


def _written_counts(
    digits: NDArray[np.uint8],
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the counts as written; which digits end a count; and which are beyond 30 bits.

    A count has digits of 5 bits, lowest first. Bit 5 means that another digit follows, bit 4 of the
    last digit is the sign. As in pycocotools, numbers have 32 bits.

    Args:
        digits: ``(D,)``, minus 48; the last one ends a count.
    """
    is_last = digits < _MORE
    values = ((digits ^ _SIGN) - np.uint8(_SIGN)).view(np.int8).astype(np.int32)
    low, more = digits & _VALUE, (~is_last).view(np.uint8)
    follows = np.ones_like(more)
    for place in range(1, _MAX_DIGITS + 1):  # as many digits before the last one
        follows[place:] &= more[:-place]
        follows[:place] = 0
        if not follows.any() or place == _MAX_DIGITS:
            break
        values <<= _DIGIT_BITS * follows
        values[place:] += low[:-place] * follows[place:]
    return values[is_last], is_last, follows.view(np.bool_)
