"""Non-maximum suppression of many groups of boxes (image and level, or image and class) at once."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import nms

from bigdet.ops.boxes import pairwise_iou

HAS_TRITON = importlib.util.find_spec("triton") is not None
BOXES_PER_CALL = 30_000  # torchvision's kernel has a mask of all pairs: 113 MB

GroupedNms = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""`grouped_nms` and what replaces it."""


def grouped_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    num_groups: int,
    iou: float,
    is_sorted: bool = False,
) -> Tensor:
    """Return which boxes no better box of the same group overlaps by more than ``iou``.

    On a GPU with Triton the host waits for nothing.

    Args:
        boxes: ``(N, 4)`` finite.
        scores: ``(N,)``; ``-inf`` leaves a box out: it is neither kept nor drops others.
        groups: ``(N,)`` int64 in ``0..num_groups-1``; boxes of different groups never meet.
        num_groups: how many groups there may be.
        iou: overlap in [0, 1] above which the lower score is dropped.
        is_sorted: they come group after group, best first within a group (but for ``-inf``).

    Returns:
        ``(N,)`` bool, True for a box that is kept.
    """
    if len(boxes) == 0:
        return scores > -torch.inf
    if not boxes.is_cuda:
        return _nms_in_calls(boxes, scores, groups, num_groups, iou, 1)
    if boxes.dtype == torch.float32 and HAS_TRITON:
        return kernel_nms(boxes, scores, groups, num_groups, iou, is_sorted)
    return _nms_in_calls(boxes, scores, groups, num_groups, iou, BOXES_PER_CALL)


def kernel_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float, is_sorted: bool
) -> Tensor:
    """The same as ``grouped_nms`` with Triton; see there."""
    from bigdet.ops.nms_kernel import suppress

    is_candidate = scores > -torch.inf
    if is_sorted:
        return suppress(boxes, is_candidate, _starts(groups, num_groups), iou)
    rows = _by_group(scores, groups)
    starts = _starts(groups[rows], num_groups)
    kept = suppress(boxes[rows], is_candidate[rows], starts, iou)
    return torch.empty_like(kept).index_copy_(0, rows, kept)


def _nms_in_calls(
    boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float, limit: int
) -> Tensor:
    """The same as ``grouped_nms`` in calls of torchvision's.

    The time of a call grows with the square of its boxes: each takes one group, or as many as
    ``limit`` boxes allow.
    """
    kept = torch.zeros_like(groups, dtype=torch.bool)
    groups = torch.where(scores > -torch.inf, groups, num_groups)
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups, minlength=num_groups + 1)[:num_groups].tolist()
    together = max(limit // max([*counts, 1]), 1)
    sizes = [sum(counts[first : first + together]) for first in range(0, num_groups, together)]
    for rows in torch.split(order[: sum(sizes)], sizes):
        if not len(rows):
            continue
        if together == 1:
            kept.index_fill_(0, rows[nms(boxes[rows], scores[rows], iou)], True)
        else:
            kept[rows] = shifted_nms(boxes[rows], scores[rows], groups[rows], iou)
    return kept


def shifted_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """The same as ``grouped_nms`` in a single call of torchvision's, for up to some 30,000 boxes.

    Groups lie next to each other, too far apart to overlap. In fp64: shifted by some 100 groups,
    fp32 would move edges by hundredths of a pixel, and what is kept would depend on other images.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    boxes, scores = boxes.double(), scores.double()
    shifts = groups.to(boxes.dtype) * (boxes.max() - boxes.min() + 1)
    kept.index_fill_(0, nms(boxes + shifts[:, None], scores, iou), True)
    # What is left out comes last, by its score, so it drops nothing that is kept.
    return kept & (scores > -torch.inf)


def _by_group(scores: Tensor, groups: Tensor) -> Tensor:
    """Give all rows group after group, best first, equal ones in their order."""
    rows = scores.argsort(descending=True, stable=True)
    return rows[groups[rows].argsort(stable=True)]


def _starts(groups: Tensor, num_groups: int) -> Tensor:
    """Give the first row of each of rising ``(N,)`` groups, and N: ``(num_groups + 1,)``."""
    return torch.searchsorted(groups, torch.arange(num_groups + 1, device=groups.device))


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
    """Give the rows of the best scores of each group: ``(n,)`` int64; see `first_of_groups`."""
    rows, is_first = first_of_groups(scores, groups, num_groups, limit)
    return rows[is_first]


def first_of_groups(
    scores: Tensor, groups: Tensor, num_groups: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Order rows by group and score.

    Args:
        scores: ``(N,)``.
        groups: ``(N,)`` int64 in ``0..num_groups-1``.
        num_groups: how many groups there may be.
        limit: rows of each group, at most.

    Returns:
        ``(N,)`` int64 rows, group after group, best first within a group; ``(N,)`` bool, whether a
        row is among the first ``limit`` of its group.
    """
    rows = _by_group(scores, groups)
    groups = groups[rows]
    places = torch.arange(len(rows), device=rows.device) - _starts(groups, num_groups)[groups]
    return rows, places < limit
