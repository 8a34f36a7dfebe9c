"""Pictures of any kind to pixels, as people see them; a picture that cannot be read is one message.

For images that users hand over. Training and evaluation read the pixels that are stored
(``data/decode.py``), since the boxes of a data set refer to them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bigdet.jpeg import decode_jpeg, is_jpeg
from bigdet.reading import MAY_PASS, patiently, why_unread

SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
}  # fmt: skip
"""Files of a folder that are taken for pictures; a file given by name may have any."""

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""A file, or what Pillow, numpy ``(H, W, 3)`` or torch ``(3, H, W)`` have: uint8 RGB."""

EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width
_OPENING = threading.Lock()  # Python's filters of warnings are of the whole process


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return a picture as people see it: ``(H, W, 3)`` uint8 RGB, turned as EXIF says.

    The first picture of an animation. Transparency is dropped, 16 bits per channel become 8.

    Raises:
        ValueError: it cannot be read, or is too large to be.
    """
    with _opened(path) as image:
        data = patiently(path.read_bytes, str(path))
        # Pillow makes gray of what is lost of a JPEG, and does not say so.
        pixels = decode_jpeg(data) if is_jpeg(data) else None
        if pixels is None:
            return _as_shown(image)
        stored = Image.fromarray(pixels)
        stored.getexif()[EXIF_ORIENTATION] = image.getexif().get(EXIF_ORIENTATION, 1)
        return np.array(ImageOps.exif_transpose(stored))


def shown_size(path: Path) -> tuple[int, int]:
    """Return height and width as people see a picture, from its header; errors as on reading."""
    with _opened(path) as image:
        if image.getexif().get(EXIF_ORIENTATION) in TURNED:
            return image.width, image.height
        return image.height, image.width


def list_pixels(pictures: Sequence[Picture]) -> list[Tensor]:
    """Return each picture as `to_pixels`; ``ValueError`` where one is given and not a list."""
    if isinstance(pictures, (str, Path, Image.Image)):
        raise ValueError(f"found one picture, {pictures}, expected a list of them: [picture].")
    return [to_pixels(picture) for picture in pictures]


def to_pixels(picture: Picture) -> Tensor:
    """Return a picture, however it is given, as ``(3, H, W)`` uint8 RGB.

    Raises:
        ValueError: a file that cannot be read, or an array of another shape or type.
    """
    if isinstance(picture, (str, Path)):
        try:
            picture = read_picture(Path(picture))
        except ValueError as error:
            raise ValueError(f"{picture}: {error}.") from error
    elif isinstance(picture, Image.Image):
        picture = _as_shown(picture)
    if not isinstance(picture, (np.ndarray, Tensor)):
        raise ValueError(
            f"found a {type(picture).__name__}, expected a picture: a file, or one of Pillow, "
            f"numpy or torch."
        )
    if isinstance(picture, np.ndarray):
        shape, is_image = "(H, W, 3)", picture.ndim == 3 and picture.shape[2] == 3
        picture, dtype = torch.from_numpy(np.ascontiguousarray(picture)), picture.dtype
        pixels = picture.permute(2, 0, 1) if is_image else picture
    else:
        shape, is_image = "(3, H, W)", picture.dim() == 3 and picture.shape[0] == 3
        pixels, dtype = picture, picture.dtype
    if not is_image or pixels.dtype != torch.uint8 or 0 in pixels.shape:
        raise ValueError(
            f"found an image of shape {tuple(picture.shape)} and type {dtype}, expected {shape} "
            f"of uint8, RGB, 0 to 255."
        )
    return pixels


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a file with Pillow, whose errors become ``ValueError``, but for those of the host."""
    try:
        with _OPENING, warnings.catch_warnings():
            # Pillow warns of half of what it refuses, and photographs have become that large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = patiently(lambda: Image.open(path), str(path))
        with image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"too large an image ({error}); it could fill the memory. Make it smaller"
        ) from error
    except (OSError, SyntaxError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            raise OSError(
                f"{path}: {why_unread(error)}"
            ) from error  # others would fail in the same way
        if isinstance(error, PermissionError):
            raise ValueError(why_unread(error).rstrip(".")) from error
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "")
        raise ValueError(f"not a readable image ({reason})") from error


def _as_shown(image: Image.Image) -> NDArray[np.uint8]:
    """Return ``(H, W, 3)`` uint8 RGB of a picture, or raise ``ValueError`` that says why not."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # 16 bits of gray, in whichever of Pillow's modes
        gray = np.asarray(image).astype(np.float64) / 257.0  # 65535 becomes 255
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # straight to RGB, Pillow would warn
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
