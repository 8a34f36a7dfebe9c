"""Image files that annotations name: found, read, decoded, or left out with a reason."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.examples.decode import decode_pixels
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.orientation import seen_orientation
from bigdet.data.making.shard_tar import MAX_U2, SampleLog, image_suffix
from bigdet.data.making.sources.image_headers import (
    MAX_PIXELS,
    Header,
    TooLargeError,
    as_png,
    read_header,
)
from bigdet.host.reading import NO_FILE, patiently, why_unread
from bigdet.pictures.pixels import READ_ERRORS, Exif, turned_size

MAX_BYTES = 2**30
NO_IMAGE = "not an image that can be read: convert it to PNG or JPEG"


def safe_path(folder: Path, name: str) -> Path | None:
    """Return the path of a file; None for a name that leads out of the folder."""
    return folder / name if is_inside(name) else None


def is_inside(name: str) -> bool:
    """Return whether a name stays inside the folder that it is relative to."""
    return not (name.startswith("/") or ".." in name.split("/") or "\0" in name)


def file_bytes(path: str | Path) -> int | None:
    """Return the size of a file; None if there is none, or if it is no name for a file.

    Raises:
        ShardError: the system does not allow looking at it.
    """
    try:
        found = patiently(lambda: os.stat(path), str(path))
    except ValueError:  # a name with an incomplete character
        return None
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise ShardError(f"{path}: {why_unread(error)}") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def check_folder(folder: Path) -> None:
    """Raise ``ShardError`` if there is no folder or nothing in it."""
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder. Give the folder of the images.")
    if not any(folder.iterdir()):
        raise ShardError(f"{folder}: the folder is empty. Give the folder of the images.")


def read_image(
    path: Path | None,
    size: tuple[int, int] | None,
    about: dict[str, Any],
    log: SampleLog,
    exif: Exif = "shown",
) -> tuple[bytes, NDArray[np.uint8], int] | None:
    """Read and decode an image; None if it cannot be used.

    Args:
        path: None if its name leads out of the folder.
        size: recorded height and width; None if nothing is recorded.
        about: says in the log which image it is.
        log: gets the reason if it cannot be used, and what is done to it.
        exif: which image the annotations are of if EXIF turns it and ``size`` does not decide.

    Returns:
        The file's bytes (those of a PNG if tars do not hold its format); ``(H, W, 3)`` uint8 as it
        was annotated; the EXIF orientation by which that is turned.

    Raises:
        ShardError: the system does not allow reading it, which is no fault of the image.
    """
    if path is None:
        log.skip("file name leads out of the image folder", **about)
        return None
    num_bytes = file_bytes(path)
    if num_bytes is None:
        log.skip("file missing", **about)
        return None
    if num_bytes == 0 or num_bytes > MAX_BYTES:
        log.skip("file empty" if num_bytes == 0 else "file larger than 1 GiB", **about)
        return None
    try:
        data = patiently(path.read_bytes, str(path))
    except OSError as error:
        raise ShardError(f"{path}: {why_unread(error)}") from error
    return _decode(data, size, about, log, exif)


def _decode(
    data: bytes, size: tuple[int, int] | None, about: dict[str, Any], log: SampleLog, exif: Exif
) -> tuple[bytes, NDArray[np.uint8], int] | None:
    """Decode an image if the size in its header is as expected."""
    is_kept, header = image_suffix(data) is not None, None
    try:
        header = read_header(data)
        found, shown = header.size, turned_size(header.size, header.tag)
        if size is not None and size not in (found, shown):
            _skip_size(size, header, about, log)
            return None
        if max(found) > MAX_U2 or found[0] * found[1] > MAX_PIXELS:
            raise TooLargeError(f"{found[0]} x {found[1]} pixels")
        orientation, turning = seen_orientation(header.tag, found, size, exif)
        data = data if is_kept else as_png(data, orientation)
        pixels = decode_pixels(data, None, orientation if is_kept else 1)
    except TooLargeError:
        log.skip("more pixels than shards hold", **about)
        return None
    except READ_ERRORS as error:
        reason = "not decodable" if is_kept or header is not None else NO_IMAGE
        log.skip(reason, **about, error=str(error))
        return None
    if pixels.shape[:2] != turned_size(found, orientation):
        log.skip("not decodable", **about, error=f"its header says {found[0]} x {found[1]}")
        return None
    for note in (turning, *header.notes(pixels)):
        if note is not None:
            log.change(note, **about)
    return data, pixels, orientation if is_kept else 1


def _skip_size(
    size: tuple[int, int], header: Header, about: dict[str, Any], log: SampleLog
) -> None:
    """Note that the height and width of an image are not as recorded."""
    details = {**about, "found": list(header.size), "recorded": list(size)}
    if header.tag == 1:
        log.skip("size differs", **details)
        return
    details["shown"] = list(turned_size(header.size, header.tag))
    log.skip("size differs, as stored and as its EXIF orientation shows it", **details)
