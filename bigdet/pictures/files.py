"""Reads pictures of any kind as people see them; one that cannot be read gives one message.

For images that users give. Images of a data set are read as they are annotated
(``data/examples/samples.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigdet.host.reading import MAY_PASS, patiently, why_unread
from bigdet.pictures.jpeg import decode_jpeg, is_jpeg
from bigdet.pictures.pixels import (
    READ_ERRORS,
    Exif,
    exif_orientation,
    to_rgb,
    turn_pixels,
    turned_size,
    without_warnings,
)

Picture: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""A file, or what Pillow, numpy ``(H, W, 3)`` or torch ``(3, H, W)`` have: uint8 RGB."""


def read_picture(path: Path, exif: Exif = "shown") -> NDArray[np.uint8]:
    """Return a picture as people see it, or as it is stored: ``(H, W, 3)`` uint8 RGB.

    The first picture of an animation. Transparency is dropped, 16 bits per channel become 8.

    Raises:
        ValueError: it cannot be read, or is too large.
    """
    with _opened(path) as image:
        data = patiently(path.read_bytes, str(path))
        # Pillow fills lost parts of a JPEG with gray, without an error.
        pixels = decode_jpeg(data) if is_jpeg(data) else None
        orientation = exif_orientation(image, exif)
        return turn_pixels(to_rgb(image) if pixels is None else pixels, orientation)


def shown_size(path: Path, exif: Exif = "shown") -> tuple[int, int]:
    """Return height and width as ``read_picture`` would, from the header; errors as on reading."""
    with _opened(path) as image:
        return turned_size((image.height, image.width), exif_orientation(image, exif))


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
        orientation = exif_orientation(picture)
        picture = turn_pixels(to_rgb(picture), orientation)
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
    """Open a file with Pillow; its errors become ``ValueError``, except those of the host."""
    try:
        # Pillow warns from half the size that it refuses; some photographs are that large.
        with without_warnings():
            image = patiently(lambda: Image.open(path), str(path))
        with image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"too large an image ({error}); it could fill the memory. Make it smaller"
        ) from error
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            raise OSError(
                f"{path}: {why_unread(error)}"
            ) from error  # others would fail in the same way
        if isinstance(error, PermissionError):
            raise ValueError(why_unread(error).rstrip(".")) from error
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "")
        raise ValueError(f"not a readable image ({reason})") from error
