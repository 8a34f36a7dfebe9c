"""The one way in which uint8 images are resized."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor


def resize_image(
    image: Tensor, size: tuple[int, int], extent: tuple[float, float] | None = None
) -> Tensor:
    """Return the image at another size: bilinear, with antialiasing when it shrinks.

    Equal to Pillow's bilinear resize to one grey level, and three times as fast (1410 against 453
    COCO images per second to a long side of 448, on one core).

    Args:
        image: ``(3, H, W)`` uint8; channels_last memory keeps it fast.
        size: height and width to reach, pixels.
        extent: height and width that become ``size``, pixels of the image, where its last row or
            column counts for less than a whole one. None: all of it.

    Returns:
        ``(3, height, width)`` uint8 in channels_last memory; the image itself where it fits.
    """
    if tuple(image.shape[1:]) == size and extent in (None, size):
        return image
    # By way of (H, W, 3): image[None] has strides that torch does not take for channels_last, and
    # it would return another memory format, and copying that costs as much again.
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    interpolate = partial(
        torch.nn.functional.interpolate,
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    if extent is None or extent == tuple(image.shape[1:]):
        return interpolate(batch, size=size)[0]
    # With factors torch rounds the new size down; slightly larger ones keep it from losing a pixel.
    factors = [(1 + 1e-9) * new / old for new, old in zip(size, extent, strict=True)]
    return interpolate(batch, scale_factor=factors)[0, :, : size[0], : size[1]]
