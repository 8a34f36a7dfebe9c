"""Bytes of an image file to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from bigdet.data.jpeg import is_zeroed, loses_pixels

_JPEG_START = b"\xff\xd8\xff"


def decode_image(data: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP file to RGB.

    The pixels are those that are stored: an EXIF orientation is not applied, as the boxes of COCO
    and its kin refer to stored pixels. Grayscale, palette and CMYK images become RGB;
    transparency is dropped.

    Args:
        data: the whole file.

    Returns:
        ``(3, H, W)`` uint8 0..255 in channels_last memory.

    Raises:
        ValueError: the bytes are no complete image of 8 bits per channel.
    """
    decode = _decode_jpeg if data.startswith(_JPEG_START) else _decode_with_pillow
    pixels = decode(data)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> np.ndarray:
    """Return ``(H, W, 3)`` uint8; 1.25 times as fast as Pillow, and equal to it."""
    if is_zeroed(data):
        raise ValueError("a part of the compressed data is zeros")
    try:
        colorspace = simplejpeg.decode_jpeg_header(data)[2]
        if colorspace not in ("CMYK", "YCCK"):  # libjpeg-turbo does not convert these to RGB
            pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
    except ValueError as error:
        # It also refuses harmless oddities. Pillow takes these, but is silent about damage.
        if loses_pixels(str(error), data):
            raise
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Return ``(H, W, 3)`` uint8 of any format that Pillow reads."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
            if "transparency" in image.info:  # straight to RGB, Pillow would warn
                return np.array(image.convert("RGBA").convert("RGB"))
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image too large to be decoded: {error}") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"not a complete image: {error}") from error
