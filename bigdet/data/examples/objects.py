"""The objects of one image: moved from stored pixels into a view, clipped, shifted, joined.

Letters: M objects of one image, K keypoints of an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.data.examples.masks import Bitmap, rasterize_polygons, sample_rle
from bigdet.data.examples.views import Size, View, Views
from bigdet.data.format.manifest import Category


@dataclass(frozen=True)
class Objects:
    """The objects of one image that are in view.

    Attributes:
        boxes: ``(M, 4)`` float32 xyxy, pixels of the canvas.
        labels: ``(M,)`` int64.
        is_crowd: ``(M,)`` bool.
        mask_origins: ``(M, 2)`` int64 x, y of each mask's first pixel on the canvas.
        masks: M crops ``(h, w)`` uint8 0 or 1, of size (0, 0) without a mask; None where masks
            are not wanted.
        num_dropped: boxes that have no area in view.
        keypoints: ``(M, K, 3)`` float32, see ``structures.Targets``; None where not wanted.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    mask_origins: NDArray[np.int64]
    masks: list[Bitmap] | None
    num_dropped: int
    keypoints: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Wanted:
    """What is computed for a sample besides its image, boxes and labels.

    Attributes:
        masks: bitmaps of the objects.
        keypoint_order: which keypoint each one becomes in a flip, ``(K,)`` int64; None for no
            keypoints.
        tight_boxes: where a crop cuts a box, it shrinks to what is left of the mask.
        scaled_decoding: JPEGs may be decoded at a fraction of their size.
    """

    masks: bool = False
    keypoint_order: NDArray[np.int64] | None = None
    tight_boxes: bool = False
    scaled_decoding: bool = False


def keypoint_order(categories: Sequence[Category]) -> NDArray[np.int64]:
    """Return which keypoint each one becomes when left and right are exchanged, ``(K,)``.

    Raises:
        ValueError: no category has keypoints, or two have different ones.
    """
    layouts = [
        (category.keypoints, category.flip_pairs or [])
        for category in categories
        if category.keypoints
    ]
    if not layouts or any(layout != layouts[0] for layout in layouts):
        what = "have different ones" if layouts else "have none"
        raise ValueError(
            f"keypoints are wanted, but the categories of the training set {what}. Make the shards "
            "again with --keypoints, from categories with the same keypoints."
        )
    names, pairs = layouts[0]
    order = np.arange(len(names))
    for left, right in pairs:
        order[[left, right]] = right, left
    return order


def no_objects() -> Objects:
    """Return an empty set of objects, which is what evaluation uses."""
    return objects_in_view([], View((1, 1), (1, 1), (0, 0), (1, 1), False), Wanted())


def check_annotations(
    annotations: Sequence[dict[str, Any]], image_size: Size, wanted: Wanted
) -> None:
    """Check that what is wanted can be computed from annotations, whether in view or not.

    Raises:
        ValueError: a segmentation is neither polygons nor RLE of the image's size, or keypoints
            are not K times x, y, visibility.
    """
    for annotation in annotations:
        segmentation = annotation.get("segmentation")
        if wanted.masks and segmentation and not annotation["iscrowd"]:
            is_polygons = isinstance(segmentation, list) and not any(
                len(part) % 2 for part in segmentation
            )
            is_rle = isinstance(segmentation, dict) and segmentation.get("size") == [*image_size]
            if not is_polygons and not is_rle:
                raise ValueError(
                    f"annotation {annotation['id']} whose segmentation is neither polygons nor RLE "
                    f"of size {[*image_size]}"
                )
        keypoints = annotation.get("keypoints")
        if wanted.keypoint_order is not None and keypoints is not None:
            count = len(wanted.keypoint_order)
            if len(keypoints) != 3 * count:
                raise ValueError(
                    f"annotation {annotation['id']} with {len(keypoints)} numbers for {count} "
                    "keypoints of x, y, visibility"
                )


def objects_in_view(annotations: Sequence[dict[str, Any]], view: View, wanted: Wanted) -> Objects:
    """Move the objects of one image into a view, see ``objects_in_views``."""
    return objects_in_views([annotations], [view], wanted)[0]


def objects_in_views(
    annotations: Sequence[Sequence[dict[str, Any]]], views: Sequence[View], wanted: Wanted
) -> list[Objects]:
    """Move the objects of several images into their views, all at once to save calls.

    Objects out of view are dropped: one is kept if its clipped box has an area, however small, as
    in paper 2's released code. Masks are computed within the clipped box only; crowd regions have
    none, as no loss uses them. The annotations are those of ``check_annotations``.
    """
    arrays, found = Views(views), list(chain.from_iterable(annotations))
    which = np.repeat(np.arange(len(views)), [len(of_image) for of_image in annotations])
    stored = np.array([annotation["bbox"] for annotation in found], np.float64).reshape(-1, 4)
    whole = arrays.move_boxes(stored, which)
    boxes = arrays.clip_boxes(whole, which)
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    seen = [found[i] for i in kept.tolist()]
    boxes, which, num_found = boxes[kept], which[kept], np.bincount(which, minlength=len(views))
    low, high = _pixel_bounds(boxes, arrays.limit[which])
    labels = np.array([annotation["label"] for annotation in seen], dtype=np.int64)
    is_crowd = np.array([annotation["iscrowd"] for annotation in seen], dtype=np.bool_)
    masks = keypoints = None
    if wanted.masks:
        masks = _mask_crops(seen, views, arrays, which, low, high)
    if wanted.keypoint_order is not None:
        keypoints = _moved_keypoints(seen, arrays, which, wanted.keypoint_order)
    num_seen = np.bincount(which, minlength=len(views))
    ends = np.cumsum(num_seen).tolist()
    objects = [
        Objects(
            boxes=boxes[start:end],
            labels=labels[start:end],
            is_crowd=is_crowd[start:end],
            mask_origins=low[start:end],
            masks=None if masks is None else masks[start:end],
            num_dropped=num_dropped,
            keypoints=None if keypoints is None else keypoints[start:end],
        )
        for start, end, num_dropped in zip(
            [0, *ends], ends, (num_found - num_seen).tolist(), strict=False
        )
    ]
    if not wanted.tight_boxes or masks is None:
        return objects
    is_cut = np.split((whole[kept] != boxes).any(axis=1), ends[:-1])
    return [tighten(of_image, cut) for of_image, cut in zip(objects, is_cut, strict=True)]


def tighten(objects: Objects, which: NDArray[np.bool_]) -> Objects:
    """Shrink boxes to the pixels of their masks; those with nothing left are dropped and counted.

    Args:
        objects: with ``masks``; an object without one, such as a crowd, stays as it is.
        which: ``(M,)`` the boxes to shrink.
    """
    assert objects.masks is not None
    boxes = objects.boxes.copy()
    for i in np.flatnonzero(which):
        mask = objects.masks[i]
        if mask.size == 0:
            continue
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(rows) == 0:
            boxes[i] = 0
            continue
        x, y = objects.mask_origins[i]
        boxes[i, :2] = np.maximum(boxes[i, :2], (x + columns[0], y + rows[0]))
        boxes[i, 2:] = np.minimum(boxes[i, 2:], (x + columns[-1] + 1, y + rows[-1] + 1))
    return with_boxes(objects, boxes)


def with_boxes(objects: Objects, boxes: NDArray[np.float32]) -> Objects:
    """Replace the boxes of objects; those whose box has no area are dropped and counted."""
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    return select(replace(objects, boxes=boxes), kept, len(objects) - len(kept))


def select(objects: Objects, kept: NDArray[np.int64], num_dropped: int = 0) -> Objects:
    """Return some of the objects, and count ``num_dropped`` more as dropped."""
    return Objects(
        boxes=objects.boxes[kept],
        labels=objects.labels[kept],
        is_crowd=objects.is_crowd[kept],
        mask_origins=objects.mask_origins[kept],
        masks=None if objects.masks is None else [objects.masks[int(i)] for i in kept],
        keypoints=None if objects.keypoints is None else objects.keypoints[kept],
        num_dropped=objects.num_dropped + num_dropped,
    )


def shift(objects: Objects, x: int, y: int) -> Objects:
    """Move objects by whole pixels of the canvas."""
    keypoints = objects.keypoints
    if keypoints is not None:
        keypoints = keypoints + np.where(keypoints[..., 2:] > 0, (x, y, 0), 0).astype(np.float32)
    return replace(
        objects,
        boxes=objects.boxes + np.array([x, y, x, y], dtype=np.float32),
        mask_origins=objects.mask_origins + np.array([x, y]),
        keypoints=keypoints,
    )


def clip(objects: Objects, size: Size) -> Objects:
    """Cut off what is right of or below an area; what has nothing left is dropped and counted.

    Args:
        objects: none of them reaches above or left of the canvas.
        size: height, width of the area.
    """
    height, width = size
    limit = np.array([width, height])
    masks = objects.masks
    if masks is not None:
        rooms = (limit - objects.mask_origins).clip(0)
        masks = [mask[:down, :right] for mask, (right, down) in zip(masks, rooms, strict=True)]
    keypoints = objects.keypoints
    if keypoints is not None:
        keypoints = keypoints * (keypoints[..., :2] < limit).all(axis=-1, keepdims=True)
    cut = replace(objects, masks=masks, keypoints=keypoints)
    return with_boxes(cut, cut.boxes.clip(0, (width, height) * 2).astype(np.float32))


def join(parts: Sequence[Objects]) -> Objects:
    """Concatenate the objects of one canvas."""
    masks = [part.masks for part in parts]
    keypoints = [part.keypoints for part in parts]
    return Objects(
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        is_crowd=np.concatenate([part.is_crowd for part in parts]),
        mask_origins=np.concatenate([part.mask_origins for part in parts]),
        masks=None if masks[0] is None else list(chain.from_iterable(part or [] for part in masks)),
        keypoints=None if keypoints[0] is None else np.concatenate([*keypoints]),
        num_dropped=sum(part.num_dropped for part in parts),
    )


def _pixel_bounds(
    boxes: NDArray[np.float32], limit: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first pixel and the one past the last, ``(M, 2)`` x, y, that boxes touch.

    Args:
        boxes: ``(M, 4)`` xyxy.
        limit: ``(M, 2)`` width, height of the image that each is in.
    """
    low = np.minimum(np.floor(boxes[:, :2]).astype(np.int64), limit - 1)
    high = np.clip(np.ceil(boxes[:, 2:]).astype(np.int64), low + 1, limit)
    return low, high


def _mask_crops(
    annotations: Sequence[dict[str, Any]],
    views: Sequence[View],
    arrays: Views,
    which: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
) -> list[Bitmap]:
    """Return each object's mask from pixel ``low`` to ``high``, x, y; (0, 0) without a mask."""
    sizes = (high - low)[:, ::-1]
    masks: list[Bitmap] = []
    polygons: list[list[float]] = []
    owners: list[int] = []
    for i, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        parts: list[list[float]] = []
        if not segmentation or annotation["iscrowd"]:
            masks.append(np.zeros((0, 0), dtype=np.uint8))
        elif isinstance(segmentation, dict):
            points = views[which[i]].stored_points(low[i], high[i])
            masks.append(sample_rle(segmentation, *points))
        else:
            parts = [part for part in segmentation if len(part) >= 6]  # two corners cover nothing
            masks.append(np.zeros((0, 0) if parts else sizes[i], dtype=np.uint8))
        polygons += parts
        owners += [i] * len(parts)
    num_corners = np.array([len(polygon) // 2 for polygon in polygons], dtype=np.int64)
    owner = np.repeat(np.array(owners, dtype=np.int64), num_corners)
    corners = np.array(list(chain.from_iterable(polygons)), dtype=np.float64).reshape(-1, 2)
    corners = arrays.move_points(corners, which[owner]) - low[owner]
    layers = rasterize_polygons(corners, num_corners, sizes[owners])
    for i, layer in zip(owners, layers, strict=True):
        # The mask of an object is the union of its parts.
        masks[i] = masks[i] | layer if masks[i].size else layer
    return masks


def _moved_keypoints(
    annotations: Sequence[dict[str, Any]],
    views: Views,
    which: NDArray[np.int64],
    order: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return keypoints on the canvas, ``(M, K, 3)``; those out of view become not labeled."""
    absent = [0.0] * (3 * len(order))
    stored = [annotation.get("keypoints") or absent for annotation in annotations]
    keypoints = np.array(stored, dtype=np.float64).reshape(-1, len(order), 3)
    # COCO counts pixels here, while boxes and masks have continuous edges: a keypoint at 0 is at
    # the center of the first pixel.
    points = keypoints[..., :2].reshape(-1, 2) + 0.5
    points = views.move_points(points, np.repeat(which, len(order))).reshape(-1, len(order), 2)
    is_seen = ((points >= 0) & (points < views.limit[which][:, None])).all(axis=-1)
    keypoints[..., :2] = points
    keypoints *= (is_seen & (keypoints[..., 2] > 0))[..., None]
    flipped = np.flatnonzero(views.is_flipped[which])
    keypoints[flipped] = keypoints[flipped][:, order]
    return keypoints.astype(np.float32)
