"""COCO's instance annotations and a folder of images, to shards.

What contradicts itself as a whole (an id given twice, an unknown category) is an error. What is
wrong with one image or one annotation is left out or clipped, counted in the manifest and listed
in ``skipped.jsonl``.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from pycocotools import mask as coco_mask

from bigdet.data.decode import decode_image
from bigdet.data.shard_writer import ShardWriter, image_suffix, refuse_shards
from bigdet.data.shards import Category, Manifest, ShardError

BOX_TOLERANCE = 0.01  # pixels: COCO's boxes have two decimals, so a sum may go over by rounding

Json = dict[str, Any]
Progress = Callable[[ShardWriter, int], None]


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file, checked as a whole.

    Attributes:
        images: records, by rising id.
        annotations: of each image id, in the order of the file.
        categories: by rising id; the place in the list is the label.
        unlisted: annotations of images that the file does not list.
    """

    images: list[Json]
    annotations: dict[int, list[Json]]
    categories: list[Category]
    unlisted: list[Json]


def convert_coco(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    shard_megabytes: int = 256,
    progress: Progress = lambda writer, num_images: None,
) -> Manifest:
    """Write COCO-format data as shards.

    Args:
        images: folder that the file names are relative to.
        annotations: a file like ``instances_train2017.json``.
        out: folder for the shards.
        shard_megabytes: size of a tar.
        progress: called after every image with the writer and the number of images listed.

    Returns:
        The manifest of the new set.

    Raises:
        ShardError: the input is not COCO, contradicts itself, or nothing in it can be used; then
            nothing is left in ``out``.
    """
    refuse_shards(out)  # before a file of 450 MB is read
    if not images.is_dir():
        raise ShardError(f"{images}: no such folder. Give the folder of the images.")
    coco = load_coco(annotations)
    _check_images_exist(images, annotations, coco.images)
    writer = ShardWriter(
        out,
        name=annotations.stem,
        source="coco",
        categories=coco.categories,
        options={"images": str(images), "annotations": str(annotations)}
        | {"shard_megabytes": shard_megabytes},
        shard_megabytes=shard_megabytes,
    )
    labels = {category.id: label for label, category in enumerate(coco.categories)}
    with writer:
        for annotation in coco.unlisted:
            ids = {"image_id": annotation["image_id"], "annotation_id": annotation["id"]}
            writer.change("annotation dropped: its image is not listed", **ids)
        for image in coco.images:
            data = _read_image(images, image, writer)
            if data is not None:
                sources = coco.annotations.get(image["id"], [])
                writer.add(data, _record(image, sources, labels, writer))
            progress(writer, len(coco.images))
    assert writer.manifest is not None
    return writer.manifest


def load_coco(path: Path) -> CocoFile:
    """Read an annotation file; ``ShardError`` if it is not COCO or contradicts itself."""
    content = _load_json(path)
    images = _entries(path, content, "images", {"id": int, "width": int, "height": int})
    annotations = _entries(
        path, content, "annotations", {"id": int, "image_id": int, "category_id": int}
    )
    categories = _entries(path, content, "categories", {"id": int, "name": str})
    for entry in images:
        if not isinstance(entry.get("file_name"), str):
            raise ShardError(f"{path}: image {entry['id']} has no file_name. Add it.")
    for what, entries in (
        ("image", images),
        ("annotation", annotations),
        ("category", categories),
    ):
        counts = Counter(entry["id"] for entry in entries)
        twice = [number for number, count in counts.items() if count > 1]
        _refuse(path, f"{what} ids that stand there more than once", twice)
    known = {entry["id"] for entry in categories}
    unknown = {entry["category_id"] for entry in annotations} - known
    _refuse(path, "annotations of category ids that are not in its categories", unknown)
    strange = [entry["id"] for entry in images if not 0 <= entry["id"] < 2**63]
    _refuse(path, "image ids that are negative or above 2**63 - 1", strange)
    listed = {entry["id"] for entry in images}
    by_image: dict[int, list[Json]] = defaultdict(list)
    for entry in annotations:
        by_image[entry["image_id"]].append(entry)
    return CocoFile(
        images=sorted(images, key=lambda entry: int(entry["id"])),
        annotations=by_image,
        categories=[
            Category(entry["id"], entry["name"], entry.get("supercategory"))
            for entry in sorted(categories, key=lambda entry: int(entry["id"]))
        ],
        unlisted=[entry for entry in annotations if entry["image_id"] not in listed],
    )


def _load_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read ({error.strerror}). Give the annotation file."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(
            f"{path}: not JSON ({error}). Give a COCO annotation file, unpacked."
        ) from error
    if not isinstance(content, dict):
        raise ShardError(
            f"{path}: not a COCO annotation file: the top is a {type(content).__name__}, expected "
            "an object with images, annotations and categories."
        )
    return content


def _entries(path: Path, content: Json, name: str, types: dict[str, type]) -> list[Json]:
    """Return one of the lists of a COCO file, after a look at what every entry must have."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise ShardError(
            f"{path}: not a COCO annotation file: it has no list of {name}, only "
            f"{', '.join(list(content)[:6]) or 'nothing'}. Expected images, annotations and "
            "categories."
        )
    if not entries and name != "annotations":
        raise ShardError(f"{path}: its list of {name} is empty. Nothing can be learned from it.")
    for place, entry in enumerate(entries):
        for key, kind in types.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if type(value) is not kind:
                raise ShardError(
                    f"{path}: {name}[{place}] is not as in COCO: {key} is {value!r}, expected "
                    f"{'an integer' if kind is int else 'a string'}. Correct the file."
                )
    return entries


def _refuse(path: Path, what: str, ids: Iterable[int]) -> None:
    if found := sorted(ids):
        listed = ", ".join(str(number) for number in found[:5]) + ", ..." * (len(found) > 5)
        raise ShardError(f"{path}: {len(found)} {what}: {listed}. Correct the file.")


def _check_images_exist(folder: Path, annotations: Path, images: list[Json]) -> None:
    """Fail at once, and not after an hour of misses, when the folder is the wrong one."""
    if not any(folder.iterdir()):
        raise ShardError(f"{folder}: the folder is empty. Give the folder of the images.")
    paths = (_safe_path(folder, image["file_name"]) for image in images)
    if not any(path is not None and path.is_file() for path in paths):
        raise ShardError(
            f"{folder}: holds none of the {len(images)} images that {annotations} names (the "
            f"first is {images[0]['file_name']}). Give the folder that the names are relative to."
        )


def _safe_path(folder: Path, name: str) -> Path | None:
    """Return the path of an image; None for a name that leads out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        return None
    return folder / pure


def _read_image(folder: Path, image: Json, writer: ShardWriter) -> bytes | None:
    """Return the bytes of an image that can be used; None after noting why it cannot."""
    about = {"image_id": image["id"], "file_name": image["file_name"]}
    path = _safe_path(folder, image["file_name"])
    if path is None:
        writer.skip("file name leads out of the image folder", **about)
        return None
    if not path.is_file():
        writer.skip("file missing", **about)
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        writer.skip("file not readable", **about, error=str(error))
        return None
    if image_suffix(data) is None:
        writer.skip("not JPEG, PNG or WebP", **about)
        return None
    try:
        height, width = decode_image(data).shape[1:]
    except ValueError as error:
        writer.skip("not decodable", **about, error=str(error))
        return None
    if (height, width) != (image["height"], image["width"]):
        recorded = [image["height"], image["width"]]
        writer.skip("size differs", **about, found=[height, width], recorded=recorded)
        return None
    return data


def _record(image: Json, sources: list[Json], labels: dict[int, int], writer: ShardWriter) -> Json:
    """Return the stored record of an image, see ``shards.Sample``."""
    height, width = image["height"], image["width"]
    annotations = []
    for source in sources:
        about = {"image_id": image["id"], "annotation_id": source["id"]}
        box = source.get("bbox")
        if not _are_numbers(box) or len(box) != 4:
            writer.change("annotation dropped: box is not four finite numbers", **about)
            continue
        clipped = clip_box(box, height, width)
        if clipped is None:
            writer.change("annotation dropped: box has no area in the image", **about)
            continue
        if clipped != box:
            writer.change("box clipped to the image", **about)
        area = [source.get("area")]
        annotation = {
            "id": source["id"],
            "label": labels[source["category_id"]],
            "bbox": clipped,
            "area": area[0] if _are_numbers(area) and area[0] >= 0 else clipped[2] * clipped[3],
            "iscrowd": int(bool(source.get("iscrowd"))),
        }
        if source.get("segmentation"):
            mask = clean_mask(source["segmentation"], height, width)
            if mask is None:
                writer.change("mask dropped: neither polygons nor RLE of the image", **about)
            else:
                annotation["segmentation"] = mask
        annotations.append(annotation)
    about = {"image_id": image["id"], "file_name": image["file_name"]}
    return {**about, "height": height, "width": width, "annotations": annotations}


def clip_box(box: list[float], height: int, width: int) -> list[float] | None:
    """Clip a box to its image.

    Args:
        box: x, y, width, height in pixels, finite.
        height: of the image.
        width: of the image.

    Returns:
        The box in the same form, untouched where it is inside; None if no area is left.
    """
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return None
    inside = min(x, y) >= -BOX_TOLERANCE
    if inside and x + w <= width + BOX_TOLERANCE and y + h <= height + BOX_TOLERANCE:
        return box
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + w, width), min(y + h, height)
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def clean_mask(segmentation: Any, height: int, width: int) -> list[list[float]] | Json | None:
    """Return a mask in the form in which shards hold it.

    Args:
        segmentation: as COCO has it: polygons; RLE with counts as a list or compressed.
        height: of the image.
        width: of the image.

    Returns:
        Polygons as they are, without those of less than three points; RLE compressed; None for
        what is neither or does not fit the image.
    """
    if isinstance(segmentation, list):
        # pycocotools allocates by the length of the edges, so no point may lie miles away.
        polygons = [
            polygon
            for polygon in segmentation
            if _are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if all(-width <= x <= 2 * width for x in polygon[::2])
            if all(-height <= y <= 2 * height for y in polygon[1::2])
        ]
        return polygons or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return None
    if sum(counts) != height * width:  # pycocotools would write beyond the bitmap
        return None
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def decode_counts(text: str) -> list[int] | None:
    """Return the run lengths of a compressed RLE; None if it is none (pycocotools checks nothing).

    COCO writes each number in digits of 5 bits, lowest first, plus 48; bit 5 says that another
    digit follows, bit 4 of the last one is the sign. From the fourth number on it is the
    difference to the number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
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


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Tell whether this is a list of finite numbers."""
    return isinstance(values, list) and all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    )
