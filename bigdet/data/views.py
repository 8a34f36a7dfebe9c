"""Where an image lands on its canvas: scaled, cropped, flipped.

The **view** is worked out first, from numbers alone, before a pixel is decoded. Then image, boxes,
masks and keypoints are brought into it, each once (``objects.py`` has the objects).

Letters: M objects of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigdet.config.derived import plan_of
from bigdet.config.schema import ResizeConfig
from bigdet.data.decode import decoded_extent
from bigdet.ops.random import Words
from bigdet.ops.resize import resize_image, test_size

CROP_TRIES = 10
"""Crops that are drawn before one is centered on a box."""

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """How an image is laid on its canvas: scaled to a size, then cropped, then flipped.

    Attributes:
        original_size: height, width of the image as stored.
        scaled_size: height, width after scaling.
        origin: x, y of the crop's first pixel in the scaled image.
        size: height, width of the crop, which is the image's part of the canvas.
        is_flipped: left and right are exchanged, within the crop.
        window: x, y, width, height in stored pixels of the only part that is scaled, so that a
            small crop of a large enlargement costs little; None for the whole image.
    """

    original_size: Size
    scaled_size: Size
    origin: tuple[int, int]
    size: Size
    is_flipped: bool
    window: tuple[int, int, int, int] | None = None

    @property
    def scale(self) -> NDArray[np.float64]:
        """Canvas pixels per stored pixel, x and y: rounding makes them differ a little."""
        height, width = self.original_size if self.window is None else self.window[:1:-1]
        return np.array([self.scaled_size[1] / width, self.scaled_size[0] / height])

    @property
    def _corner(self) -> tuple[int, int]:
        """X, y of the first stored pixel that is scaled."""
        return (0, 0) if self.window is None else self.window[:2]

    def move_points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move ``(..., 2)`` points x, y from stored pixels to canvas pixels; not clipped."""
        moved = (points - self._corner) * self.scale - self.origin
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
        scale, (left, top) = self.scale, self._corner
        return (x + self.origin[0]) / scale[0] + left, (y + self.origin[1]) / scale[1] + top

    def move_image(self, image: Tensor) -> Tensor:
        """Return the part of an image that is seen.

        Args:
            image: ``(3, H, W)`` uint8; where there is no window it may have been decoded smaller
                than it is stored.

        Returns:
            ``(3, *size)``.
        """
        extent = None
        if self.window is not None:
            left, top, wide, high = self.window
            image = image[:, top : top + high, left : left + wide]
        elif tuple(image.shape[1:]) != self.original_size:
            extent = decoded_extent(self.original_size, (image.shape[1], image.shape[2]))
        x, y = self.origin
        height, width = self.size
        seen = resize_image(image, self.scaled_size, extent)[:, y : y + height, x : x + width]
        return seen.flip(2) if self.is_flipped else seen


def whole_view(original_size: Size, plan: Size) -> View:
    """Return the view of test time: the whole image, scaled.

    Args:
        original_size: height, width as stored.
        plan: short side and longest long side, pixels.
    """
    scaled = test_size(*original_size, *plan)
    return View(original_size, scaled, (0, 0), scaled, is_flipped=False)


def resize_of_step(resize: ResizeConfig, *key: int | str) -> ResizeConfig:
    """Return the resize of one step: the same for all lanes, its short side drawn if it varies.

    Args:
        resize: of the phase.
        key: seed, phase and step.
    """
    if resize.sizes is None and resize.size_range is None:
        return resize
    words = Words("size", *key)
    if resize.sizes is not None:
        size = resize.sizes[words.integer(len(resize.sizes))]
    else:
        assert resize.size_range is not None
        low, high = resize.size_range
        size = low + words.integer(high - low + 1)
    return replace(resize, size=size, cap=plan_of(resize)[1], sizes=None, size_range=None)


def draw_view(
    record: dict[str, Any], resize: ResizeConfig, flip: float, sample_words: Words
) -> View:
    """Draw the view of a training sample.

    ``short_side`` and ``stitcher`` show the whole image, the others a crop where the scaled image
    hangs over. A crop that shows no box is drawn again; after ``CROP_TRIES`` it is centered on a
    random box.

    Args:
        record: of the shards.
        resize: of the step.
        flip: probability of a horizontal flip.
        sample_words: of this sample in this pass.
    """
    original_size = (record["height"], record["width"])
    is_flipped = sample_words.uniform(0.0, 1.0) < flip
    if resize.kind in ("short_side", "stitcher"):
        return replace(whole_view(original_size, plan_of(resize)), is_flipped=is_flipped)
    factors = resize.scale_range if resize.kind == "direct" else resize.jitter_range
    long_side = max(1, round(resize.size * sample_words.uniform(*factors)))
    if resize.variant == "paper":
        scaled = (long_side, long_side)
    else:
        scaled = test_size(*original_size, long_side, long_side)
    whole = View(original_size, scaled, (0, 0), scaled, is_flipped)
    size = (min(scaled[0], resize.size), min(scaled[1], resize.size))
    if resize.kind == "jitter":
        return _windowed(whole, size, record, sample_words)
    return crop_view(whole, size, record, sample_words)


def crop_view(whole: View, size: Size, record: dict[str, Any], sample_words: Words) -> View:
    """Return a random crop of a view that shows a whole image.

    Args:
        whole: of the image.
        size: height, width of the crop, at most those of the view.
        record: of the image; the crop shows one of its boxes if it has any.
        sample_words: of this sample in this pass.
    """
    if size == whole.size:
        return whole
    unflipped = replace(whole, is_flipped=False)
    boxes = unflipped.move_boxes(_boxes_to_show(record))
    origin = _draw_crop(boxes, whole.size, size, sample_words)
    return replace(whole, origin=origin, size=size)


def _windowed(whole: View, size: Size, record: dict[str, Any], sample_words: Words) -> View:
    """Return a random crop whose edges lie between stored pixels, so that it is scaled alone."""
    if size == whole.size:
        return whole
    (height, width), scaled = whole.original_size, whole.scaled_size
    extent = (
        max(1, round(height * size[0] / scaled[0])),
        max(1, round(width * size[1] / scaled[1])),
    )
    stored = View(whole.original_size, whole.original_size, (0, 0), whole.original_size, False)
    boxes = stored.move_boxes(_boxes_to_show(record))
    x, y = _draw_crop(boxes, whole.original_size, extent, sample_words)
    return replace(whole, scaled_size=size, size=size, window=(x, y, extent[1], extent[0]))


def _boxes_to_show(record: dict[str, Any]) -> NDArray[np.float64]:
    """Return the boxes of which a crop must show one, ``(M, 4)`` xywh as stored."""
    return boxes_xywh([found for found in record["annotations"] if not found["iscrowd"]])


def _draw_crop(
    boxes: NDArray[np.float32], scaled: Size, size: Size, sample_words: Words
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


def boxes_xywh(annotations: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Return boxes as stored, ``(M, 4)`` xywh."""
    boxes = [annotation["bbox"] for annotation in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
