"""Compressed RLE, many masks at a time: is it one, and how many pixels does it cover?

pycocotools checks nothing: counts that do not add up to the image make it run forever.

Letters: N masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

_AT_ONCE = 200  # pycocotools.mask.area fails from 256 masks on
_MORE, _SIGN, _VALUE = 0x20, 0x10, 0x1F
_DIGIT_BITS = 5
_MAX_DIGITS = 6  # 30 bits hold any image

Index = NDArray[np.int64]


def mask_areas(masks: Sequence[bytes]) -> NDArray[np.float64]:
    """Return the areas of masks, given as counts of compressed RLE: ``(N,)``, pixels."""
    areas = np.zeros(len(masks))
    for start in range(0, len(masks), _AT_ONCE):
        part = masks[start : start + _AT_ONCE]
        rles = [{"size": (1, 1), "counts": counts} for counts in part]  # the size is not looked at
        areas[start : start + len(part)] = coco_mask.area(rles)
    return areas


def are_masks(
    masks: Sequence[bytes], areas: NDArray[np.float64], num_pixels: Index
) -> NDArray[np.bool_]:
    """Tell which counts of compressed RLE are well-formed and add up to their images, ``(N,)``.

    COCO writes each count in digits of 5 bits, lowest first, plus 48; bit 5 says that another digit
    follows, bit 4 of the last one is the sign. From the fourth count on it is the difference to the
    count two places before. Counts of background and mask take turns. A 0 in front exchanges the
    two, but adds the first count to each later one of the background.

    Args:
        masks: the counts.
        areas: ``(N,)`` what ``mask_areas`` says of them.
        num_pixels: ``(N,)`` height times width of the image.
    """
    lengths = np.array([len(text) for text in masks], dtype=np.int64)
    if not len(masks) or not lengths.all():
        return lengths > 0 if not lengths.any() else _leave_out(masks, lengths, areas, num_pixels)
    digits = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    well_formed = (np.maximum.reduceat(digits, starts) < 64) & (digits[ends - 1] & _MORE == 0)
    is_end = ((digits >> 5) ^ 1).view(np.int8)
    num_counts = np.add.reduceat(is_end, starts, dtype=np.int64)
    first = _first_counts(digits, starts)
    turned = mask_areas([b"0" + text for text in masks])
    background = turned - first * ((num_counts + 1) // 2 - 1)
    in_range = (areas <= num_pixels) & (first >= 0)
    adds_up = (areas + background - num_pixels) % 2**32 == 0  # areas are of 32 bits
    found: NDArray[np.bool_] = well_formed & in_range & adds_up
    return found


def _leave_out(
    masks: Sequence[bytes], lengths: Index, areas: NDArray[np.float64], num_pixels: Index
) -> NDArray[np.bool_]:
    """Do the same where some have no counts at all."""
    some = np.flatnonzero(lengths)
    found = np.zeros(len(masks), dtype=np.bool_)
    found[some] = are_masks([masks[n] for n in some.tolist()], areas[some], num_pixels[some])
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
