"""Non-maximum suppression of many groups of boxes (image and level, or image and class) at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import nms

from bigdet.ops.boxes import pairwise_iou

GroupedNms = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""`grouped_nms` and what replaces it."""


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float
) -> Tensor:
    """Return which boxes no better box of the same group overlaps by more than ``iou``.

    Args:
        boxes: ``(N, 4)`` finite.
        scores: ``(N,)``; ``-inf`` leaves a box out: it is neither kept nor drops others.
        groups: ``(N,)`` int64 in ``0..num_groups-1``; boxes of different groups never meet.
        num_groups: how many groups there may be.
        iou: overlap in [0, 1] above which the lower score is dropped.

    Returns:
        ``(N,)`` bool, True for a box that is kept.
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
    """The same as ``grouped_nms`` in a single call, with one wait for the device.

    Groups lie side by side, too far apart to overlap. In fp64: shifted by some 100 groups, fp32
    would move edges by hundredths of a pixel, and what is kept would depend on the other images.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    boxes, scores = boxes.double(), scores.double()
    shifts = groups.to(boxes.dtype) * (boxes.max() - boxes.min() + 1)
    kept.index_fill_(0, nms(boxes + shifts[:, None], scores, iou), True)
    # What is left out comes last, by its score, so it drops nothing that is kept.
    return kept & (scores > -torch.inf)


def spread_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float
) -> Tensor:
    """The same as ``grouped_nms`` with shapes that do not depend on values, as an export needs.

    ONNX has NMS in fp32 alone. Groups lie on a square around the origin, so that 80 of them on a
    canvas of 1344 pixels cost a corner at most 1/4000 of a pixel.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    side = math.ceil(math.sqrt(num_groups))
    places = torch.stack([groups % side, groups // side], dim=1) - side / 2  # (N, 2) x, y
    shifts = (places * (boxes.max() - boxes.min() + 1)).to(boxes.dtype)
    chosen = nms(boxes + shifts.repeat(1, 2), scores, iou)
    return kept.index_fill(0, chosen, True) & (scores > -torch.inf)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    num_groups: int,
    kind: Literal["linear", "gaussian"],
    iou: float,
    sigma: float,
    limit: int,
) -> Tensor:
    """Lower the scores of boxes by their overlap with better ones of the same group.

    Bodla et al., *Soft-NMS* (2017): the box of the highest score is taken, the scores of those left
    are multiplied by a function of their overlap with it, and so on. Of equal scores the first box
    is taken.

    Args:
        boxes: ``(N, 4)`` finite.
        scores: ``(N,)`` 0 or above; ``-inf`` leaves a box out.
        groups: ``(N,)`` int64 in ``0..num_groups-1``; boxes of different groups never meet.
        num_groups: how many groups there may be.
        kind: ``linear``: times 1 - overlap, from ``iou`` on; ``gaussian``: times
            exp(-overlap^2 / sigma).
        iou: overlap in [0, 1].
        sigma: above 0.
        limit: the best of each group to take. Scores fall, so that no other box of the group is
            better.

    Returns:
        ``(N,)`` the new scores; ``-inf`` for boxes that were not taken.
    """
    rows = (scores > -torch.inf).nonzero().squeeze(1)
    lowered = torch.full_like(scores, -torch.inf)
    if not len(rows):
        return lowered
    # A line for each group that has a box, filled up with boxes that are never taken.
    rows = rows[groups[rows].argsort(stable=True)]
    counts = torch.bincount(groups[rows], minlength=num_groups)
    counts = counts[counts > 0]
    places = torch.arange(int(counts.max()), device=rows.device)
    is_filled = places < counts[:, None]  # (G, M)
    table = torch.zeros_like(is_filled, dtype=torch.int64).masked_scatter_(is_filled, rows)
    left = torch.where(is_filled, scores[table], -torch.inf)
    candidates = boxes[table]  # (G, M, 4)
    for _ in range(min(limit, len(places))):
        best, place = left.max(dim=1, keepdim=True)  # the first of equal ones
        taken = table.gather(1, place)[best > -torch.inf]
        lowered[taken] = best[best > -torch.inf]
        left.scatter_(1, place, -torch.inf)
        chosen = candidates.gather(1, place[..., None].expand(-1, -1, 4))
        overlap = pairwise_iou(chosen, candidates).squeeze(1)
        if kind == "linear":
            factor = torch.where(overlap >= iou, 1 - overlap, 1)
        else:
            factor = torch.exp(-overlap.square() / sigma)
        left = torch.where(left > -torch.inf, left * factor, -torch.inf)
    return lowered


def best_of_groups(scores: Tensor, groups: Tensor, num_groups: int, limit: int) -> Tensor:
    """Give the rows of the best scores of each group.

    Args:
        scores: ``(N,)``.
        groups: ``(N,)`` int64 in ``0..num_groups-1``.
        num_groups: how many groups there may be.
        limit: rows of each group, at most.

    Returns:
        ``(n,)`` int64, group after group, best first within a group.
    """
    rows = scores.argsort(descending=True, stable=True)
    rows = rows[groups[rows].argsort(stable=True)]
    counts = torch.bincount(groups, minlength=num_groups)
    places = torch.arange(len(rows), device=rows.device)
    places -= (counts.cumsum(0) - counts)[groups[rows]]  # place within the group
    return rows[places < limit]
