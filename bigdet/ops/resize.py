"""Sizes at which images are seen, and the one way in which uint8 images are resized."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_CAP = (1333, 800)
"""Longest long side, and the short side it goes with, in both papers; others in proportion."""


def plan_of(kind: str, size: int, cap: int | None) -> tuple[int, int]:
    """Return how a resize of the config looks at test time: short side, longest long side, pixels.

    Args:
        kind: ``short_side``, or ``direct``, which at test time brings the long side to ``size``.
        size: pixels of the short side, or of the square.
        cap: longest long side of ``short_side``; None is 1333 / 800 of ``size``.
    """
    if kind == "direct":
        return size, size
    return size, cap if cap is not None else round(size * DEFAULT_CAP[0] / DEFAULT_CAP[1])


def test_size(height: int, width: int, size: int, cap: int) -> tuple[int, int]:
    """Return the ``(height, width)`` whose short side is ``size`` and long side at most ``cap``.

    The aspect ratio stays but for rounding down, as torchvision's detectors do: 480x640 at
    (800, 1333) becomes 800x1066. In whole numbers: a float scale makes 799 of some short sides.
    """
    short, long = min(height, width), max(height, width)
    target, of = (size, short) if long * size <= cap * short else (cap, long)
    return max(1, height * target // of), max(1, width * target // of)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the image at another size: bilinear, with antialiasing when it shrinks.

    Equal to Pillow's bilinear resize to one grey level, and three times as fast (DESIGN.md).

    Args:
        image: ``(3, H, W)`` uint8; channels_last memory keeps it fast.
        size: height and width to reach, pixels.

    Returns:
        ``(3, height, width)`` uint8 in channels_last memory; the image itself where it fits.
    """
    if tuple(image.shape[1:]) == size:
        return image
    # By way of (H, W, 3): image[None] has strides that torch does not take for channels_last, and
    # it would hand back another memory format, which costs as much again to copy.
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(
        batch, size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
