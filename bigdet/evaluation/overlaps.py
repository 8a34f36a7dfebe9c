"""Overlaps of detections and objects: IoU of boxes and masks, OKS of keypoints.

The numbers are those of pycocotools to the last bit: the same operations in the same order.

Letters: N detections, M objects, Q pairs of a detection and an object on the same image, P
keypoints.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.evaluation.detections import DetectionTable, Kind
from bigdet.evaluation.ground_truth import GroundTruth

COCO_SIGMAS = np.array(
    [.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89]
) / 10.0  # fmt: skip
"""Deviation of annotators at each of COCO's 17 keypoints, relative to the object's size."""
OTHER_SIGMA = 0.05
"""The same for other keypoints, for which it has not been measured."""

_ROUNDING = 1 - 1e-9

Index = NDArray[np.int64]


def detection_areas(found: DetectionTable, kind: Kind) -> NDArray[np.float64]:
    """Return the area of each detection's box, mask or keypoints, ``(N,)``, pixels."""
    if found.areas is not None:
        return found.areas
    if kind == "segm":
        return found.mask_areas
    if kind == "bbox":
        return found.boxes[:, 2] * found.boxes[:, 3]
    points = found.keypoints[:, :, :2]
    width, height = (points.max(axis=1) - points.min(axis=1)).T
    areas: NDArray[np.float64] = width * height
    return areas


def pair_up(images: Index, truth_images: Index) -> tuple[Index, Index]:
    """Return all pairs of a detection and an object on the same image.

    Args:
        images: ``(N,)`` of the detections, rising.
        truth_images: ``(M,)`` of the objects, rising.

    Returns:
        Indices of detections and of objects, ``(Q,)`` each, by detection, then by object.
    """
    is_first = np.diff(images, prepend=-1) != 0
    bounds = np.searchsorted(truth_images, [images[is_first], images[is_first] + 1])
    first, end = bounds[:, np.cumsum(is_first) - 1]
    count = end - first
    detections = np.repeat(np.arange(len(images)), count)
    within = np.arange(len(detections)) - np.repeat(np.cumsum(count) - count, count)
    return detections, np.repeat(first, count) + within


def overlaps(
    kind: Kind,
    truth: GroundTruth,
    found: DetectionTable,
    detections: Index,
    objects: Index,
    at_least: float,
) -> NDArray[np.float64]:
    """Return the overlap of each pair, in [0, 1]; with a crowd, the detection's part inside it.

    Args:
        kind: boxes, masks or keypoints.
        truth: the objects.
        found: the detections.
        detections: ``(Q,)`` rows of ``found``; pairs of one image are adjacent.
        objects: ``(Q,)`` rows of ``truth``.
        at_least: smaller overlaps may be returned as 0, to save work.
    """
    if kind == "bbox":
        is_crowd = truth.is_crowd[objects]
        return box_overlaps(found.boxes[detections], truth.boxes[objects], is_crowd)
    if kind == "keypoints":
        return _point_overlaps(truth, found.keypoints[detections, :, :2], objects)
    return _mask_overlaps(truth, found, detections, objects, at_least)


def box_overlaps(
    boxes: NDArray[np.float64], others: NDArray[np.float64], is_crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the IoU of pairs of boxes, ``(Q,)``; both are ``(Q, 4)`` xywh."""
    x, y, width, height = boxes.T
    other_x, other_y, other_width, other_height = others.T
    columns = np.minimum(width + x, other_width + other_x) - np.maximum(x, other_x)
    rows = np.minimum(height + y, other_height + other_y) - np.maximum(y, other_y)
    shared = columns * rows
    area = width * height
    union = np.where(is_crowd, area, area + other_width * other_height - shared)
    meets = (columns > 0) & (rows > 0)
    ious: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(union), where=meets)
    return ious


def _mask_overlaps(
    truth: GroundTruth, found: DetectionTable, detections: Index, objects: Index, at_least: float
) -> NDArray[np.float64]:
    """Return the IoU of pairs of masks, ``(Q,)``.

    An IoU is at most the smaller area divided by the larger one, which rules out many pairs.
    """
    is_crowd = truth.is_crowd | ~truth.has_mask
    area, other_area = found.mask_areas[detections], truth.mask_areas[objects]
    smaller, larger = np.minimum(area, other_area), np.maximum(area, other_area)
    is_near = (smaller > 0) & (is_crowd[objects] | (smaller >= at_least * _ROUNDING * larger))
    ious = np.zeros(len(detections))
    near = np.flatnonzero(is_near)
    if not len(near):
        return ious
    ious[near] = _table_entries(truth, found, detections[near], objects[near], is_crowd)
    return ious


def _table_entries(
    truth: GroundTruth,
    found: DetectionTable,
    detections: Index,
    objects: Index,
    is_crowd: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return the IoU of pairs of masks, ``(Q,)``, from a table for each run of pairs of one image.

    Args:
        truth: the objects.
        found: the detections.
        detections: ``(Q,)`` rows of ``found``.
        objects: ``(Q,)`` rows of ``truth``.
        is_crowd: which of all objects are crowds.
    """
    images = found.images[detections]
    table = np.cumsum(np.diff(images, prepend=images[0]) != 0)  # (Q,)
    is_first = np.diff(detections, prepend=-1) != 0
    row, rows = np.cumsum(is_first) - 1, detections[is_first]
    unique, column = np.unique(table * len(is_crowd) + objects, return_inverse=True)
    columns = unique % len(is_crowd)
    starts = np.searchsorted(table, np.arange(table[-1] + 1))
    tops, lefts = row[starts], np.searchsorted(unique, np.arange(table[-1] + 1) * len(is_crowd))
    ours = [found.masks[place] for place in rows.tolist()]
    theirs = [truth.masks[place] for place in columns.tolist()]
    crowds = is_crowd[columns].astype(np.uint8)
    bottoms, rights = np.append(tops[1:], len(rows)), np.append(lefts[1:], len(columns))
    bounds = (bound.tolist() for bound in (tops, bottoms, lefts, rights))
    sizes = truth.sizes[images[starts]].tolist()
    tables = [
        coco_mask.iou(
            [{"size": size, "counts": counts} for counts in ours[top:bottom]],
            [{"size": size, "counts": counts} for counts in theirs[left:right]],
            crowds[left:right],
        ).T.ravel()  # column by column, as it is in memory
        for size, top, bottom, left, right in zip(sizes, *bounds, strict=True)
    ]
    heights = bottoms - tops
    areas = heights * (rights - lefts)
    place = (np.cumsum(areas) - areas)[table]
    place += (column - lefts[table]) * heights[table] + row - tops[table]
    entries: NDArray[np.float64] = np.concatenate(tables)[place]
    return entries


def _point_overlaps(
    truth: GroundTruth, points: NDArray[np.float64], objects: Index
) -> NDArray[np.float64]:
    """Return the object keypoint similarity of pairs, ``(Q,)``.

    For an object without labeled keypoints: how near the points are to its box, doubled in size.

    Args:
        truth: the objects.
        points: ``(Q, P, 2)`` x, y of the detections.
        objects: ``(Q,)`` rows of ``truth``.
    """
    wanted = truth.keypoints[objects]
    labeled = wanted[:, :, 2] > 0  # (Q, P)
    x, y, width, height = truth.boxes[objects].T[:, :, None]
    zero = np.zeros(points.shape[:2])
    across, down = points[:, :, 0], points[:, :, 1]
    outside_x = np.maximum(zero, (x - width) - across) + np.maximum(zero, across - (x + width * 2))
    outside_y = np.maximum(zero, (y - height) - down) + np.maximum(zero, down - (y + height * 2))
    counts = labeled.sum(axis=1)
    has_points = (counts > 0)[:, None]
    dx = np.where(has_points, across - wanted[:, :, 0], outside_x)
    dy = np.where(has_points, down - wanted[:, :, 1], outside_y)
    variances = (keypoint_sigmas(points.shape[1]) * 2) ** 2
    areas = truth.areas[objects][:, None]
    errors = (dx**2 + dy**2) / variances / (areas + np.spacing(1)) / 2
    near = np.exp(-errors)
    labeled |= ~has_points
    counts = labeled.sum(axis=1)
    similar = np.zeros(len(objects))
    for count in np.unique(counts).tolist():  # equal lengths: sums in pycocotools' order
        rows = np.flatnonzero(counts == count)
        similar[rows] = near[rows][labeled[rows]].reshape(-1, count).sum(axis=1) / count
    return similar


def keypoint_sigmas(num_points: int) -> NDArray[np.float64]:
    """Return COCO's sigmas, or the same one for all if there are not 17 keypoints, ``(P,)``."""
    if num_points == len(COCO_SIGMAS):
        return COCO_SIGMAS
    return np.full(num_points, OTHER_SIGMA)
