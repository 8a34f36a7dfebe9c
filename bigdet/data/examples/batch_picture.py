"""A batch as the model sees it, with its targets, drawn on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigdet.data.format.manifest import Category
from bigdet.pictures.drawing import draw
from bigdet.structures import Batch, Masks

GAP = 4  # pixels between pictures


def draw_batch(batch: Batch, categories: Sequence[Category]) -> Image.Image:
    """Draw a batch on the CPU, padding included; images of masked slots are darkened."""
    pictures = [_picture(batch, slot, categories) for slot in range(len(batch.images))]
    num_columns = math.ceil(math.sqrt(len(pictures)))
    num_rows = -(-len(pictures) // num_columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (num_columns * (width + GAP), num_rows * (height + GAP)), "white")
    for slot, picture in enumerate(pictures):
        row, column = divmod(slot, num_columns)
        sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
    return sheet


def _picture(batch: Batch, slot: int, categories: Sequence[Category]) -> Image.Image:
    """Draw one image of a batch with its objects."""
    targets = batch.targets
    first, last = targets.offsets[slot : slot + 2].tolist()
    pixels = batch.images[slot].permute(1, 2, 0).numpy()
    labels = targets.labels[first:last].tolist()
    is_crowd = targets.is_crowd[first:last].tolist()
    keypoints = None if targets.keypoints is None else targets.keypoints[first:last].numpy()
    picture = draw(
        pixels,
        targets.boxes[first:last].numpy(),
        [
            f"{categories[label].name}{' (crowd)' if crowd else ''}"
            for label, crowd in zip(labels, is_crowd, strict=True)
        ],
        labels,
        masks=_bitmaps(targets.masks, first, last, pixels.shape[:2]),
        keypoints=keypoints,
        skeletons=[categories[label].skeleton or [] for label in labels],
    )
    return picture if batch.weights[slot] else picture.point(lambda value: value // 3)


def _bitmaps(
    masks: Masks | None, first: int, last: int, size: tuple[int, int]
) -> list[NDArray[np.bool_] | None] | None:
    """Return the masks of some objects, each on the whole canvas."""
    if masks is None:
        return None
    bitmaps: list[NDArray[np.bool_] | None] = []
    for i in range(first, last):
        height, width = masks.sizes[i].tolist()
        x, y = masks.origins[i].tolist()
        bitmap = np.zeros(size, dtype=np.bool_)
        crop = masks.bits[masks.offsets[i] : masks.offsets[i + 1]].view(height, width)
        bitmap[y : y + height, x : x + width] = crop.numpy()
        bitmaps.append(bitmap if crop.numel() else None)
    return bitmaps
