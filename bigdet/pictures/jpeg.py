"""Decodes JPEG files, and finds damage that decoders do not report."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_START = b"\xff\xd8\xff"
_ZEROS = bytes(64)  # a run of zeros that no compressed photograph has
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_RESTART = re.compile(r"0xd[0-7]$")  # markers within a scan
_SCAN, _TABLES, _SEQUENTIAL = 0xDA, 0xC4, (0xC0, 0xC1)  # markers

JPEG_DIVISORS = (8, 4, 2)
"""A JPEG decodes fast to its size divided by these: whole parts of its 8x8 blocks are left out."""


def is_jpeg(data: bytes) -> bool:
    """Return whether these are the bytes of a JPEG file, damaged or not."""
    return data.startswith(_START)


def decode_jpeg(
    data: bytes, least_size: tuple[int, int] | None = None, is_whole: bool = False
) -> NDArray[np.uint8] | None:
    """Decode a JPEG file, 1.25 times as fast as Pillow and equal to it.

    Args:
        data: the whole file.
        least_size: height, width; what is at least twice that is decoded smaller, at 1/2, 1/4 or
            1/8, but not smaller than this. None: at its own size.
        is_whole: only at a fraction that divides height and width without remainder.

    Returns:
        ``(H, W, 3)`` uint8 RGB as stored; None for a kind that Pillow must decode (CMYK, oddities).

    Raises:
        ValueError: the file is damaged, which Pillow might pass over.
    """
    if is_zeroed(data):
        raise ValueError("a part of the compressed data is zeros")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("CMYK", "YCCK"):  # libjpeg-turbo does not convert these to RGB
            divisor = _divisor((height, width), least_size or (height, width), is_whole)
            least = {"min_height": -(-height // divisor), "min_width": -(-width // divisor)}
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                data, "RGB", min_factor=divisor, **least
            )
            return pixels
    except ValueError as error:
        # It also refuses harmless oddities. Pillow takes these, but is silent about damage.
        if loses_pixels(str(error), data):
            raise
    return None


def _divisor(size: tuple[int, int], least_size: tuple[int, int], is_whole: bool) -> int:
    """Return by what a JPEG's height and width may be divided; 1 if they are too small for it."""
    for divisor in JPEG_DIVISORS:
        has_rest = is_whole and (size[0] % divisor or size[1] % divisor)
        is_large = size[0] >= divisor * least_size[0] and size[1] >= divisor * least_size[1]
        if is_large and not has_rest:
            return divisor
    return 1


def is_zeroed(data: bytes) -> bool:
    """Return whether a part of the compressed data was replaced by zeros (a file half on the disk).

    Zeros decode to something, and decoders are often silent. In compressed data a long row of them
    is genuine only where they mean "this block is flat", which the code tables show: the code of
    zeros alone belongs to the first symbol of each table, and symbol 0 is "no change" for a block's
    mean and "no more" for its details. Such damage of a flat picture leaves data unread, which the
    decoder reports. Progressive files are left to it as well: there zeros may be bits of values.
    """
    if _ZEROS not in data:
        return False
    is_sequential, is_flat = False, True
    for marker, start, stop in jpeg_segments(data):
        if marker == _SCAN:
            compressed = data[stop:].partition(_END_OF_IMAGE)[0]  # some files are padded with zeros
            return is_sequential and not is_flat and _ZEROS in compressed
        is_sequential |= marker in _SEQUENTIAL
        while marker == _TABLES and start + 17 < stop:
            is_flat &= data[start + 17] == 0
            start += 17 + sum(data[start + 1 : start + 17])
    return False


def loses_pixels(problem: str, data: bytes) -> bool:
    """Return whether a message of libjpeg about a file means damage.

    Stray bytes before the first scan or the end marker occur in whole files. A decoder that has run
    through zeros also leaves such bytes; between scans, they are lost data.
    """
    if "Corrupt JPEG data" not in problem and "Premature end" not in problem:
        return False  # not damage, but a kind of file: rare subsamplings, odd markers
    scan = next((stop for marker, _, stop in jpeg_segments(data) if marker == _SCAN), 0)
    end = data.rfind(_END_OF_IMAGE, scan) % (len(data) + 1)  # no end marker: the last byte
    is_between = not problem.endswith("0xd9") and (
        data.count(_START_OF_SCAN) > 1 or _RESTART.search(problem) is not None
    )
    is_stray = "extraneous bytes" in problem and not is_between
    return not is_stray or _ZEROS in data[scan:end]


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and stop of each segment's content up to the first scan's header."""
    place, marker = 2, 0
    while place + 4 <= len(data) and marker != _SCAN:
        marker = data[place + 1]
        if marker == 0xFF:  # markers may be preceded by any number of these
            place += 1
            continue
        stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place + 4, stop
        place = stop
