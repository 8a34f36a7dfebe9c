"""Boxes: areas, overlaps, clipping, deltas. The one place that knows the formats.

A box is xyxy in pixels of the padded canvas with continuous edges: its width is ``x1 - x0``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Detectron's bound on predicted log sizes: a box grows to at most 1000/16 times its anchor.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def box_areas(boxes: Tensor) -> Tensor:
    """Give the areas of ``(..., 4)`` boxes as ``(...)``, square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_intersections(first: Tensor, second: Tensor) -> Tensor:
    """Give the area that each box of one set shares with each of another.

    Args:
        first: ``(..., N, 4)``.
        second: ``(..., M, 4)``; leading dimensions broadcast.

    Returns:
        ``(..., N, M)`` square pixels.
    """
    x0, y0, x1, y1 = first.unsqueeze(-1).unbind(-2)  # (..., N, 1)
    # Contiguous coordinates: the large dimension is the last one of every operation below.
    u0, v0, u1, v1 = second.transpose(-1, -2).contiguous().unsqueeze(-2).unbind(-3)  # (..., 1, M)
    widths = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)
    heights = torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0)
    return widths.mul_(heights)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Give intersection over union of each box of one set with each of another.

    Args:
        first: ``(..., N, 4)``.
        second: ``(..., M, 4)``; leading dimensions broadcast.

    Returns:
        ``(..., N, M)`` in [0, 1]; 0 where both boxes are empty.
    """
    intersections = pairwise_intersections(first, second)
    unions = box_areas(first).unsqueeze(-1) + box_areas(second).unsqueeze(-2)
    unions.sub_(intersections)
    # A union of 0 means an intersection of 0; the bound only keeps 0/0 out.
    return intersections.div_(unions.clamp_(min=torch.finfo(unions.dtype).tiny))


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Cut boxes at the borders of their image.

    Args:
        boxes: ``(B, ..., 4)`` boxes of B images.
        image_sizes: ``(B, 2)`` height, width.

    Returns:
        ``(B, ..., 4)``; a box outside its image becomes empty.
    """
    bounds = image_sizes.flip(-1).repeat(1, 2).to(boxes.dtype)  # (B, 4) width, height twice
    bounds = bounds.view(-1, *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), bounds)


def scale_boxes(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Move boxes from an image to the same image at another size, and cut them at its borders.

    Args:
        boxes: ``(N, 4)`` pixels of the image at ``from_size``.
        from_size: height, width.
        to_size: height, width.

    Returns:
        ``(N, 4)`` pixels of the image at ``to_size``.
    """
    scale_y, scale_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    # Numbers of the host, and no tensors of them: a copy would make it wait for the device.
    columns = (boxes[:, 0::2] * scale_x).clamp(0, to_size[1])
    lines = (boxes[:, 1::2] * scale_y).clamp(0, to_size[0])
    return torch.stack([columns, lines], dim=2).flatten(1)


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Give the deltas that move and scale anchors onto boxes.

    Args:
        boxes: ``(..., 4)`` where to go.
        anchors: ``(..., 4)`` from where, of positive width and height.
        weights: factors of shifts and of scales, which bring them to a deviation of about 1.

    Returns:
        ``(..., 4)`` dx, dy in anchor widths and heights; dw, dh as log scales; all times
        ``weights``.
    """
    sizes, anchor_sizes = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centers, anchor_centers = boxes[..., :2] + sizes / 2, anchors[..., :2] + anchor_sizes / 2
    shifts = (centers - anchor_centers) / anchor_sizes * weights[0]
    scales = torch.log(sizes / anchor_sizes) * weights[1]
    return torch.cat([shifts, scales], dim=-1)


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Move and scale anchors by the deltas that a head predicts.

    Args:
        deltas: ``(..., 4)`` as ``encode_deltas`` gives them.
        anchors: ``(..., 4)``; leading dimensions broadcast.
        weights: those of ``encode_deltas``.

    Returns:
        ``(..., 4)`` boxes, not cut at the image. Scales stop at ``MAX_LOG_SCALE``.
    """
    shifts, scales = deltas[..., :2] / weights[0], deltas[..., 2:] / weights[1]
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    centers = anchors[..., :2] + anchor_sizes / 2 + shifts * anchor_sizes
    halves = torch.exp(scales.clamp(max=MAX_LOG_SCALE)) * anchor_sizes / 2
    return torch.cat([centers - halves, centers + halves], dim=-1)
