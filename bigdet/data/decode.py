"""Bytes of an image file to pixels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigdet.jpeg import decode_jpeg, is_jpeg

if TYPE_CHECKING:
    from torch import Tensor


def decode_image(data: bytes, least_size: tuple[int, int] | None = None) -> Tensor:
    """Give what ``decode_pixels`` does as ``(3, H, W)`` uint8 0..255 in channels_last memory."""
    import torch  # here, as making and checking shards decode too, and do without it

    return torch.from_numpy(decode_pixels(data, least_size)).permute(2, 0, 1)


def decode_pixels(data: bytes, least_size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP file to RGB; the first picture of an animation.

    The pixels are those that are stored: an EXIF orientation is not applied, as the boxes of COCO
    and its kin refer to stored pixels. Grayscale, palette and CMYK images become RGB;
    transparency is dropped; of 16 bits the upper 8 are kept.

    Args:
        data: the whole file.
        least_size: height, width; a JPEG of at least twice that is decoded smaller, at 1/2, 1/4 or
            1/8, but not smaller than this. None: at its own size.

    Returns:
        ``(H, W, 3)`` uint8 0..255.

    Raises:
        ValueError: the bytes are no complete image.
    """
    pixels = decode_jpeg(data, least_size) if is_jpeg(data) else None
    return _decode_with_pillow(data) if pixels is None else pixels


def stored_size(data: bytes) -> tuple[int, int]:
    """Return height and width of an image file, from its header; ``ValueError`` if it has none."""
    with _opened(data) as image:
        return image.height, image.width


def decoded_extent(size: tuple[int, int], decoded: tuple[int, int]) -> tuple[float, float]:
    """Return what part of an image that was decoded smaller the stored one fills, its pixels.

    Of 427 rows at 1/4 there are 107, the last of which stands for three: 106.75.

    Args:
        size: height, width as stored.
        decoded: height, width as decoded.
    """
    divisor = round(max(size) / max(decoded))
    return size[0] / divisor, size[1] / divisor


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Return ``(H, W, 3)`` uint8 of any format that Pillow reads."""
    with _opened(data) as image:
        if image.mode == "I;16":
            upper = (np.array(image) >> 8).astype(np.uint8)
            return np.repeat(upper[..., None], 3, axis=-1)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 16 bits per channel")
        if "transparency" in image.info:  # straight to RGB, Pillow would warn
            return np.array(image.convert("RGBA").convert("RGB"))
        return np.array(image.convert("RGB"))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image file with Pillow, whose errors for damaged files become ``ValueError``."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image too large to be decoded: {error}") from error
    except (OSError, SyntaxError) as error:
        if "out of memory" in str(error):  # one of Pillow's own
            raise MemoryError(str(error)) from error
        raise ValueError(f"not a complete image: {error}") from error
