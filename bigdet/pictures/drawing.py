"""Boxes, names, masks and keypoints drawn on an image, legible on 128 pixels and on 4000.

Drawing itself is numpy and Pillow; what is drawn, ground truth or detections, is the caller's
choice.
Letters: N objects of one image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from bigdet.ops.masks import paste_mask
from bigdet.structures import Detections

Bitmap = NDArray[np.bool_]
Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # xyxy, pixels of the picture

MIN_LONG_SIDE = 800  # smaller images are enlarged, so that text has room
MASK_OPACITY = 0.4
TINY = 6  # times the width of a line: smaller boxes are drawn around, not on, their edges
SURE_LOGIT = 2.0  # keypoints are drawn from this peak of their heat map on, as Detectron does
GOLDEN_RATIO = 0.618034
MOST_HIDDEN = 0.5
"""A text that hides more of others is left out: a sixth of another text, or half of a box."""


def class_color(label: int) -> Color:
    """Return the RGB color of a class: the same in every picture, neighbors far apart."""
    hue = (label * GOLDEN_RATIO) % 1.0
    saturation = (0.85, 0.6)[label // 2 % 2]
    lightness = (0.6, 0.5, 0.7)[label % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(
    image: NDArray[np.uint8],
    boxes: NDArray[np.floating] | Sequence[Sequence[float]],
    names: Sequence[str],
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    masks: Sequence[Bitmap | None] | None = None,
    keypoints: NDArray[np.floating] | None = None,
    skeletons: Sequence[Sequence[Sequence[int]]] = (),
) -> Image.Image:
    """Draw N objects on an image; large ones first, so that small ones stay visible.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        boxes: ``(N, 4)`` xyxy, pixels of the image.
        names: N texts, for example the class names.
        labels: N numbers of classes, which choose the colors.
        scores: N numbers in [0, 1], written after the names, or None.
        masks: N bitmaps ``(H, W)``, None for an object without one; or None.
        keypoints: ``(N, K, 3)`` x, y in pixels of the image, and a number above 0 where drawn.
        skeletons: for each of the N, the pairs of keypoints that a line joins.

    Returns:
        The picture: the image, enlarged to a long side of ``MIN_LONG_SIDE`` if it is smaller.
    """
    scale = max(1.0, MIN_LONG_SIDE / max(image.shape[:2]))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    picture = Image.fromarray(np.ascontiguousarray(image))
    if scale > 1.0:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    line = max(2, round(max(size) / 400))
    areas = (scaled[:, 2] - scaled[:, 0]) * (scaled[:, 3] - scaled[:, 1])
    order = [int(i) for i in np.argsort(-areas, kind="stable")]
    # Lines along the edges of a tiny object would hide it.
    is_tiny = (scaled[:, 2:] - scaled[:, :2]).min(axis=1, initial=np.inf) < TINY * line
    scaled[is_tiny] += np.array([-line, -line, line, line])
    for i in order:
        mask = masks[i] if masks is not None else None
        if mask is not None:
            outline = 0 if is_tiny[i] else line
            _paint_mask(picture, mask, scale, outline, class_color(labels[i]))
    pen = ImageDraw.Draw(picture)
    for i in order:
        x0, y0, x1, y1 = (float(edge) for edge in scaled[i])
        pen.rectangle(
            (x0, y0, max(x0, x1), max(y0, y1)), outline=class_color(labels[i]), width=line
        )
    if keypoints is not None:
        for i in order:
            _draw_pose(pen, keypoints[i] * (scale, scale, 1.0), skeletons[i], line)
    writer = _LabelWriter(picture, [(x0, y0, x1, y1) for x0, y0, x1, y1 in scaled.tolist()])
    firsts = _first_of_each_class(labels, areas.tolist() if scores is None else scores)
    # Small objects choose the places of their names first, as they have less room around them.
    for i in sorted(order, key=lambda i: (i not in firsts, areas[i])):
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}"
        writer.write(text, writer.boxes[i], class_color(labels[i]), must_show=i in firsts)
    return picture


def draw_detections(
    image: NDArray[np.uint8],
    detections: Detections,
    categories: Sequence[Mapping[str, Any]],
    score_threshold: float,
) -> Image.Image:
    """Draw what a model found on an image.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        detections: on the CPU, boxes in pixels of the image, best first.
        categories: by label; ``name`` of each, and ``skeleton`` where it has keypoints.
        score_threshold: detections with a lower score are left out, as they hide the others.
    """
    num_shown = int((detections.scores >= score_threshold).sum())
    boxes, labels = detections.boxes[:num_shown], detections.labels[:num_shown].tolist()
    masks = None
    if detections.masks is not None:
        height, width = image.shape[:2]
        masks = [
            paste_mask(prob, box, height, width).numpy()
            for prob, box in zip(detections.masks[:num_shown], boxes, strict=True)
        ]
    keypoints = None
    if detections.keypoints is not None:
        keypoints = detections.keypoints[:num_shown].double().numpy()
        keypoints[..., 2] -= SURE_LOGIT
    return draw(
        image,
        boxes.numpy(),
        [categories[label]["name"] for label in labels],
        labels,
        detections.scores[:num_shown].tolist(),
        masks,
        keypoints,
        [categories[label].get("skeleton") or [] for label in labels],
    )


def _first_of_each_class(labels: Sequence[int], ranks: Sequence[float]) -> set[int]:
    """Return the indices of the highest-ranked objects, one for each label."""
    rising = sorted(range(len(labels)), key=lambda i: ranks[i])
    return set({labels[i]: i for i in rising}.values())


def _draw_pose(
    pen: ImageDraw.ImageDraw,
    points: NDArray[np.floating],
    skeleton: Sequence[Sequence[int]],
    line: int,
) -> None:
    """Draw the visible keypoints of an object, and the lines between them.

    Args:
        pen: draws on the picture.
        points: ``(K, 3)`` x, y in pixels of the picture, and a number above 0 where visible.
        skeleton: pairs of keypoints that a line joins.
        line: width of lines, pixels.
    """
    is_shown = points[:, 2] > 0
    for number, (start, end) in enumerate(skeleton):
        if is_shown[start] and is_shown[end]:
            ends = [(float(x), float(y)) for x, y, _ in points[[start, end]]]
            pen.line(ends, fill=class_color(number), width=line)
    for x, y, _ in points[is_shown].tolist():
        pen.ellipse(
            (x - line, y - line, x + line, y + line), fill=(255, 255, 255), outline=(0, 0, 0)
        )


def _paint_mask(picture: Image.Image, mask: Bitmap, scale: float, line: int, color: Color) -> None:
    """Blend a color into the picture where the mask is, and draw the mask's outline."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return
    # One pixel more on each side, so that the outline closes; beyond the image nothing is set.
    top, left = int(rows[0]) - 1, int(columns[0]) - 1
    height, width = int(rows[-1]) + 2 - top, int(columns[-1]) + 2 - left
    crop = np.zeros((height, width), dtype=np.uint8)
    crop[1:-1, 1:-1] = mask[top + 1 : top + height - 1, left + 1 : left + width - 1]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    stencil = Image.fromarray(crop * 255).resize(size, Image.Resampling.BILINEAR)
    stencil = stencil.point(lambda value: 255 if value >= 128 else 0)
    inner = stencil
    for _ in range(line // 2):
        inner = inner.filter(ImageFilter.MinFilter(3))
    outline = np.asarray(stencil) & ~np.asarray(inner)
    fill = (np.asarray(inner) * MASK_OPACITY).astype(np.uint8)
    place = (round(left * scale), round(top * scale))
    picture.paste(color, place, mask=Image.fromarray(fill | outline))


@dataclass
class _LabelWriter:
    """Writes texts on filled rectangles, each where it hides the least of texts and objects.

    A text that would hide too much at every place is left out: the color still shows the class.
    """

    picture: Image.Image
    boxes: list[Rectangle]
    taken: list[Rectangle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.picture)
        self.font = ImageFont.load_default(max(12, round(max(self.picture.size) / 57)))

    def write(self, text: str, box: Rectangle, color: Color, must_show: bool) -> None:
        """Write a text at a box: above it, below it or inside, and always inside the picture."""
        text = self._shortened(text)
        left, top, right, bottom = self.font.getbbox(text)
        pad = 0.15 * (bottom - top) + 1
        width, height = right - left + 2 * pad, bottom - top + 2 * pad
        place = min(self._places(box, width, height), key=self._hidden)
        if self._hidden(place) > MOST_HIDDEN and not must_show:
            return
        self.taken.append(place)
        self.pen.rectangle(place, fill=color)
        # Luminance of Rec. 601: black on light colors, white on dark ones.
        light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
        origin = (place[0] + pad - left, place[1] + pad - top)
        self.pen.text(origin, text, fill=(0, 0, 0) if light else (255, 255, 255), font=self.font)

    def _shortened(self, text: str) -> str:
        """Cut a text that is wider than the picture."""
        limit = 0.9 * self.picture.width
        if self.font.getlength(text) <= limit:
            return text
        while text and self.font.getlength(text + "...") > limit:
            text = text[:-1]
        return text + "..."

    def _places(self, box: Rectangle, width: float, height: float) -> list[Rectangle]:
        """Return rectangles for a text of this size, the preferred ones first."""
        x0, y0, x1, y1 = box
        corners = [
            (x0, y0 - height), (x0, y1), (x0, y0), (x0, y1 - height),
            (x1 - width, y0 - height), (x1 - width, y1), (x1, y0), (x0 - width, y0),
            (x1, y1 - height), (x0 - width, y1 - height),
            ((x0 + x1 - width) / 2, y0 - height), ((x0 + x1 - width) / 2, y1),
            (x1, (y0 + y1 - height) / 2), (x0 - width, (y0 + y1 - height) / 2),
            (x1, y0 - height), (x0 - width, y0 - height), (x1, y1), (x0 - width, y1),
        ]  # fmt: skip
        places = []
        for x, y in corners:
            x = min(max(x, 0.0), self.picture.width - width)
            y = min(max(y, 0.0), self.picture.height - height)
            places.append((x, y, x + width, y + height))
        return places

    def _hidden(self, place: Rectangle) -> float:
        """Return what a text here would hide: shares of texts (which count more) and of boxes."""
        texts = sum(_share_covered(other, place) for other in self.taken)
        return 3.0 * texts + sum(_share_covered(box, place) for box in self.boxes)


def _share_covered(rectangle: Rectangle, cover: Rectangle) -> float:
    """Return which part of a rectangle another one covers, in [0, 1]."""
    width = min(rectangle[2], cover[2]) - max(rectangle[0], cover[0])
    height = min(rectangle[3], cover[3]) - max(rectangle[1], cover[1])
    if width <= 0.0 or height <= 0.0:
        return 0.0
    area = (rectangle[2] - rectangle[0]) * (rectangle[3] - rectangle[1])
    return width * height / area
