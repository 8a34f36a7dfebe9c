"""Files of images, as annotations name them: found, read, decoded, or left out with a reason."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from bigdet.data.decode import decode_pixels
from bigdet.data.manifest import ShardError
from bigdet.data.shard_tar import MAX_U2, SampleLog, image_suffix
from bigdet.reading import NO_FILE, patiently, why_unread

MAX_PIXELS = 89_478_485  # Pillow's limit, too: what is larger is there to exhaust memory
MAX_BYTES = 2**30


class TooLargeError(ValueError):
    """An image of more pixels than shards hold."""


def safe_path(folder: Path, name: str) -> Path | None:
    """Return the path of a file; None for a name that leads out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        return None
    return folder / pure


def file_bytes(path: Path) -> int | None:
    """Return the size of a file; None if there is none, or no name that a file could have.

    Raises:
        ShardError: the system does not let it be looked at.
    """
    try:
        found = patiently(lambda: os.stat(path), str(path))
    except ValueError:  # a name with half a character
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
    path: Path | None, size: tuple[int, int] | None, about: dict[str, Any], log: SampleLog
) -> tuple[bytes, NDArray[np.uint8]] | None:
    """Return an image that can be used.

    Args:
        path: of its file; None if its name leads out of the folder.
        size: recorded height and width; None if nothing is recorded.
        about: says in the log which image it is.
        log: gets the reason if it cannot be used.

    Returns:
        The file's bytes, and ``(H, W, 3)`` uint8; None if it cannot be used.

    Raises:
        ShardError: the system does not let it be read, which is no fault of the image.
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
    if image_suffix(data) is None:
        log.skip("not JPEG, PNG or WebP", **about)
        return None
    return _decode(data, size, about, log)


def _decode(
    data: bytes, size: tuple[int, int] | None, about: dict[str, Any], log: SampleLog
) -> tuple[bytes, NDArray[np.uint8]] | None:
    """Decode an image, if its header says that it has the size that it is to have."""
    try:
        found = header_size(data)
        if size is not None and found != size:
            log.skip("size differs", **about, found=list(found), recorded=list(size))
            return None
        if max(found) > MAX_U2 or found[0] * found[1] > MAX_PIXELS:
            raise TooLargeError(f"{found[0]} x {found[1]} pixels")
        pixels = decode_pixels(data)
    except TooLargeError:
        log.skip("more pixels than shards hold", **about)
        return None
    except (ValueError, OSError, SyntaxError, EOFError) as error:
        log.skip("not decodable", **about, error=str(error))
        return None
    if pixels.shape[:2] != found:
        log.skip("not decodable", **about, error=f"its header says {found[0]} x {found[1]}")
        return None
    return data, pixels


def header_size(data: bytes) -> tuple[int, int]:
    """Return height and width as the header of an image says, without decoding it.

    Raises:
        TooLargeError: it says so many pixels that Pillow refuses them.
        ValueError: the header cannot be read.
    """
    if image_suffix(data) == "jpg":
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        return height, width
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(str(error)) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not an image: {error}") from error
