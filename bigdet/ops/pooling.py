"""RoIAlign (He et al., Mask R-CNN, section 3) over all pyramid levels and images in one gather.

Every output bin is a weighted sum of feature vectors: by default 16, of 2 x 2 sampling points with
4 neighbors each. With the features of all levels and images as rows of one table, that is one
embedding bag, which is parallel and reads whole rows; torchvision's CPU kernel is neither (1024
regions, 7x7, 256 channels, 2 threads: 0.35 s forward and 1.0 s backward, against 0.08 and 0.1 to
0.2 s). Nothing here waits for a device, except adaptive sampling: its bins have different numbers
of points, so it is left to torchvision's kernel, level by level.

Letters: N regions, P output side, n sampling points of a bin a side, S = nP sampling points of a
region a side, T table rows, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import register_dataclass
from torchvision.ops import roi_align as torchvision_roi_align

from bigdet.ops.boxes import box_areas

SAMPLING_RATIO = 2  # of Detectron and torchvision
CANONICAL_SIDE = 224  # a region of this side, pixels ...
CANONICAL_LEVEL = 4  # ... is pooled from this level (Lin et al., FPN, equation 1)


@dataclass(frozen=True)
class FeatureTable:
    """The feature vectors of all levels and images as rows of one matrix.

    Attributes:
        rows: ``(T, C)``, level after level, image after image, row after row.
        levels: ``(L, 4)`` int64 height, width, stride and first row of each level.
        strides: pixels per cell of each level, rising by factors of 2.
        facts: ``levels`` as the host knows it.
    """

    rows: Tensor
    levels: Tensor
    strides: list[int]
    facts: list[tuple[int, int, int, int]]


register_dataclass(FeatureTable)


def tabulate(features: Sequence[Tensor], strides: Sequence[int]) -> FeatureTable:
    """Arrange the levels of a pyramid as a table.

    Args:
        features: L tensors ``(B, C, h, w)``, best in channels_last memory.
        strides: pixels per cell of each.
    """
    channels = features[0].shape[1]
    rows = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in features])
    facts, first_row = [], 0
    for level, stride in zip(features, strides, strict=True):
        facts.append((level.shape[2], level.shape[3], stride, first_row))
        first_row += level.numel() // channels
    # Filled in on the device: copying a list there would make the host wait.
    filled = [
        torch.full((), fact, device=rows.device, dtype=torch.int64)
        for of_level in facts
        for fact in of_level
    ]
    return FeatureTable(rows, torch.stack(filled).view(-1, 4), list(strides), facts)


def pyramid_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Choose the level that each region is pooled from, by its area (FPN, equation 1).

    Args:
        boxes: ``(N, 4)``.
        strides: pixels per cell of the levels, rising by factors of 2.

    Returns:
        ``(N,)`` int64 in ``0..L-1``.
    """
    sides = box_areas(boxes).clamp(min=0).sqrt()
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SIDE + 1e-6)).long()
    lowest = strides[0].bit_length() - 1
    return (levels - lowest).clamp(0, len(strides) - 1)


def roi_align(
    table: FeatureTable,
    boxes: Tensor,
    images: Tensor,
    output_size: int,
    aligned: bool = True,
    sampling_ratio: int = SAMPLING_RATIO,
) -> Tensor:
    """Pool a fixed grid of features from each region.

    Args:
        table: the features.
        boxes: ``(N, 4)`` regions, pixels of the canvas.
        images: ``(N,)`` int64, the image of each region.
        output_size: P.
        aligned: continuous coordinates (the center of the first cell is at 0.5), or torchvision's
            and Detectron's older convention without the half-pixel shift.
        sampling_ratio: points a side in each bin, n. 0: as many as the bin has cells, rounded up.

    Returns:
        ``(N, C, P, P)`` in channels_last memory. Sampling points more than a cell outside the
        features are 0, nearer ones take the border's value.
    """
    if sampling_ratio == 0:
        return _adaptive_roi_align(table, boxes, images, output_size, aligned)
    index, weights = _bins(table, boxes, images, output_size, aligned, sampling_ratio)
    bins: Tensor = _WeightedBags.apply(
        table.rows, index, weights.to(table.rows.dtype)
    )  # (N * P * P, C)
    channels = table.rows.shape[1]
    return bins.view(len(boxes), output_size, output_size, channels).permute(0, 3, 1, 2)


def _adaptive_roi_align(
    table: FeatureTable, boxes: Tensor, images: Tensor, output_size: int, aligned: bool
) -> Tensor:
    """Pool with a number of points that follows from each region; see `roi_align`."""
    channels = table.rows.shape[1]
    regions = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)  # (N, 5)
    levels = pyramid_levels(boxes, table.strides)
    ends = [*(first_row for *_, first_row in table.facts[1:]), len(table.rows)]
    pooled = boxes.new_zeros(len(boxes), channels, output_size, output_size)
    for number, ((height, width, stride, first_row), end) in enumerate(
        zip(table.facts, ends, strict=True)
    ):
        chosen = (levels == number).nonzero().squeeze(1)
        cells = table.rows[first_row:end].view(-1, height, width, channels).permute(0, 3, 1, 2)
        part = torchvision_roi_align(
            cells.to(boxes.dtype), regions[chosen], output_size, 1 / stride, 0, aligned
        )
        pooled = pooled.index_put((chosen,), part)
    pooled = pooled.to(table.rows.dtype)
    return pooled.contiguous(memory_format=torch.channels_last)


class _WeightedBags(torch.autograd.Function):
    """Weighted sums of table rows, differentiable in the rows.

    The gradient is the same operation with bins and rows exchanged, after one sort. torch's own
    backward of an embedding bag takes twice as long on a CPU and adds up in the type of the
    gradient: in bfloat16 with errors ten times those of the rounding.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Sum ``weights[i, j] * rows[index[i, j]]`` over j: ``(T, C)`` to ``(bins, C)``."""
        ctx.save_for_backward(index, weights)
        ctx.num_rows = len(rows)
        return functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Give each row the weighted sum of the gradients of the bins that took it."""
        index, weights = ctx.saved_tensors
        taken, order = index.view(-1).int().sort(stable=True)  # half the time of int64
        rows = torch.arange(ctx.num_rows + 1, device=grad.device, dtype=taken.dtype)
        grad_rows = functional.embedding_bag(
            order // index.shape[1],
            grad.contiguous(),
            torch.searchsorted(taken, rows),
            mode="sum",
            per_sample_weights=weights.view(-1)[order],
            include_last_offset=True,
        )
        return grad_rows, None, None


@torch.no_grad()
def _bins(
    table: FeatureTable,
    boxes: Tensor,
    images: Tensor,
    output_size: int,
    aligned: bool,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Give the table rows and weights of every output bin: both ``(N * P * P, 4 * n * n)``."""
    levels = table.levels[pyramid_levels(boxes, table.strides)]  # (N, 4)
    heights, widths, strides, first_rows = levels.unbind(dim=1)
    first_rows = first_rows + images * heights * widths
    scaled = boxes / strides[:, None] - (0.5 if aligned else 0.0)
    starts, sides = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    columns, column_weights = _axis(starts[:, 0], sides[:, 0], widths, output_size, sampling_ratio)
    lines, line_weights = _axis(starts[:, 1], sides[:, 1], heights, output_size, sampling_ratio)
    lines = first_rows[:, None, None] + lines * widths[:, None, None]  # (N, P, 2n)
    index = lines[:, :, None, :, None] + columns[:, None, :, None, :]  # (N, P, P, 2n, 2n)
    weights = line_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    size = index.shape[3] * index.shape[4]
    return index.view(-1, size), weights.view(-1, size)


def _axis(
    starts: Tensor, sides: Tensor, limits: Tensor, output_size: int, sampling_ratio: int
) -> tuple[Tensor, Tensor]:
    """Give the cells along one axis that each bin takes, and their weights: both ``(N, P, 2n)``.

    Args:
        starts: ``(N,)`` where the regions begin, cells.
        sides: ``(N,)`` how long they are, cells.
        limits: ``(N,)`` int64, how many cells there are.
        output_size: P.
        sampling_ratio: points in a bin, n.
    """
    num_points = output_size * sampling_ratio
    steps = torch.arange(num_points, device=starts.device, dtype=starts.dtype) + 0.5
    points = starts[:, None] + steps * (sides / num_points)[:, None]  # (N, S)
    last = (limits - 1)[:, None]
    is_inside = (points >= -1) & (points <= limits[:, None])
    points = points.clamp(min=0)
    low = torch.minimum(points.floor().long(), last)
    high = torch.minimum(low + 1, last)
    part = torch.where(low < last, points - low, 0.0)
    share = is_inside.to(points.dtype) / sampling_ratio
    weights = torch.stack([(1 - part) * share, part * share], dim=-1)
    cells = torch.stack([low, high], dim=-1)  # (N, S, 2)
    size = 2 * sampling_ratio
    return cells.view(-1, output_size, size), weights.view(-1, output_size, size)
