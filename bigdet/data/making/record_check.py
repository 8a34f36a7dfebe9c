"""Whether the record of a sample is what readers of shards rely on, see ``shard_set.Sample``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import LABEL_LISTS
from bigdet.data.making.annotations import are_numbers, clean_mask
from bigdet.data.making.loose_values import MAX_ID

EDGE_TOLERANCE = 1  # pixels: converters check exactly where an edge is


def record_problem(record: Any) -> str | None:
    """Return what is wrong with a record apart from its annotations; None for nothing."""
    if not isinstance(record, dict):
        return f"its JSON is a {type(record).__name__}, expected an object"
    for name in ("image_id", "height", "width"):
        value = record.get(name)
        lowest = 0 if name == "image_id" else 1
        if type(value) is not int or not lowest <= value <= MAX_ID:
            return f"{name} is {value!r}, expected a whole number"
    if not isinstance(record.get("file_name"), str):
        return f"file_name is {record.get('file_name')!r}, expected a string"
    if not isinstance(record.get("source_id", ""), str):
        return f"source_id is {record['source_id']!r}, expected a string"
    entries = record.get("annotations")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return "annotations is not a list of objects"
    return None


def annotation_problems(record: dict[str, Any], categories: list[Category]) -> Iterator[str]:
    """Yield what is wrong with the annotations of a record that has no other problem."""
    image_size = (record["height"], record["width"])
    for name in LABEL_LISTS:
        labels = record.get(name, [])
        if not isinstance(labels, list) or not all(
            type(label) is int and 0 <= label < len(categories) for label in labels
        ):
            yield f"{name} is {labels!r}, expected labels of {len(categories)} classes"
    for place, annotation in enumerate(record["annotations"]):
        name = f"annotation {annotation.get('id', f'number {place}')}"
        if what := _annotation_problem(annotation, image_size, categories):
            yield f"{name}: {what}"


def _annotation_problem(
    annotation: dict[str, Any], image_size: tuple[int, int], categories: list[Category]
) -> str | None:
    number, label, box = (annotation.get(key) for key in ("id", "label", "bbox"))
    if type(number) is not int or abs(number) > MAX_ID:
        return f"id is {number!r}, expected a whole number"
    if type(label) is not int or not 0 <= label < len(categories):
        return f"label {label!r}, there are {len(categories)} classes"
    if annotation.get("iscrowd") not in (0, 1):
        return f"iscrowd is {annotation.get('iscrowd')!r}, expected 0 or 1"
    if not are_numbers([annotation.get("area")]) or annotation["area"] < 0:
        return f"area is {annotation.get('area')!r}, expected square pixels"
    if not are_numbers(box) or len(box) != 4:
        return f"box {box!r}, expected four numbers"
    x, y, w, h = box
    height, width = image_size
    is_inside = (
        min(x, y) >= -EDGE_TOLERANCE
        and x + w <= width + EDGE_TOLERANCE
        and y + h <= height + EDGE_TOLERANCE
    )
    if not (w > 0 and h > 0 and is_inside):
        return f"box {box} in {image_size}"
    return _outline_problem(annotation, image_size, categories[label])


def _outline_problem(
    annotation: dict[str, Any], image_size: tuple[int, int], category: Category
) -> str | None:
    if "segmentation" in annotation:
        mask = annotation["segmentation"]
        cleaned = clean_mask(mask, *image_size)
        is_whole = not isinstance(cleaned, list) or len(cleaned) == len(mask)
        if cleaned is None or not is_whole:
            return f"segmentation is neither polygons nor RLE of {image_size}"
    if "keypoints" in annotation:
        points, names = annotation["keypoints"], category.keypoints
        if names is None:
            return "has keypoints, but its category has none"
        if not are_numbers(points) or len(points) != 3 * len(names):
            return f"keypoints are not {len(names)} times x, y, visibility"
        if set(points[2::3]) - {0, 1, 2}:
            return "visibility of a keypoint is not 0, 1 or 2"
    return None
