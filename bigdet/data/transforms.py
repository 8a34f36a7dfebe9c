"""Geometry on an image and its targets together: scale, crop, flip.

First the **view** is worked out: where the image lands on its canvas, from numbers alone. Then
image, boxes and masks are brought into it, each once. Colors are not touched: normalization is the
model's.

Letters: M objects of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigdet.config.schema import ResizeConfig
from bigdet.data.masks import Bitmap, rasterize_polygons, sample_rle
from bigdet.ops.random import Words
from bigdet.ops.resize import plan_of, resize_image, test_size

CROP_TRIES = 10
"""Crops that are drawn before one is centered on a box."""


@dataclass(frozen=True)
class View:
    """How an image is laid on its canvas: scaled to a size, then cropped, then flipped.

    Attributes:
        original_size: height, width of the image as stored.
        scaled_size: height, width after scaling.
        origin: x, y of the crop's first pixel in the scaled image.
        size: height, width of the crop, which is the image's part of the canvas.
        is_flipped: left and right are exchanged, within the crop.
    """

    original_size: tuple[int, int]
    scaled_size: tuple[int, int]
    origin: tuple[int, int]
    size: tuple[int, int]
    is_flipped: bool

    @property
    def scale(self) -> NDArray[np.float64]:
        """Canvas pixels per stored pixel, x and y: rounding makes them differ a little."""
        (height, width), (scaled_height, scaled_width) = self.original_size, self.scaled_size
        return np.array([scaled_width / width, scaled_height / height])

    def move_points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move ``(..., 2)`` points x, y from stored pixels to canvas pixels; not clipped."""
        moved = points * self.scale - self.origin
        if self.is_flipped:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved

    def move_boxes(self, boxes_xywh: NDArray[np.float64]) -> NDArray[np.float32]:
        """Move ``(M, 4)`` boxes from stored pixels to ``(M, 4)`` xyxy on the canvas, clipped."""
        corners = np.stack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        moved = self.move_points(corners)  # (M, 2, 2)
        height, width = self.size
        low, high = moved.min(axis=1), moved.max(axis=1)  # a flip exchanges left and right
        return np.concatenate([low, high], axis=1).clip(0, (width, height) * 2).astype(np.float32)

    def stored_points(
        self, low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where the centers of canvas pixels between two corners lie in stored pixels.

        Args:
            low: x, y of the first pixel.
            high: x, y of the one past the last.

        Returns:
            The x of each column and the y of each row.
        """
        x, y = np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5
        if self.is_flipped:
            x = self.size[1] - x
        return (x + self.origin[0]) / self.scale[0], (y + self.origin[1]) / self.scale[1]

    def move_image(self, image: Tensor) -> Tensor:
        """Return the part of a ``(3, H, W)`` uint8 image that is seen, ``(3, *size)``."""
        # Scaling only what the crop keeps would need crops between stored pixels; at most a
        # sixth of each side of `direct` hangs over.
        x, y = self.origin
        height, width = self.size
        seen = resize_image(image, self.scaled_size)[:, y : y + height, x : x + width]
        return seen.flip(2) if self.is_flipped else seen


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
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    mask_origins: NDArray[np.int64]
    masks: list[Bitmap] | None
    num_dropped: int


def no_objects() -> Objects:
    """Return no objects at all, as evaluation wants them."""
    return objects_in_view([], View((1, 1), (1, 1), (0, 0), (1, 1), False), with_masks=False)


def whole_view(original_size: tuple[int, int], plan: tuple[int, int]) -> View:
    """Return the view of test time: the whole image, scaled.

    Args:
        original_size: height, width as stored.
        plan: short side and longest long side, pixels.
    """
    scaled = test_size(*original_size, *plan)
    return View(original_size, scaled, (0, 0), scaled, is_flipped=False)


def draw_view(
    record: dict[str, Any], resize: ResizeConfig, flip: float, sample_words: Words
) -> View:
    """Draw the view of a training sample.

    ``short_side`` shows the whole image. ``direct`` (RECIPES C.7) scales its long side to ``size``
    times a factor from ``scale_range`` and crops what hangs over ``size`` at a random place. A crop
    that shows no box is drawn again; after ``CROP_TRIES`` it is centered on a random box.

    Args:
        record: of the shards.
        resize: of the phase.
        flip: probability of a horizontal flip.
        sample_words: of this sample in this pass.
    """
    original_size = (record["height"], record["width"])
    is_flipped = sample_words.uniform(0.0, 1.0) < flip
    if resize.kind == "short_side":
        whole = whole_view(original_size, plan_of(resize.kind, resize.size, resize.cap))
        return View(original_size, whole.scaled_size, (0, 0), whole.size, is_flipped)
    long_side = max(1, round(resize.size * sample_words.uniform(*resize.scale_range)))
    scaled = test_size(*original_size, long_side, long_side)
    whole = View(original_size, scaled, (0, 0), scaled, is_flipped=False)
    size = (min(scaled[0], resize.size), min(scaled[1], resize.size))
    origin = (0, 0)
    if size != scaled:
        found = [annotation for annotation in record["annotations"] if not annotation["iscrowd"]]
        origin = _draw_crop(whole.move_boxes(_boxes_xywh(found)), scaled, size, sample_words)
    return View(original_size, scaled, origin, size, is_flipped)


def _draw_crop(
    boxes: NDArray[np.float32], scaled: tuple[int, int], size: tuple[int, int], sample_words: Words
) -> tuple[int, int]:
    """Draw x, y of a crop that shows a part of at least one box, if there are boxes."""
    room = np.array([scaled[1] - size[1], scaled[0] - size[0]])  # x, y
    extent = np.array([size[1], size[0]])
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    for _ in range(CROP_TRIES):
        origin = (sample_words.integer(int(room[0]) + 1), sample_words.integer(int(room[1]) + 1))
        low, high = np.maximum(boxes[:, :2], origin), np.minimum(boxes[:, 2:], origin + extent)
        if len(boxes) == 0 or (high > low).all(axis=1).any():
            return origin
    box = boxes[sample_words.integer(len(boxes))]
    centered = np.round((box[:2] + box[2:] - extent) / 2).clip(0, room)
    return int(centered[0]), int(centered[1])


def objects_in_view(
    annotations: Sequence[dict[str, Any]], view: View, *, with_masks: bool
) -> Objects:
    """Bring the objects of an image into a view; those that are not seen there are dropped.

    An object stays if its clipped box has an area, however small (RECIPES C.7). Masks are worked
    out within the clipped box alone; crowd regions carry none, as no loss uses them.

    Args:
        annotations: of the image's record in the shards.
        view: how the image is laid on the canvas.
        with_masks: work out the masks too.

    Raises:
        ValueError: a segmentation is neither polygons nor RLE of the image's size.
    """
    boxes = view.move_boxes(_boxes_xywh(annotations))
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    seen = [annotations[int(i)] for i in kept]
    boxes = boxes[kept]
    low, high = _pixel_bounds(boxes, view.size)
    masks = None
    if with_masks:
        masks = _mask_crops(seen, view, low, high)
    return Objects(
        boxes=boxes,
        labels=np.array([annotation["label"] for annotation in seen], dtype=np.int64),
        is_crowd=np.array([annotation["iscrowd"] for annotation in seen], dtype=np.bool_),
        mask_origins=low,
        masks=masks,
        num_dropped=len(annotations) - len(seen),
    )


def _boxes_xywh(annotations: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Return the boxes as stored, ``(M, 4)`` xywh."""
    boxes = [annotation["bbox"] for annotation in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _pixel_bounds(
    boxes: NDArray[np.float32], size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first pixel and the one past the last, ``(M, 2)`` x, y, that boxes touch."""
    limit = np.array([size[1], size[0]])
    low = np.minimum(np.floor(boxes[:, :2]).astype(np.int64), limit - 1)
    high = np.clip(np.ceil(boxes[:, 2:]).astype(np.int64), low + 1, limit)
    return low, high


def _mask_crops(
    annotations: Sequence[dict[str, Any]],
    view: View,
    low: NDArray[np.int64],
    high: NDArray[np.int64],
) -> list[Bitmap]:
    """Return each object's mask between two pixels, x, y of its crop; (0, 0) without a mask."""
    sizes = (high - low)[:, ::-1]
    masks: list[Bitmap] = []
    polygons: list[list[float]] = []
    owners: list[int] = []
    for i, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if not segmentation or annotation["iscrowd"]:
            masks.append(np.zeros((0, 0), dtype=np.uint8))
        elif isinstance(segmentation, list) and not any(len(part) % 2 for part in segmentation):
            masks.append(np.zeros(sizes[i], dtype=np.uint8))
            parts = [part for part in segmentation if len(part) >= 6]  # two corners cover nothing
            polygons += parts
            owners += [i] * len(parts)
        elif isinstance(segmentation, dict) and segmentation.get("size") == [*view.original_size]:
            masks.append(sample_rle(segmentation, *view.stored_points(low[i], high[i])))
        else:
            raise ValueError(
                f"annotation {annotation['id']} whose segmentation is neither polygons nor RLE of "
                f"size {[*view.original_size]}"
            )
    corners = view.move_points(np.array(list(chain.from_iterable(polygons))).reshape(-1, 2))
    num_corners = np.array([len(polygon) // 2 for polygon in polygons], dtype=np.int64)
    corners -= np.repeat(low[owners], num_corners, axis=0)
    layers = rasterize_polygons(corners, num_corners, sizes[owners])
    for i, layer in zip(owners, layers, strict=True):
        masks[i] |= layer  # an object of several parts is all of them
    return masks
