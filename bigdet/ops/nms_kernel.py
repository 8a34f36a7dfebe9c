"""Greedy suppression of many groups of boxes in one launch, for a GPU with Triton.

One program per group, in tiles of boxes: what is kept of a tile drops boxes of the tiles after it.
So memory grows with the number of boxes, not of pairs, and the host waits for nothing. Rounds as
torchvision does on a CPU: the same boxes are kept, ties and boxes without an area included.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton takes no other annotations.
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


@triton.jit
def _corners(boxes, rows, end):
    """Load the boxes of some rows; those from ``end`` on are 0."""
    is_inside = rows < end
    x0 = tl.load(boxes + 4 * rows, mask=is_inside, other=0.0)
    y0 = tl.load(boxes + 4 * rows + 1, mask=is_inside, other=0.0)
    x1 = tl.load(boxes + 4 * rows + 2, mask=is_inside, other=0.0)
    y1 = tl.load(boxes + 4 * rows + 3, mask=is_inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit
def _overlaps(x0, y0, x1, y1, boxes, rows, end, most):
    """Give whether boxes ``(T,)`` and those of some rows ``(T,)`` overlap too much: ``(T, T)``."""
    u0, v0, u1, v1 = _corners(boxes, rows, end)
    width = tl.minimum(x1[:, None], u1[None, :]) - tl.maximum(x0[:, None], u0[None, :])
    height = tl.minimum(y1[:, None], v1[None, :]) - tl.maximum(y0[:, None], v0[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    union = ((x1 - x0) * (y1 - y0))[:, None] + ((u1 - u0) * (v1 - v0))[None, :] - shared
    return tl.div_rn(shared, union) > most  # 0 / 0 is not a number, which is not above it


@triton.jit
def _suppress(boxes, starts, kept, most, tile: tl.constexpr):
    """Clear in ``kept`` what a better box of the same group overlaps by more than ``most``."""
    first = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    places = tl.arange(0, tile)
    for top in range(first, end, tile):
        rows = top + places
        x0, y0, x1, y1 = _corners(boxes, rows, end)
        is_candidate = tl.load(kept + rows, mask=rows < end, other=0).to(tl.int32)
        overlaps = _overlaps(x0, y0, x1, y1, boxes, rows, end, most)
        drops = (overlaps & (places[:, None] < places[None, :])).to(tl.int32)
        # Whether a box is kept depends on those before it only, so the rule is applied until
        # nothing changes: as often as the longest chain of boxes that drop and spare each other.
        is_kept, num_changed = is_candidate, 1
        while num_changed > 0:
            now = is_candidate * (1 - tl.max(drops * is_kept[:, None], axis=0))
            num_changed = tl.sum(tl.abs(now - is_kept), axis=0)
            is_kept = now
        tl.store(kept + rows, is_kept.to(tl.int8), mask=rows < end)
        for left in range(top + tile, end, tile):
            others = left + places
            overlaps = _overlaps(x0, y0, x1, y1, boxes, others, end, most)
            is_dropped = tl.max(overlaps.to(tl.int32) * is_kept[:, None], axis=0)
            tl.store(kept + others, 0, mask=(others < end) & (is_dropped > 0))
        tl.debug_barrier()  # the next tile reads what other threads have cleared


def suppress(boxes: Tensor, is_candidate: Tensor, starts: Tensor, iou: float) -> Tensor:
    """Return which boxes no better box of the same group overlaps by more than ``iou``.

    Args:
        boxes: ``(N, 4)`` float32, group after group, best first within a group.
        is_candidate: ``(N,)`` bool; other boxes are neither kept nor drop any.
        starts: ``(G + 1,)`` int64: group g has rows ``starts[g]:starts[g + 1]``.
        iou: overlap in [0, 1].

    Returns:
        ``(N,)`` bool.
    """
    assert boxes.dtype == torch.float32, boxes.dtype
    # torchvision compares in fp64. The next fp32 number below gives the same answers.
    most = np.float32(iou)
    if float(most) > iou:
        most = np.nextafter(most, np.float32(-1))
    kept = is_candidate.to(torch.int8)
    _suppress[(len(starts) - 1,)](
        boxes.contiguous(), starts, kept, float(most), tile=TILE, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return kept.bool()
