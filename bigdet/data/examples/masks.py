"""Stored segmentations, polygons or RLE, to bitmaps, each within the crop of its object.

A pixel belongs to a mask if its center does. All polygons of an image are rasterized together: one
object at a time would cost more in calls than in work.

Letters: L polygons, P corners of all of them, E edges, T crossings of edges with columns of pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Bitmap = NDArray[np.uint8]

_WORD = 8  # bytes; rows of crops are padded to this, and combined in words of it


def rasterize_polygons(
    corners: NDArray[np.float64], num_corners: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[Bitmap]:
    """Return which pixels of its crop each polygon covers.

    A polygon that crosses itself covers what it goes around an odd number of times. What is outside
    the crop is cut off.

    Args:
        corners: ``(P, 2)`` x, y in pixels relative to the polygon's crop, polygon after polygon.
        num_corners: ``(L,)``, at least 1 each.
        sizes: ``(L, 2)`` height and width of the crops, at least 1.

    Returns:
        L bitmaps ``(height, width)`` uint8, 0 or 1.
    """
    strides = -(-sizes[:, 1] // _WORD) * _WORD
    num_bytes = (sizes[:, 0] + 1) * strides  # a row below the crop takes the crossings below it
    starts = np.cumsum(num_bytes) - num_bytes
    flips = np.zeros(int(num_bytes.sum()), dtype=np.uint8)
    layer, column, row = _crossings(corners, num_corners, sizes)
    np.add.at(flips, starts[layer] + row * strides[layer] + column, np.uint8(1))
    flips &= 1
    masks: list[Bitmap] = []
    for (height, width), start, stride in zip(
        sizes.tolist(), starts.tolist(), strides.tolist(), strict=True
    ):
        # Down a column a pixel is inside after an odd number of crossings; 8 columns at a time.
        rows = flips[start : start + (height + 1) * stride].view(np.uint64).reshape(height + 1, -1)
        np.bitwise_xor.accumulate(rows, axis=0, out=rows)
        masks.append(rows.view(np.uint8)[:height, :width])
    return masks


def _crossings(
    corners: NDArray[np.float64], num_corners: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return where the polygons' edges cross the center lines of columns of pixels.

    Returns:
        ``(T,)`` each: number of the polygon; column; the first row whose center is not above the
        crossing, ``0..height``.
    """
    layer = np.repeat(np.arange(len(num_corners)), num_corners)  # (P,)
    following = np.arange(1, len(corners) + 1)
    ends = np.cumsum(num_corners)
    following[ends - 1] = ends - num_corners  # the last corner is joined to the first
    # The first column whose center is not left of the corner, cut off at the sides of the crop.
    first = np.ceil(corners[:, 0] - 0.5).astype(np.int64).clip(0, sizes[layer, 1])
    steps = first[following] - first
    edges = np.flatnonzero(steps)  # (E,): most edges of a fine outline cross no center line
    start, end, layer = corners[edges], corners[following[edges]], layer[edges]
    counts = np.abs(steps[edges])
    low = np.minimum(first[edges], first[following[edges]])
    slopes = (end[:, 1] - start[:, 1]) / (end[:, 0] - start[:, 0])
    # Where an edge crosses the center of column 0.
    heights = start[:, 1] + (0.5 - start[:, 0]) * slopes
    edge = np.repeat(np.arange(len(edges)), counts)  # (T,)
    column = np.arange(len(edge)) + (low - np.cumsum(counts) + counts)[edge]
    layer = layer[edge]
    y = heights[edge] + column * slopes[edge]
    row = np.ceil(y - 0.5).clip(0, sizes[layer, 0]).astype(np.int64)
    return layer, column, row


def sample_rle(
    segmentation: dict[str, Any], x: NDArray[np.float64], y: NDArray[np.float64]
) -> Bitmap:
    """Return the values of a run-length encoded mask at a grid of points.

    Args:
        segmentation: COCO's RLE, compressed or not.
        x: ``(width,)`` pixels of the stored mask.
        y: ``(height,)`` likewise.
    """
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    stored: Bitmap = coco_mask.decode(segmentation)  # (H, W)
    rows = y.astype(np.int64).clip(0, stored.shape[0] - 1)
    columns = x.astype(np.int64).clip(0, stored.shape[1] - 1)
    sampled: Bitmap = stored[rows][:, columns]
    return sampled
