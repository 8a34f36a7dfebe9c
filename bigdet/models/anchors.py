"""Anchors: boxes of fixed shapes, centered on the grid of every pyramid level.

Letters: A anchors over all levels, L levels, R aspect ratios.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(size: float, ratios: Sequence[float], rounded: bool) -> Tensor:
    """Give the anchors of one grid point, around the origin.

    Args:
        size: side of the square anchor, pixels.
        ratios: height over width; all anchors have the area of the square.
        rounded: round the corners to whole pixels.

    Returns:
        ``(R, 4)`` float64.
    """
    roots = torch.tensor(ratios, dtype=torch.float64).sqrt()
    corners = torch.stack([size / roots, size * roots], dim=1) / 2  # (R, 2) half width, height
    if rounded:
        corners = corners.round()
    return torch.cat([-corners, corners], dim=1)


def shape_anchors(sizes: Sequence[float], ratios: Sequence[float], rounded: bool) -> Tensor:
    """Give the anchors of one grid point in several sizes: ratio after ratio, sizes within.

    Args:
        sizes: sides of the square anchors, pixels.
        ratios: as in `cell_anchors`.
        rounded: as in `cell_anchors`.

    Returns:
        ``(R * sizes, 4)`` float64, in torchvision's order.
    """
    by_size = [cell_anchors(size, ratios, rounded) for size in sizes]
    return torch.stack(by_size, dim=1).flatten(0, 1)


def pyramid_anchors(
    features: Sequence[Tensor],
    strides: Sequence[int],
    canvas_size: tuple[int, int],
    cells: Tensor,
    from_canvas: bool,
) -> Tensor:
    """Give the anchors of a pyramid's features, ``(A, 4)``; the rest as in the functions below."""
    sizes = [(level.shape[2], level.shape[3]) for level in features]
    return grid_anchors(sizes, grid_spacings(sizes, strides, canvas_size, from_canvas), cells)


def grid_spacings(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    canvas_size: tuple[int, int],
    from_canvas: bool,
) -> list[tuple[int, int]]:
    """Give the distance of grid points down and across, pixels, for each level.

    Args:
        feature_sizes: height, width of each level.
        strides: nominal, of each level.
        canvas_size: height, width of the images.
        from_canvas: canvas size // feature size, not the stride (see ``Conventions``).
    """
    if not from_canvas:
        return [(stride, stride) for stride in strides]
    return [(canvas_size[0] // height, canvas_size[1] // width) for height, width in feature_sizes]


def within_border(anchors: Tensor, image_sizes: Tensor, border: int) -> Tensor:
    """Return which anchors reach at most this many pixels beyond their image: ``(B, A)`` bool.

    Args:
        anchors: ``(A, 4)``.
        image_sizes: ``(B, 2)`` height, width of each image, which is smaller than its canvas.
        border: pixels.
    """
    limits = image_sizes.flip(1)[:, None].to(anchors.dtype) + border  # (B, 1, 2) x, y
    is_within = (anchors[:, :2] >= -border).all(-1) & (anchors[:, 2:] <= limits).all(-1)
    return is_within


def grid_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[tuple[int, int]],
    cells: Tensor,
) -> Tensor:
    """Repeat each level's anchors at every point of its grid; the first point is the origin.

    Args:
        feature_sizes: height, width of each level.
        strides: distance of grid points down and across, pixels, for each level.
        cells: ``(L, R, 4)`` anchors of one point, for each level.

    Returns:
        ``(A, 4)``: level after level, row after row, all shapes of a point together; on the device
        and in the type of ``cells``.
    """
    levels = []
    for (height, width), (stride_y, stride_x), cell in zip(
        feature_sizes, strides, cells, strict=True
    ):
        ys = torch.arange(height, device=cells.device, dtype=cells.dtype) * stride_y
        xs = torch.arange(width, device=cells.device, dtype=cells.dtype) * stride_x
        points = torch.stack(
            [xs.expand(height, width), ys[:, None].expand(height, width)], dim=-1
        ).repeat(1, 1, 2)  # (height, width, 4) x, y, x, y
        levels.append((points[:, :, None] + cell).view(-1, 4))
    return torch.cat(levels)
