"""Where an image is on its canvas: scaled, cropped, flipped.

The **view** is decided first, from numbers alone, before a pixel is decoded. Then image, boxes,
masks and keypoints are moved into it, each once (``objects.py`` has the objects).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigdet.config.resize import ResizeConfig, is_square, plan_of
from bigdet.data.examples.decode import decoded_extent
from bigdet.ops.random import Words
from bigdet.ops.resize import resize_image
from bigdet.ops.sizes import canvas_size, eval_size

CROP_TRIES = 10
"""Crops that are drawn before one is centered on a box."""

Size = tuple[int, int]
Box = tuple[float, float, float, float]


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
    def corner(self) -> tuple[int, int]:
        """X, y of the first stored pixel that is scaled."""
        return (0, 0) if self.window is None else self.window[:2]

    def stored_points(
        self, low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where the centers of canvas pixels are in stored pixels.

        They go from ``low`` to before ``high``, both x, y. Returned are the x of each column and
        the y of each row.
        """
        x, y = np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5
        if self.is_flipped:
            x = self.size[1] - x
        scale, (left, top) = self.scale, self.corner
        return (x + self.origin[0]) / scale[0] + left, (y + self.origin[1]) / scale[1] + top

    def move_image(self, image: Tensor) -> Tensor:
        """Return the visible part, ``(3, *size)``, of an image, ``(3, H, W)`` uint8.

        Without a window, the image may have been decoded smaller than it is stored.
        """
        extent = None
        if self.window is not None:
            left, top, wide, high = self.window
            image = image[:, top : top + high, left : left + wide]
        elif tuple(image.shape[1:]) != self.original_size:
            extent = decoded_extent(self.original_size, (image.shape[1], image.shape[2]))
        if self.is_flipped and self.size == self.scaled_size and image[0].numel() < prod(self.size):
            # The same pixels, but fewer to exchange, when flipped before an enlargement.
            return resize_image(image.flip(2), self.scaled_size, extent)
        x, y = self.origin
        height, width = self.size
        seen = resize_image(image, self.scaled_size, extent)[:, y : y + height, x : x + width]
        return seen.flip(2) if self.is_flipped else seen


class Views:
    """The views of several images as arrays, so that all their objects are moved at once.

    Of N points or boxes, ``which``, ``(N,)``, says to which image each belongs.
    """

    def __init__(self, views: Sequence[View]) -> None:
        self._corner = np.array([view.corner for view in views], dtype=np.float64)
        self._scale = np.array([view.scale for view in views])
        self._origin = np.array([view.origin for view in views], dtype=np.float64)
        self.is_flipped = np.array([view.is_flipped for view in views])
        self.limit = np.array([view.size[::-1] for view in views])
        """Width and height of each image's part of its canvas, ``(B, 2)``."""

    def move_points(
        self, points: NDArray[np.float64], which: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Move ``(N, 2)`` points x, y from stored pixels to canvas pixels; not clipped."""
        corner, scale, origin = self._corner[which], self._scale[which], self._origin[which]
        moved: NDArray[np.float64] = (points - corner) * scale - origin
        flipped = np.flatnonzero(self.is_flipped[which])
        moved[flipped, 0] = self.limit[which[flipped], 0] - moved[flipped, 0]
        return moved

    def move_boxes(
        self, boxes_xywh: NDArray[np.float64], which: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Move boxes, ``(N, 4)`` as stored, to ``(N, 4)`` xyxy on the canvas; not clipped."""
        low, high = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
        start, end = self.move_points(low, which), self.move_points(high, which)
        # A flip exchanges left and right.
        return np.concatenate([np.minimum(start, end), np.maximum(start, end)], axis=1)

    def clip_boxes(
        self, boxes: NDArray[np.float64], which: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Clip ``(N, 4)`` boxes on the canvas to their images."""
        limit = np.tile(self.limit, 2)[which]
        clipped: NDArray[np.float64] = np.minimum(np.maximum(boxes, 0), limit)
        return clipped.astype(np.float32)


def whole_view(original_size: Size, plan: Size, canvas: Size | None = None) -> View:
    """Return the view used in evaluation: the whole image, scaled.

    Args:
        original_size: height, width as stored.
        plan: short side and longest long side, pixels.
        canvas: height and width into which it must fit; None for no limit.
    """
    scaled = eval_size(*original_size, *plan)
    if canvas is not None and (scaled[0] > canvas[0] or scaled[1] > canvas[1]):
        height, width = original_size
        if height * canvas[1] >= width * canvas[0]:
            scaled = (canvas[0], max(1, width * canvas[0] // height))
        else:
            scaled = (max(1, height * canvas[1] // width), canvas[1])
    return View(original_size, scaled, (0, 0), scaled, is_flipped=False)


def resize_of_step(resize: ResizeConfig, *key: int | str) -> ResizeConfig:
    """Return the resize of a step for all lanes: its short side is drawn, unless for each image.

    ``key`` is seed, phase and step.
    """
    return resize if resize.draw == "image" else draw_size(resize, *key)


def draw_size(resize: ResizeConfig, *key: int | str) -> ResizeConfig:
    """Return a resize with its short side drawn if it varies.

    ``key`` is seed, phase and step, or, for one image, seed, phase, pass and row.
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
    cap = plan_of(resize)[1]
    return replace(resize, size=size, cap=cap, sizes=None, size_range=None, draw="step")


def training_canvas(resize: ResizeConfig, sizes: Sequence[Size]) -> Size | None:
    """Return height and width of a group's canvas; None if the smallest that fits is taken.

    ``sizes`` are heights and widths as stored.
    """
    if is_square(resize):
        return resize.size, resize.size
    if resize.pad_to == "batch":
        return None
    short, long = canvas_size([plan_of(resize)])
    num_portrait = sum(height > width for height, width in sizes)
    num_landscape = sum(width > height for height, width in sizes)
    return (long, short) if num_portrait > num_landscape else (short, long)


def draw_view(
    record: dict[str, Any],
    resize: ResizeConfig,
    flip: float,
    sample_words: Words,
    canvas: Size | None = None,
) -> View:
    """Draw the view of a training sample.

    ``short_side`` and ``stitcher`` show the whole image, the others a crop if the scaled image is
    larger than the canvas. A crop that shows no box is drawn again; after ``CROP_TRIES`` it is
    centered on a random box.

    Args:
        record: see ``shard_set.Sample``.
        resize: that of the image, its size drawn.
        flip: probability of a horizontal flip.
        sample_words: random numbers of this sample in this pass.
        canvas: height and width into which a whole image must fit; None for no limit.
    """
    original_size = (record["height"], record["width"])
    is_flipped = sample_words.uniform(0.0, 1.0) < flip
    if resize.kind in ("short_side", "stitcher"):
        whole = whole_view(original_size, plan_of(resize), canvas)
        return replace(whole, is_flipped=is_flipped)
    factors = resize.scale_range if resize.kind == "direct" else resize.jitter_range
    long_side = max(1, round(resize.size * sample_words.uniform(*factors)))
    if resize.variant == "paper":
        scaled = (long_side, long_side)
    else:
        scaled = eval_size(*original_size, long_side, long_side)
    whole = View(original_size, scaled, (0, 0), scaled, is_flipped)
    size = (min(scaled[0], resize.size), min(scaled[1], resize.size))
    if resize.kind == "jitter":
        return _windowed(whole, size, record, sample_words)
    return crop_view(whole, size, record, sample_words)


def crop_view(whole: View, size: Size, record: dict[str, Any], sample_words: Words) -> View:
    """Return a random crop of a view that shows a whole image.

    Its ``size`` is height, width, at most those of the view. It shows one of the boxes of the
    record, if there are any.
    """
    if size == whole.size:
        return whole
    scale = (whole.size[1] / record["width"], whole.size[0] / record["height"])
    boxes = _boxes_to_show(record, scale, whole.size)
    origin = _draw_crop(boxes, whole.size, size, sample_words)
    return replace(whole, origin=origin, size=size)


def _windowed(whole: View, size: Size, record: dict[str, Any], sample_words: Words) -> View:
    """Return a random crop with edges between stored pixels, so that nothing else is scaled."""
    if size == whole.size:
        return whole
    (height, width), scaled = whole.original_size, whole.scaled_size
    extent = (
        max(1, round(height * size[0] / scaled[0])),
        max(1, round(width * size[1] / scaled[1])),
    )
    boxes = _boxes_to_show(record, (1.0, 1.0), whole.original_size)
    x, y = _draw_crop(boxes, whole.original_size, extent, sample_words)
    return replace(whole, scaled_size=size, size=size, window=(x, y, extent[1], extent[0]))


def _boxes_to_show(record: dict[str, Any], scale: tuple[float, float], size: Size) -> list[Box]:
    """Return the boxes of which a crop must show one, xyxy; as plain numbers, as they are few.

    ``scale``, x and y, is from stored pixels to those that are cropped, whose ``size`` is height,
    width.
    """
    edges: list[float] = []
    for annotation in record["annotations"]:
        if not annotation["iscrowd"]:
            x, y, width, height = annotation["bbox"]
            edges += [x * scale[0], y * scale[1], (x + width) * scale[0], (y + height) * scale[1]]
    # Rounded as in the targets, so that what counts as visible here has an area there.
    edges = array("f", edges).tolist()
    limit = (size[1], size[0], size[1], size[0])
    boxes = [
        tuple(min(max(edge, 0.0), float(most)) for edge, most in zip(box, limit, strict=True))
        for box in zip(*[iter(edges)] * 4, strict=True)
    ]
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes if x1 > x0 and y1 > y0]


def _draw_crop(boxes: list[Box], scaled: Size, size: Size, sample_words: Words) -> tuple[int, int]:
    """Draw x, y of a crop that shows a part of at least one box, if there are boxes."""
    (height, width), room = size, (scaled[1] - size[1], scaled[0] - size[0])
    for _ in range(CROP_TRIES):
        x, y = sample_words.integer(room[0] + 1), sample_words.integer(room[1] + 1)
        if not boxes or any(
            x0 < x + width and x1 > x and y0 < y + height and y1 > y for x0, y0, x1, y1 in boxes
        ):
            return x, y
    x0, y0, x1, y1 = boxes[sample_words.integer(len(boxes))]
    # Sums in 32 bits decide half-way cases.
    x_sum, y_sum = array("f", (x0 + x1, y0 + y1))
    x, y = round((x_sum - width) / 2), round((y_sum - height) / 2)
    return min(max(x, 0), room[0]), min(max(y, 0), room[1])
