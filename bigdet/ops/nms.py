"""Non-maximum suppression of many groups of boxes (image and level, or image and class) at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import nms

GroupedNms = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""`grouped_nms` and its stand-ins."""


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float
) -> Tensor:
    """Tell which boxes no better box of the same group overlaps by more than ``iou``.

    Args:
        boxes: ``(N, 4)`` finite.
        scores: ``(N,)``; ``-inf`` leaves a box out: it neither stays nor drops others.
        groups: ``(N,)`` int64 in ``0..num_groups-1``; boxes of different groups never meet.
        num_groups: how many groups there may be.
        iou: overlap in [0, 1] above which the lower score goes.

    Returns:
        ``(N,)`` bool, True for a box that stays.
    """
    is_candidate = scores > -torch.inf
    kept = torch.zeros_like(is_candidate)
    if len(boxes) == 0:
        return kept
    if boxes.is_cuda:
        return shifted_nms(boxes, scores, groups, iou)
    # On a CPU the cost grows with the square of the number of boxes in one call.
    groups = torch.where(is_candidate, groups, num_groups)
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups, minlength=num_groups + 1)[:num_groups]
    for rows in torch.split(order[: int(counts.sum())], counts.tolist()):
        if len(rows):
            kept.index_fill_(0, rows[nms(boxes[rows], scores[rows], iou)], True)
    return kept


def shifted_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Do what ``grouped_nms`` does in a single call, with one wait for the device.

    Groups lie side by side, too far apart to overlap. In fp64: shifted by some 100 groups, fp32
    would move edges by hundredths of a pixel, and what stays would depend on the other images.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    boxes, scores = boxes.double(), scores.double()
    shifts = groups.to(boxes.dtype) * (boxes.max() - boxes.min() + 1)
    kept.index_fill_(0, nms(boxes + shifts[:, None], scores, iou), True)
    # What is left out comes last, by its score, so it drops nothing that stays.
    return kept & (scores > -torch.inf)


def spread_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float
) -> Tensor:
    """Do what ``grouped_nms`` does with shapes that do not depend on values, as an export needs.

    ONNX has NMS in fp32 alone. Groups lie on a square around the origin, so that 80 of them on a
    canvas of 1344 pixels cost a corner at most 1/4000 of a pixel.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    side = math.ceil(math.sqrt(num_groups))
    places = torch.stack([groups % side, groups // side], dim=1) - side / 2  # (N, 2) x, y
    shifts = (places * (boxes.max() - boxes.min() + 1)).to(boxes.dtype)
    chosen = nms(boxes + shifts.repeat(1, 2), scores, iou)
    return kept.index_fill(0, chosen, True) & (scores > -torch.inf)


def best_of_groups(scores: Tensor, groups: Tensor, num_groups: int, limit: int) -> Tensor:
    """Give the rows of the best scores of each group.

    Args:
        scores: ``(N,)``.
        groups: ``(N,)`` int64 in ``0..num_groups-1``.
        num_groups: how many groups there may be.
        limit: at most so many rows of each group.

    Returns:
        ``(n,)`` int64, group after group, best first within a group.
    """
    rows = scores.argsort(descending=True, stable=True)
    rows = rows[groups[rows].argsort(stable=True)]
    counts = torch.bincount(groups, minlength=num_groups)
    places = torch.arange(len(rows), device=rows.device)
    places -= (counts.cumsum(0) - counts)[groups[rows]]  # place within the group
    return rows[places < limit]
