"""Bytes of an image file to pixels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigdet.pictures.jpeg import decode_jpeg, is_jpeg
from bigdet.pictures.pixels import READ_ERRORS, to_rgb, turn_pixels, turned_size

if TYPE_CHECKING:
    from torch import Tensor


def decode_image(
    data: bytes, least_size: tuple[int, int] | None = None, orientation: int = 1
) -> Tensor:
    """Return the result of ``decode_pixels`` as ``(3, H, W)`` uint8 in channels_last memory."""
    import torch  # here, because making and checking shards decode without torch

    return torch.from_numpy(decode_pixels(data, least_size, orientation)).permute(2, 0, 1)


def decode_pixels(
    data: bytes, least_size: tuple[int, int] | None = None, orientation: int = 1
) -> NDArray[np.uint8]:
    """Decode an image file to RGB, see ``pixels.to_rgb``; the first picture of an animation.

    The EXIF orientation in the file is ignored.

    Args:
        data: the whole file.
        least_size: height, width after turning; a JPEG of at least twice this size is decoded at
            1/2, 1/4 or 1/8, but not smaller than this. None: full size.
        orientation: how to turn the stored pixels, ``1..8`` as in EXIF.

    Returns:
        ``(H, W, 3)`` uint8 0..255.

    Raises:
        ValueError: the bytes are not a complete image.
    """
    if least_size is not None:
        least_size = turned_size(least_size, orientation)
    # A last row that covers less than a whole one must not become the first one.
    is_whole = orientation != 1
    pixels = decode_jpeg(data, least_size, is_whole) if is_jpeg(data) else None
    if pixels is None:
        with _opened(data) as image:
            pixels = to_rgb(image)
    return pixels if orientation == 1 else turn_pixels(pixels, orientation)


def stored_size(data: bytes) -> tuple[int, int]:
    """Return height and width of an image file, from its header; ``ValueError`` if it has none."""
    with _opened(data) as image:
        return image.height, image.width


def decoded_extent(size: tuple[int, int], decoded: tuple[int, int]) -> tuple[float, float]:
    """Return height and width of the stored image in pixels of one that was decoded smaller.

    427 rows at 1/4 become 107, the last of which covers three rows: 106.75.
    """
    divisor = round(max(size) / max(decoded))
    return size[0] / divisor, size[1] / divisor


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image file with Pillow, whose errors for damaged files become ``ValueError``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image too large to be decoded: {error}") from error
    except ValueError:
        raise
    except READ_ERRORS as error:
        if "out of memory" in str(error):  # an error of Pillow
            raise MemoryError(str(error)) from error
        raise ValueError(f"not a complete image: {error}") from error
