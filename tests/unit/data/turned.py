"""Images with an EXIF orientation, whose red rectangle is at ``BOX`` when they are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

BOX = [8, 6, 30, 18]  # x, y, width, height as shown
KEYPOINTS = [8, 6, 2, 37, 23, 1, 0, 0, 0]  # centers of its first and last pixel; one not labeled
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""From shown to stored."""


def shown_pixels(height: int, width: int) -> np.ndarray:
    """Return ``(height, width, 3)`` gray with the red rectangle."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    x, y, w, h = BOX
    pixels[y : y + h, x : x + w] = (230, 30, 30)
    return pixels


def turned_file(
    orientation: int, kind: str = "JPEG", size: tuple[int, int] = (64, 96), **options: Any
) -> bytes:
    """Return a file that is shown as ``shown_pixels`` of height and width ``size``."""
    image = Image.fromarray(shown_pixels(*size))
    if orientation != 1:
        image = image.transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **quality.get(kind, {}), **options)
    return file.getvalue()


def red_box(pixels: np.ndarray) -> list[int]:
    """Return where the red rectangle is in ``(H, W, 3)`` pixels."""
    is_red = pixels[..., 0].astype(int) - pixels[..., 1] > 70
    columns, rows = np.flatnonzero(is_red.any(axis=0)), np.flatnonzero(is_red.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def annotations_of(image_id: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return three annotations of ``BOX``: with a polygon, uncompressed RLE, and keypoints."""
    x, y, w, h = BOX
    bitmap = np.zeros(size, dtype=np.uint8)
    bitmap[y : y + h, x : x + w] = 1
    runs = np.flatnonzero(np.diff(bitmap.T.ravel(), prepend=0, append=0))
    counts = np.diff(runs, prepend=0, append=bitmap.size).tolist()
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    extras = [
        {"segmentation": [polygon]},
        {"segmentation": {"size": list(size), "counts": counts}},
        {"keypoints": KEYPOINTS, "num_keypoints": 2},
    ]
    return [
        {
            "id": 10 * image_id + number,
            "image_id": image_id,
            "category_id": 1,
            "bbox": BOX,
            "area": w * h,
            "iscrowd": 0,
            **extra,
        }
        for number, extra in enumerate(extras)
    ]


def write_coco(folder: Path, files: dict[str, bytes], size: tuple[int, int]) -> Path:
    """Write images, recorded with one height and width, and annotations; return the latter."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, data) in enumerate(files.items(), 1):
        (folder / "images" / name).write_bytes(data)
        about = {"id": number, "file_name": name, "height": size[0], "width": size[1]}
        images.append(about)
        annotations += annotations_of(number, size)
    category = {"id": 1, "name": "part", "keypoints": ["left", "right", "top"], "skeleton": []}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def mask_box(segmentation: Any, size: tuple[int, int]) -> list[int]:
    """Return the box of a mask's pixels, polygons or compressed RLE."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    assert list(segmentation["size"]) == list(size)
    return [int(value) for value in coco_mask.toBbox(segmentation)]
