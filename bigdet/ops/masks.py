"""Masks of objects: training targets from cropped bitmaps, and predictions at image size."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdet.structures import Masks


def sample_masks(masks: Masks, objects: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """Read objects' bitmaps on a grid over boxes.

    Each grid point is the center of its bin; the bitmap is interpolated bilinearly between the
    centers of its pixels and is 0 outside the crop.

    Args:
        masks: the objects' cropped bitmaps.
        objects: ``(N,)`` int64, the object of each box.
        boxes: ``(N, 4)`` pixels of the canvas.
        output_size: points along a side of the grid, P.

    Returns:
        ``(N, P, P)`` in the type of ``boxes``, in [0, 1].
    """
    # One 0 more, so that everything outside a crop has a place to read from.
    bits = torch.nn.functional.pad(masks.bits, (0, 1))
    outside = len(masks.bits)
    sizes, origins = masks.sizes[objects], masks.origins[objects]
    columns, in_columns, column_weights = _neighbors(
        boxes[:, 0], boxes[:, 2], origins[:, 0], sizes[:, 1], output_size
    )
    lines, in_lines, line_weights = _neighbors(
        boxes[:, 1], boxes[:, 3], origins[:, 1], sizes[:, 0], output_size
    )
    lines = masks.offsets[objects][:, None, None] + lines * sizes[:, 1, None, None]  # (N, P, 2)
    index = lines[:, :, None, :, None] + columns[:, None, :, None, :]  # (N, P, P, 2, 2)
    is_inside = in_lines[:, :, None, :, None] & in_columns[:, None, :, None, :]
    values = bits[torch.where(is_inside, index, outside)].to(boxes.dtype)
    values = (values * column_weights[:, None, :, None, :]).sum(dim=-1)
    return (values * line_weights[:, :, None, :]).sum(dim=-1)


def _neighbors(
    starts: Tensor, ends: Tensor, origins: Tensor, limits: Tensor, output_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the two pixels along one axis around each grid point: place, inside or not, weight.

    Args:
        starts: ``(N,)`` where the boxes begin.
        ends: ``(N,)`` where they end.
        origins: ``(N,)`` int64, first pixel of the crops.
        limits: ``(N,)`` int64, pixels of the crops.
        output_size: P.

    Returns:
        Three tensors ``(N, P, 2)``: int64 pixel of the crop, bool, weight in [0, 1].
    """
    steps = torch.arange(output_size, device=starts.device, dtype=starts.dtype) + 0.5
    points = starts[:, None] + steps * ((ends - starts) / output_size)[:, None]
    points = points - origins[:, None] - 0.5  # from continuous edges to pixel centers
    low = points.floor()
    part = points - low
    pixels = torch.stack([low, low + 1], dim=-1).long()
    is_inside = (pixels >= 0) & (pixels < limits[:, None, None])
    return pixels, is_inside, torch.stack([1 - part, part], dim=-1)


def paste_mask(
    prob: Tensor, box: Tensor, height: int, width: int, threshold: float = 0.5
) -> Tensor:
    """Draw one predicted mask at the size of its image.

    Pixels whose center lies outside the box are never set: there the interpolation with the zeros
    around the grid stays below one half.

    Args:
        prob: ``(P, P)`` probabilities on a grid over the box.
        box: ``(4,)`` pixels of the image.
        height: of the image.
        width: of the image.
        threshold: pixels with at least this probability belong to the object.

    Returns:
        ``(height, width)`` bool.
    """
    mask = torch.zeros(height, width, dtype=torch.bool, device=prob.device)
    x0, y0, x1, y1 = box.tolist()
    left, right = max(round(x0), 0), min(round(x1), width)
    top, bottom = max(round(y0), 0), min(round(y1), height)
    if right <= left or bottom <= top:
        return mask
    lines = _hats(top, bottom, y0, y1, prob)
    columns = _hats(left, right, x0, x1, prob)
    mask[top:bottom, left:right] = lines @ prob @ columns.T >= threshold
    return mask


def _hats(first: int, end: int, start: float, stop: float, prob: Tensor) -> Tensor:
    """Give the weights ``(end - first, P)`` of the grid's points in each pixel along one axis."""
    size = prob.shape[-1]
    centers = torch.arange(first, end, device=prob.device, dtype=prob.dtype) + 0.5
    places = (centers - start) * (size / (stop - start)) - 0.5
    points = torch.arange(size, device=prob.device, dtype=prob.dtype)
    return (1 - (places[:, None] - points).abs()).clamp(min=0)
