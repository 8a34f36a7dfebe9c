"""Headers of image files; and PNGs from files of formats that tars do not hold."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bigdet.data.making.shard_tar import image_suffix
from bigdet.pictures.pixels import (
    READ_ERRORS,
    exif_orientation,
    exif_tag,
    to_rgb,
    turn_pixels,
    turned_size,
    without_warnings,
)

MAX_PIXELS = 89_478_485  # Pillow's limit, too: larger files are made to exhaust memory
TAR_FORMATS = ("JPEG", "PNG", "WEBP")
DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")
PNG_EXIF = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")
"""What is in a PNG in which Pillow finds an EXIF orientation."""

LOW_VALUES = (0, 3, 15, 63)
"""The highest value, of 255, if only 8, 10, 12 or 14 of the 16 bits of a file are used."""


class TooLargeError(ValueError):
    """An image of more pixels than shards hold."""


@dataclass(frozen=True)
class Header:
    """The header of an image file.

    Attributes:
        size: height and width as stored.
        tag: EXIF orientation, ``1..8``.
        format: as Pillow names it.
        num_pictures: 1 for a JPEG, whose other pictures are previews and the like.
        is_deep: it has 16 bits per channel.
    """

    size: tuple[int, int]
    tag: int = 1
    format: str | None = "JPEG"
    num_pictures: int = 1
    is_deep: bool = False

    def notes(self, pixels: NDArray[np.uint8]) -> Iterator[str]:
        """Yield notes for the log about a file that is used, of pixels ``(H, W, 3)`` uint8."""
        if self.format not in TAR_FORMATS:
            yield f"{self.format} file stored as a PNG of the same pixels"
        if self.num_pictures > 1:
            yield "only the first of several pictures in a file is used"
        highest = int(pixels.max()) if self.is_deep else 255
        if highest <= LOW_VALUES[-1]:
            limit = next(value for value in LOW_VALUES if highest <= value)
            yield (
                f"16-bit image seen as 0..{limit} of 255, nearly black: its values fill a part of "
                f"the 16 bits only; multiply them by {256 // (limit + 1)} and convert again"
            )


def read_header(data: bytes) -> Header:
    """Return the header of an image file, without decoding it.

    Raises:
        TooLargeError: it says so many pixels that Pillow refuses them.
        ValueError: the header cannot be read.
    """
    size = header_size(data)
    is_jpeg = image_suffix(data) == "jpg"
    try:
        with without_warnings(), Image.open(io.BytesIO(data)) as image:
            is_deep = image.mode.startswith("I") or ";16" in str(image.tile)
            # To find the EXIF of a PNG, which may be at its end, Pillow decodes all of it.
            has_tag = image.format != "PNG" or any(name in data for name in PNG_EXIF)
            tag = exif_tag(image) if has_tag else 1
            return Header(
                size=turned_size(size, tag)
                if image.format == "TIFF"
                else size,  # Pillow's is as shown
                tag=tag,
                format="JPEG" if is_jpeg else image.format,
                is_deep=is_deep and image.format in DEEP_FORMATS,
                num_pictures=1 if is_jpeg else getattr(image, "n_frames", 1),
            )
    except (*READ_ERRORS, Image.DecompressionBombError):
        return Header(size)  # a JPEG that only Pillow refuses


def as_png(data: bytes, orientation: int) -> bytes:
    """Return a PNG of the pixels of any image file, turned as an EXIF orientation says.

    Gray, RGB and transparency of 8 bits and gray of 16 stay what they are; all else becomes RGB.
    """
    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    with without_warnings(), Image.open(io.BytesIO(data)) as image:
        to_stored = exif_orientation(image, "stored")
        pixels = to_rgb(image)
        if image.mode.startswith("I"):
            pixels = np.asarray(image).astype(np.uint16)
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            pixels = np.asarray(image)
    file = io.BytesIO()
    Image.fromarray(turn_pixels(turn_pixels(pixels, to_stored), orientation)).save(file, "PNG")
    return file.getvalue()


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
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(str(error)) from error
    except UnidentifiedImageError:  # whose message has an address in memory
        raise ValueError(f"not an image that is known: begins with {data[:16]!r}") from None
    except READ_ERRORS as error:
        raise ValueError(f"not an image: {error}") from error
