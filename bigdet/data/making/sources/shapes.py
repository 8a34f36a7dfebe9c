"""Synthetic images of circles, squares, triangles and stars with boxes and masks.

For trying everything without a data set: small enough to learn on two CPU cores in minutes, with
what makes real data difficult: varied sizes and backgrounds, objects that hide each other or leave
the image, images without objects, polygons as well as RLE. Every image is a function of (split,
seed, its number, size) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from bigdet.data.format.manifest import Category, Manifest
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.ops.random import Words, words

CLASSES = ["circle", "square", "triangle", "star"]
NUM_IMAGES = {"train": 1200, "val": 200}
MIN_SIZE = 48  # pixels of the long side
MAX_OBJECTS = 5
EMPTY_IMAGES = 0.02  # fraction of the images that show only background
OBJECT_SIZE = (0.2, 0.6)  # diameter of an object, in long sides of the image
MAX_NEWLY_HIDDEN = 0.35  # fraction of an object that the next one on top may hide
MIN_VISIBLE = 0.4  # objects of which less is visible are not annotated
MIN_PIXELS = 60  # nor are those with fewer visible pixels
MIN_CONTRAST = 180  # between an object and the mean of what is behind it, summed over RGB
JPEG_QUALITY = 92
SUPERSAMPLING = 4

Mask = NDArray[np.uint8]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """One object.

    Attributes:
        label: place in ``CLASSES``.
        outline: ``(P, 2)`` x, y of its corners, pixels, continuous edges.
        mask: ``(H, W)`` 0 or 1, all of it that is inside the image, hidden or not.
    """

    label: int
    outline: NDArray[np.float64]
    mask: Mask


def make_shapes(
    out: Path,
    *,
    split: str,
    images: int,
    seed: int = 0,
    size: int = 128,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a set of synthetic images as shards.

    Args:
        out: folder for the shards.
        split: ``train`` or ``val``, which share no image whatever the seed.
        images: how many.
        seed: other seed, other images.
        size: long side of the images, pixels.
        progress: called after every image with the number of images done and in all.

    Returns:
        The manifest of the new set.

    Raises:
        ValueError: the images would be too small.
        ShardError: ``out`` has shards already.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size: {size} pixels; shapes cannot be told apart below {MIN_SIZE}.")
    writer = ShardWriter(
        out,
        name=f"shapes_{split}",
        source="shapes",
        categories=[Category(label + 1, name) for label, name in enumerate(CLASSES)],
        options={"split": split, "images": images, "seed": seed, "size": size},
    )
    num_annotations = 0
    with writer:
        for number in range(images):
            pixels, annotations = draw_image(split, seed, number, size)
            for annotation in annotations:
                num_annotations += 1
                annotation["id"] = num_annotations
            record = {
                "image_id": number + 1,
                "file_name": f"{split}_{number + 1:06d}.jpg",
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "annotations": annotations,
            }
            writer.add(simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY), record)
            progress(number + 1, images)
    assert writer.manifest is not None
    return writer.manifest


def draw_image(
    split: str, seed: int, number: int, size: int
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw one image.

    Returns:
        ``(H, W, 3)`` uint8 RGB, and its annotations as in ``shard_set.Sample``, without ids.
    """
    key = ("shapes", split, seed, number)
    draws = Words(*key)
    short = round(size * draws.uniform(0.7, 1.0))
    height, width = (short, size) if draws.integer(2) else (size, short)
    canvas = _background(key, draws, height, width)
    num_objects = 0 if draws.uniform(0, 1) < EMPTY_IMAGES else 1 + draws.integer(MAX_OBJECTS)
    shapes: list[Shape] = []
    visible: list[Mask] = []
    for _ in range(num_objects):
        shape = _place(draws, visible, height, width, size)
        if shape is None:
            continue
        canvas = _paint(canvas, shape, draws)
        visible = [*(mask * (1 - shape.mask) for mask in visible), shape.mask]
        shapes.append(shape)
    noise = words(*key, "grain", count=-(-canvas.size // 8)).view(np.uint8)[: canvas.size]
    canvas += (noise.reshape(canvas.shape).astype(np.float32) - 127.5) * np.float32(12 / 127.5)
    annotations = [
        annotation
        for shape, mask in zip(shapes, visible, strict=True)
        if (annotation := annotate(shape, mask)) is not None
    ]
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), annotations


def annotate(shape: Shape, visible: Mask) -> dict[str, Any] | None:
    """Return the annotation of what is visible of an object.

    Args:
        shape: the object.
        visible: ``(H, W)`` 0 or 1: the pixels of it that nothing hides.

    Returns:
        An annotation without id, with a polygon if all of the object is visible, else with RLE;
        None if too little is visible.
    """
    area = int(visible.sum())
    if area < MIN_PIXELS or area < MIN_VISIBLE * shape.mask.sum():
        return None
    height, width = visible.shape
    low, high = shape.outline.min(axis=0), shape.outline.max(axis=0)
    is_inside = low.min() >= 0 and high[0] <= width and high[1] <= height
    mask: list[list[float]] | dict[str, Any]
    if is_inside and area == shape.mask.sum():
        box = [*low.tolist(), *(high - low).tolist()]
        mask = [shape.outline.ravel().tolist()]
    else:
        columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
        x, y = int(columns[0]), int(rows[0])
        box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
        rle = coco_mask.encode(np.asfortranarray(visible))
        mask = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    return {
        "id": 0,
        "label": shape.label,
        "bbox": [round(value, 2) for value in box],
        "area": area,
        "iscrowd": 0,
        "segmentation": mask,
    }


def _place(draws: Words, visible: list[Mask], height: int, width: int, size: int) -> Shape | None:
    """Draw an object that hides no other too much; None if that fails too often."""
    for _ in range(10):
        label = draws.integer(len(CLASSES))
        low, high = OBJECT_SIZE
        # Evenly over the logarithm: as many from 26 to 45 pixels as from 45 to 77.
        diameter = size * low * (high / low) ** draws.uniform(0, 1)
        center = np.array(
            [
                draws.uniform(0.4 * diameter, width - 0.4 * diameter),
                draws.uniform(0.4 * diameter, height - 0.4 * diameter),
            ]
        )
        corners = _unit_outline(label) * diameter / 2
        angle = draws.uniform(0, 2 * math.pi)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        outline = np.round(corners @ turn.T + center, 2)
        runs = coco_mask.frPyObjects([outline.ravel().tolist()], height, width)
        mask: Mask = coco_mask.decode(coco_mask.merge(runs))
        hidden = [int((old & mask).sum()) > MAX_NEWLY_HIDDEN * int(old.sum()) for old in visible]
        if not any(hidden):
            return Shape(label, outline, mask)
    return None


def _unit_outline(label: int) -> NDArray[np.float64]:
    """Return the corners of a class, ``(P, 2)``, on the unit circle around the origin."""
    name = CLASSES[label]
    num_corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = np.arange(num_corners) * 2 * math.pi / num_corners
    radii = np.ones(num_corners)
    if name == "star":
        radii[1::2] = 0.42
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _paint(canvas: Pixels, shape: Shape, draws: Words) -> Pixels:
    """Return the canvas ``(H, W, 3)`` with an object drawn over it, its edge smoothed."""
    height, width = canvas.shape[:2]
    large = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    # Pillow counts from the centers of pixels, outlines from the edge of the first one.
    points = shape.outline * SUPERSAMPLING - 0.5
    ImageDraw.Draw(large).polygon([(x, y) for x, y in points.tolist()], fill=255)
    cover = np.asarray(large.reduce(SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255
    behind = canvas[shape.mask.astype(bool)].mean(axis=0)
    color = _color(draws)
    for _ in range(10):
        if np.abs(color - behind).sum() >= MIN_CONTRAST:
            break
        color = _color(draws)
    shade = _ramp(draws, height, width) * np.float32(draws.uniform(0, 50))
    painted: Pixels = (canvas * (1 - cover) + (color + shade) * cover).astype(np.float32)
    return painted


def _background(key: tuple[str | int, ...], draws: Words, height: int, width: int) -> Pixels:
    """Return ``(H, W, 3)`` 0..255: a gradient, stripes, clouds or specks."""
    first, second = _color(draws), _color(draws)
    kind = draws.integer(4)
    part: Pixels | NDArray[np.float64]
    if kind == 0:
        part = (_ramp(draws, height, width) + 1) / 2
    elif kind == 1:
        waves = np.float32(draws.uniform(2, 12))
        part = (np.sin(_ramp(draws, height, width) * waves * np.float32(math.pi)) + 1) / 2
        part *= np.float32(draws.uniform(0.2, 0.6))
    else:
        cells = 3 + draws.integer(5) if kind == 2 else max(height, width) // 3
        values = words(*key, "background", count=cells * cells) >> np.uint64(56)
        grid = Image.fromarray(values.astype(np.uint8).reshape(cells, cells))
        resized = grid.resize((width, height), Image.Resampling.BICUBIC)
        part = np.asarray(resized, dtype=np.float32)[:, :, None] / 255
        part = part * np.float32(1.0 if kind == 2 else 0.4)
    return (first * (1 - part) + second * part).astype(np.float32)


def _ramp(draws: Words, height: int, width: int) -> Pixels:
    """Return ``(H, W, 1)`` from about -1 to 1 along a random direction."""
    angle = draws.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    return (x * math.cos(angle) + y * math.sin(angle)).astype(np.float32)


def _color(draws: Words) -> Pixels:
    """Return a random color, ``(3,)`` 0..255."""
    return np.array([draws.uniform(0, 255) for _ in range(3)], dtype=np.float32)
