"""Damage of a JPEG file that its decoder does not report, or reports beside harmless oddities."""

from __future__ import annotations

from collections.abc import Iterator

_ZEROS = bytes(64)  # a row of zeros as no compressed photograph has it
_SCAN, _TABLES, _SEQUENTIAL = 0xDA, 0xC4, (0xC0, 0xC1)  # markers


_END_OF_IMAGE = b"\xff\xd9"


def is_zeroed(data: bytes) -> bool:
    """Tell whether a part of the compressed data was replaced by zeros (a file half on the disk).

    Zeros decode to something, and decoders are often silent. In compressed data a long row of them
    is genuine only where they mean "this block is flat", which the code tables tell: the code of
    zeros alone belongs to the first symbol of each table, and symbol 0 is "no change" for a block's
    mean and "no more" for its details. Such damage of a flat picture leaves data over, which the
    decoder reports. Progressive files are left to it too: there zeros may be bits of values.
    """
    if _ZEROS not in data:
        return False
    is_sequential, is_flat = False, True
    for marker, start, stop in _segments(data):
        if marker == _SCAN:
            end = data.rfind(_END_OF_IMAGE)  # zeros behind it harm nothing
            return is_sequential and not is_flat and _ZEROS in data[stop : max(end, 0) or None]
        is_sequential |= marker in _SEQUENTIAL
        while marker == _TABLES and start + 17 < stop:
            is_flat &= data[start + 17] == 0
            start += 17 + sum(data[start + 1 : start + 17])
    return False


def loses_pixels(problem: str, data: bytes) -> bool:
    """Tell whether what libjpeg says of a file means damage.

    Stray bytes between segments do not, and occur. They are also what a decoder leaves over that
    has run through zeros.
    """
    if "Corrupt JPEG data" not in problem and "Premature end" not in problem:
        return False  # not damage, but a kind of file: rare subsamplings, odd markers
    scan = next((stop for marker, _, stop in _segments(data) if marker == _SCAN), 0)
    return "extraneous bytes" not in problem or _ZEROS in data[scan:]


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
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
