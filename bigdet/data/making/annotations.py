"""Annotations of a data set, checked and brought into the form of shards.

Everything that is left out or altered is noted with its reason.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from bigdet.data.format.manifest import Category, Manifest
from bigdet.data.format.shard_set import is_no_mask
from bigdet.data.making.loose_values import truth_value, with_numbers
from bigdet.data.making.shard_tar import SampleLog

BOX_TOLERANCE = 0.01  # pixels: COCO's boxes have two decimals, so a sum may go over by rounding
MIN_SIDE = 0.01  # pixels: float32 edges of a thinner box, far from the origin, would coincide
MAX_NUMBER = 1e15  # larger coordinates are no pixels, and sums of them lose whole pixels
IGNORE_FLAGS = ("ignore", "difficult", "is_crowd", "IsGroupOf")
"""Flags of objects that are neither learned nor counted as missed: those of mmdetection and VOC, a
spelling of ``iscrowd``, that of Open Images for a box around many. Objects365's ``isfake`` and
``isreflected`` mark objects that its evaluation counts, so they are not read.
"""

CLIPPED = "box clipped to the image"

Json = dict[str, Any]


def clean_annotation(
    source: Json,
    image_size: tuple[int, int],
    label: int,
    category: Category,
    about: Json,
    log: SampleLog,
) -> Json | None:
    """Return an annotation as shards hold it, see ``shard_set.Sample``.

    Args:
        source: ``id, bbox`` (xywh), maybe ``area, iscrowd, segmentation, keypoints``, as in COCO,
            and ``IGNORE_FLAGS``; only the id has been checked.
        image_size: height and width.
        label: place of the category, from 0.
        category: its keypoints matter here.
        about: says in the log which annotation it is.
        log: gets what is left out or altered.

    Returns:
        None if the annotation cannot be used.
    """
    height, width = image_size
    box = with_numbers(source.get("bbox"))
    if not are_numbers(box) or len(box) != 4:
        log.change("annotation dropped: box is not four finite numbers", **about)
        return None
    if truth_value(source.get("iscrowd")) is None:
        log.change("annotation dropped: iscrowd is neither 0 nor 1", **about)
        return None
    if angle := _rotation(source):
        box = _around_turned(box, angle)
        log.change(
            "rotated box replaced by the upright one around it (attributes.rotation)", **about
        )
    clipped = clip_box(box, height, width)
    if clipped is None:
        log.change("annotation dropped: box has no area in the image", **about)
        return None
    if clipped != box:
        log.change(CLIPPED, **about)
    areas = [with_numbers(source.get("area"))]
    annotation = {"id": source["id"], "label": label, "bbox": clipped, "area": areas[0]}
    annotation["iscrowd"] = int(_is_crowd(source, about, log))
    _add_outlines(annotation, source, image_size, category, about, log)
    # An area of 0 was not measured: as a size it would make the object small.
    if not are_numbers(areas) or not 0 < areas[0] <= height * width:
        what, annotation["area"] = own_area(annotation, image_size)
        if areas[0] is not None:
            log.change(f"area replaced by that of the {what}", **about)
    return annotation


def _is_crowd(source: Json, about: Json, log: SampleLog) -> bool:
    """Return whether an object is neither learned nor counted as missed."""
    if truth_value(source.get("iscrowd")):
        return True
    for flag in IGNORE_FLAGS:
        if truth_value(source.get(flag)) is not False:
            log.change(f"object made crowd: {flag} is set", **about)
            return True
    return False


def _rotation(source: Json) -> float:
    """Return the radians, clockwise, by which CVAT turns a box around its center."""
    attributes = source.get("attributes")
    angle = with_numbers(attributes.get("rotation")) if isinstance(attributes, dict) else 0
    return math.radians(angle) if are_numbers([angle]) else 0.0


def _around_turned(box: list[float], angle: float) -> list[float]:
    """Return the upright box around one that is turned; both are x, y, width, height."""
    x, y, w, h = box
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    width, height = w * cosine + h * sine, w * sine + h * cosine
    sides = (x + (w - width) / 2, y + (h - height) / 2, width, height)
    return [round(side, 2) for side in sides]


def _is_relative(mask: list[list[float]] | Json, box: list[float]) -> bool:
    """Return whether polygons are in fractions of the image while the box is in pixels."""
    return isinstance(mask, list) and max(map(max, mask)) <= 1 and min(box[2:]) > 1


def are_relative(points: list[float], box: list[float]) -> bool:
    """Return whether keypoints are in fractions of the image while the box is in pixels."""
    seen = [
        v for place in range(0, len(points), 3) if points[place + 2] for v in points[place:][:2]
    ]
    is_within = bool(seen) and min(seen) >= 0 and max(seen) <= 1 < min(box[2:])
    return is_within and any(value % 1 for value in seen)


def own_area(annotation: Json, image_size: tuple[int, int]) -> tuple[str, float]:
    """Return the area of an object's mask, or of its box if it has none, and which it is."""
    mask = annotation.get("segmentation")
    if mask is not None:
        rles = coco_mask.frPyObjects(mask, *image_size) if isinstance(mask, list) else [mask]
        if pixels := int(coco_mask.area(coco_mask.merge(rles))):
            return "mask", pixels
    return "box", annotation["bbox"][2] * annotation["bbox"][3]


def _add_outlines(
    annotation: Json,
    source: Json,
    image_size: tuple[int, int],
    category: Category,
    about: Json,
    log: SampleLog,
) -> None:
    """Add mask and keypoints of the source to an annotation if they can be used."""
    mask: Any = source.get("segmentation")
    if not is_no_mask(mask):
        cleaned = clean_mask(mask, *image_size)
        if cleaned is None:
            log.change("mask dropped: neither polygons nor RLE of the image", **about)
        elif _is_relative(cleaned, annotation["bbox"]):
            log.change("mask dropped: within 0 to 1, so relative coordinates", **about)
        else:
            annotation["segmentation"] = cleaned
            if isinstance(cleaned, list) and len(cleaned) < len(mask):
                log.change("part of a mask dropped: not a polygon in the image", **about)
    if source.get("keypoints") not in (None, []):
        points = _clean_keypoints(
            with_numbers(source["keypoints"]), image_size, category, about, log
        )
        if points is not None and are_relative(points, annotation["bbox"]):
            log.change("keypoints dropped: within 0 to 1, so relative coordinates", **about)
        elif points is not None:
            annotation["keypoints"] = points


def clip_box(box: list[float], height: int, width: int) -> list[float] | None:
    """Clip a box (x, y, width, height in pixels, finite) to its image; None if no area is left.

    A box that is inside is returned as it is.
    """
    x, y, w, h = box
    if min(w, h) < MIN_SIDE:
        return None
    inside = min(x, y) >= -BOX_TOLERANCE
    if inside and x + w <= width + BOX_TOLERANCE and y + h <= height + BOX_TOLERANCE:
        return box
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + w, width), min(y + h, height)
    return [x0, y0, x1 - x0, y1 - y0] if min(x1 - x0, y1 - y0) >= MIN_SIDE else None


def box_warning(manifest: Manifest) -> str | None:
    """Return a warning if most boxes of a set reach beyond their images; else None."""
    num_clipped, num_boxes = manifest.changed.get(CLIPPED, 0), manifest.instances + manifest.crowd
    if 2 * num_clipped <= num_boxes:
        return None
    what = "Boxes are x, y, width, height in pixels; do these have two corners"
    if manifest.source == "voc":
        what = "VOC counts pixels from 1; do these count from 0"
    return (
        f"{num_clipped:,} of {num_boxes:,} boxes reach beyond their image. {what}, or are they of "
        "images of another size?"
    )


def clean_mask(segmentation: Any, height: int, width: int) -> list[list[float]] | Json | None:
    """Return a mask of an image, polygons or RLE as in COCO, in the form of shards.

    Polygons stay as they are (one that crosses itself covers what it goes around an odd number of
    times), without those that are invalid or outside of the image; RLE becomes compressed. None for
    what is neither, does not fit the image or is empty.
    """
    if isinstance(segmentation, list):
        polygons = [part for part in segmentation if _is_polygon(part, height, width)]
        return polygons or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return None
    # pycocotools would write beyond the bitmap.
    if sum(counts) != height * width or sum(counts[1::2]) == 0:
        return None
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def decode_counts(text: str) -> list[int] | None:
    """Return the run lengths of a compressed RLE; None if not valid (pycocotools checks nothing).

    COCO writes each number in digits of 5 bits, lowest first, plus 48; bit 5 says that another
    digit follows, bit 4 of the last one is the sign. From the fourth number on it is the
    difference to the number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            return None
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts if shift == 0 else None


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Return whether this is a list of finite numbers that can be coordinates."""
    return isinstance(values, list) and all(
        type(value) in (int, float) and abs(value) <= MAX_NUMBER for value in values
    )


def _is_polygon(part: Any, height: int, width: int) -> bool:
    """Return whether this is a polygon that can contain pixels of the image."""
    if not are_numbers(part) or len(part) < 6 or len(part) % 2:
        return False
    x, y = part[::2], part[1::2]
    left, top, right, bottom = min(x), min(y), max(x), max(y)
    # pycocotools allocates by the length of edges, so points far outside are refused.
    if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
        return False
    return left < min(right, width) and top < min(bottom, height) and right > 0 and bottom > 0


def _clean_keypoints(
    points: Any, image_size: tuple[int, int], category: Category, about: Json, log: SampleLog
) -> list[float] | None:
    """Return x, y, visibility of each keypoint, flat: 0 not labeled, 1 hidden, 2 visible."""
    names = category.keypoints
    if names is None:
        log.change("keypoints dropped: the category has none", **about)
        return None
    if not are_numbers(points) or len(points) != 3 * len(names):
        log.change(f"keypoints dropped: not {len(names)} times x, y, 0 to 2", **about)
        return None
    if others := sorted(set(points[2::3]) - {0, 1, 2}):
        log.change("keypoints dropped: a visibility is not 0, 1 or 2", **about, found=others)
        return None
    height, width = image_size
    table = np.array(points, dtype=np.float64).reshape(-1, 3)
    outside = (table[:, :2] < 0).any(axis=1) | (table[:, 0] > width) | (table[:, 1] > height)
    outside &= table[:, 2] > 0
    cleaned = list(points)
    for place in np.flatnonzero(outside).tolist():
        log.change("keypoint outside of the image set to not labeled", **about, keypoint=place)
        cleaned[3 * place : 3 * place + 3] = [0, 0, 0]
    for place in range(2, len(cleaned), 3):
        cleaned[place] = int(cleaned[place])
    return cleaned
