"""Converts Pillow's pictures to uint8 RGB, and turns them as EXIF says.

Training, evaluation, prediction and conversion use it, so a model sees the same pixels in each.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Number = TypeVar("Number", bound=np.generic)

Exif = Literal["shown", "stored"]
"""A picture as its EXIF orientation shows it, as viewers do; or its pixels as they are stored."""

READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    TypeError,
    ArithmeticError,
    LookupError,
    struct.error,
)
"""What Pillow raises for files that are damaged or not images: its readers differ."""

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jfif", ".gif", ".avif", ".jp2",
    ".mpo", ".pbm", ".pgm", ".ppm",
)  # fmt: skip
"""Suffixes of files in a folder that count as pictures, in upper or lower case; a file given by
name may have any. Where a folder has a picture twice, the first of these wins."""

EXIF_ORIENTATION = 0x0112
DECIMALS = 6  # of turned coordinates, so that turned back they are what they were

_FILTERS = threading.RLock()  # Python's filters of warnings apply to the whole process

_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""From stored to shown, by EXIF orientation: exchange x and y; then mirror x; mirror y."""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about what is handled here, also in several threads."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return a picture as stored, ``(H, W, 3)`` uint8 RGB; the first one of an animation.

    Gray, palette, 1-bit and CMYK pictures become RGB; transparency is dropped; of 16 bits the upper
    8 are kept.

    Raises:
        ValueError: its numbers have no known range.
    """
    if image.format == "EPS":
        raise ValueError("EPS files are programs, which are not run; store it as PNG")
    if image.mode.startswith("I"):  # gray of 16 bits, in whichever of Pillow's modes
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 0xFFFF:
            raise ValueError("its pixels have more than 16 bits; store it with 8 or 16")
        return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode.startswith("F"):
        raise ValueError(
            "its pixels are floating-point numbers of no known range; store it with 8 or 16 bits"
        )
    if "transparency" in image.info:  # straight to RGB, Pillow would warn
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def exif_orientation(image: Image.Image, exif: Exif = "shown") -> int:
    """Return how to turn the pixels of ``to_rgb``, ``1..8`` as in EXIF.

    Args:
        image: as just opened by Pillow.
        exif: how the picture is to be seen.
    """
    if image.format == "TIFF":  # Pillow turns it itself
        return 1 if exif == "shown" else inverse_of(exif_tag(image))
    return exif_tag(image) if exif == "shown" else 1


def exif_tag(image: Image.Image) -> int:
    """Return the EXIF orientation that a file just opened has, ``1..8``; 1 is as stored."""
    try:
        with without_warnings():  # of EXIF that is cut short
            value = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF raises nearly any error; the pixels may be intact
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def inverse_of(orientation: int) -> int:
    """Return the orientation that turns back what another one has turned."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def turn_pixels(pixels: NDArray[Number], orientation: int) -> NDArray[Number]:
    """Return stored pixels, ``(H, W)`` or ``(H, W, C)``, turned as an EXIF orientation says."""
    is_transposed, mirrors_x, mirrors_y = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if is_transposed else pixels
    return np.ascontiguousarray(turned[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1])


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return height and width of a picture after turning it as an EXIF orientation says."""
    return (size[1], size[0]) if _TURNS[orientation][0] else size


def turn_points(points: list[float], size: tuple[int, int], orientation: int) -> list[float]:
    """Return where points of the stored picture are after turning it.

    Args:
        points: x, y, x, y, ... in pixels.
        size: height, width as stored; minus 1 each for points that count from pixels' centers.
        orientation: ``1..8`` as in EXIF.
    """
    is_transposed, mirrors_x, mirrors_y = _TURNS[orientation]
    height, width = turned_size(size, orientation)
    turned: list[float] = []
    for x, y in zip(points[::2], points[1::2], strict=True):
        left, top = (y, x) if is_transposed else (x, y)
        turned += (width - left if mirrors_x else left, height - top if mirrors_y else top)
    return [round(value, DECIMALS) for value in turned]
