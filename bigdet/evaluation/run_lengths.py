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
    lengths = np.array([len(text) for text in masks], dtype=np.int64)
    is_mask = lengths > 0
    if is_mask.all() and len(masks):
        digits = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        is_mask = (np.maximum.reduceat(digits, starts) < 64) & (digits[ends - 1] & _MORE == 0)
        if is_mask.all():
            areas = _areas(masks)
            is_mask = (areas <= num_pixels) & _add_up(masks, areas, num_pixels, digits, starts)
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
    for start in range(0, len(masks), _AT_ONCE):
        part = masks[start : start + _AT_ONCE]
        rles = [{"size": (1, 1), "counts": counts} for counts in part]  # the size is ignored
        areas[start : start + len(part)] = coco_mask.area(rles)
    return areas


def _add_up(
    masks: Sequence[bytes],
    areas: NDArray[np.float64],
    num_pixels: Index,
    digits: NDArray[np.uint8],
    starts: Index,
) -> NDArray[np.bool_]:
    """Return which well-formed masks have as many pixels as their images, ``(N,)``.

    COCO writes each count in digits of 5 bits, lowest first, plus 48; bit 5 means that another
    digit follows, bit 4 of the last digit is the sign. From the fourth count on, the difference to
    the count two places before is written. Counts of background and mask alternate. A 0 in front
    exchanges the two, but adds the first count to each later count of the background.

    Args:
        masks: counts of compressed RLE.
        areas: ``(N,)`` areas of the masks, pixels.
        num_pixels: ``(N,)`` height times width of the image.
        digits: the digits of all masks, minus 48.
        starts: ``(N,)`` index of each mask's first digit.
    """
    is_end = ((digits >> 5) ^ 1).view(np.int8)
    num_counts = np.add.reduceat(is_end, starts, dtype=np.int64)
    first = _first_counts(digits, starts)
    turned = _areas([b"0" + text for text in masks])
    background = turned - first * ((num_counts + 1) // 2 - 1)
    found: NDArray[np.bool_] = (first >= 0) & ((areas + background - num_pixels) % 2**32 == 0)
    return found


def _first_counts(digits: NDArray[np.uint8], starts: Index) -> Index:
    """Return the first count of each mask, ``(N,)``."""
    first = np.zeros(len(starts), dtype=np.int64)
    is_open = np.ones(len(starts), dtype=np.bool_)
    for place in range(_MAX_DIGITS):
        digit = digits[np.minimum(starts + place, len(digits) - 1)].astype(np.int64)
        first += np.where(is_open, (digit & _VALUE) << (_DIGIT_BITS * place), 0)
        is_last = is_open & (digit & _MORE == 0)
        first -= np.where(is_last & (digit & _SIGN > 0), 1 << (_DIGIT_BITS * (place + 1)), 0)
        is_open &= ~is_last
    return first
