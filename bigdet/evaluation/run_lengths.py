"""Masks as compressed RLE: whether they are valid, and their areas.

pycocotools checks nothing: with counts that do not add up to the image it runs forever, and with
counts that end too early it writes beyond its memory.

Letters: N masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.data.making.annotations import are_numbers

_AT_ONCE = 200  # pycocotools.mask.area fails from 256 masks on
_MORE, _SIGN, _VALUE = 0x20, 0x10, 0x1F
_DIGIT_BITS = 5
_MAX_DIGITS = 6  # 30 bits hold any image

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
        that are well-formed and add up to the image.
    """
    lengths = np.array(list(map(len, masks)), dtype=np.int64)
    is_mask = lengths > 0
    if is_mask.all() and len(masks):
        digits = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        is_mask = digits[ends - 1] & _MORE == 0
        if digits.max() >= 64:
            is_mask &= np.maximum.reduceat(digits, starts) < 64
        if is_mask.all():
            areas = _areas(masks)
            is_mask = areas + _backgrounds(masks, digits, starts) == num_pixels
            return np.where(is_mask, areas, 0.0), is_mask
    # pycocotools would write beyond its memory with these: give it the others only.
    areas, some = np.zeros(len(masks)), np.flatnonzero(is_mask)
    if len(some):
        part = [masks[n] for n in some.tolist()]
        areas[some], is_mask[some] = mask_areas(part, num_pixels[some])
    return areas, is_mask


def _areas(masks: Sequence[bytes]) -> NDArray[np.float64]:
    """Return the areas of well-formed masks, ``(N,)`` pixels, modulo 2^32."""
    areas = np.zeros(len(masks))
    rles: list[dict[str, Any]] = [{"size": (1, 1)} for _ in range(_AT_ONCE)]  # it is ignored
    for start in range(0, len(masks), _AT_ONCE):
        part = masks[start : start + _AT_ONCE]
        for rle, counts in zip(rles, part, strict=False):
            rle["counts"] = counts
        areas[start : start + len(part)] = coco_mask.area(rles[: len(part)])
    return areas


def _backgrounds(
    masks: Sequence[bytes], digits: NDArray[np.uint8], starts: Index
) -> NDArray[np.float64]:
    """Return the pixels outside of well-formed masks, ``(N,)``; -inf if the first count is wrong.

    COCO writes each count in digits of 5 bits, lowest first, plus 48; bit 5 means that another
    digit follows, bit 4 of the last digit is the sign. Counts of background and mask alternate.
    From the fourth count on, the difference to the count two places before is written, and so not
    in the third. Without the first count, the others of the background are at the places of the
    mask, and their sum is an area.

    Args:
        masks: counts of compressed RLE.
        digits: the digits of all masks, minus 48.
        starts: ``(N,)`` index of each mask's first digit.
    """
    first, length = _first_counts(digits, starts)
    others = _areas([text[n:] for text, n in zip(masks, length.tolist(), strict=True)])
    return np.where(first >= 0, first + others, -np.inf)


def _first_counts(digits: NDArray[np.uint8], starts: Index) -> tuple[Index, Index]:
    """Return the first count of each mask and the number of its digits, ``(N,)`` each.

    The count is negative if it has more digits than any image needs.
    """
    first, length = np.zeros_like(starts), np.zeros_like(starts)
    is_open = np.ones(len(starts), dtype=np.bool_)
    for place in range(_MAX_DIGITS):
        digit = digits[np.minimum(starts + place, len(digits) - 1)].astype(np.int64)
        first += np.where(is_open, (digit & _VALUE) << (_DIGIT_BITS * place), 0)
        length += is_open
        is_last = is_open & (digit & _MORE == 0)
        first -= np.where(is_last & (digit & _SIGN > 0), 1 << (_DIGIT_BITS * (place + 1)), 0)
        is_open &= ~is_last
    return np.where(is_open, -1, first), length
