"""Non-maximum suppression of many groups of boxes (image and level, or image and class) at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


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
        # One call (and one wait) for all: groups lie side by side, too far apart to overlap, and
        # what is left out has no area, so that it overlaps nothing.
        shifts = groups.to(boxes) * (boxes.max() - boxes.min() + 1)
        apart = (boxes + shifts[:, None]) * is_candidate[:, None]
        kept[nms(apart, scores, iou)] = True
        return kept & is_candidate
    # On a CPU the cost grows with the square of the number of boxes in one call.
    groups = torch.where(is_candidate, groups, num_groups)
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups, minlength=num_groups + 1)[:num_groups]
    for rows in torch.split(order[: int(counts.sum())], counts.tolist()):
        if len(rows):
            kept[rows[nms(boxes[rows], scores[rows], iou)]] = True
    return kept
