"""Annotations converted between an image as stored and as its EXIF orientation shows it.

The record of a sample in a tar describes the stored pixels, because these are what every reader of
tars gets; if the image was annotated turned, ``seen_orientation`` is in the record. ``ShardSet``
returns such a record turned, as the data set has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from bigdet.pictures.pixels import Exif, inverse_of, turn_pixels, turn_points, turned_size

ORIENTATION_KEY = "seen_orientation"
SHOWN = "EXIF orientation applied: the recorded size is that of the image as shown"
STORED = "EXIF orientation left out: the recorded size is that of the image as stored"
SHOWN_BY_OPTION = "EXIF orientation applied by --exif shown: the recorded size does not tell"
STORED_BY_OPTION = "EXIF orientation left out by --exif stored: the recorded size does not tell"

Json = dict[str, Any]
Size = tuple[int, int]


def seen_orientation(
    tag: int, stored: Size, recorded: Size | None, exif: Exif
) -> tuple[int, str | None]:
    """Return the orientation in which an image was annotated.

    Args:
        tag: its EXIF orientation, ``1..8``.
        stored: height, width of its pixels.
        recorded: the size in its annotations, as stored or turned; None if there is none.
        exif: decides if ``recorded`` does not.

    Returns:
        The orientation to turn it by, and a note for the log; 1 and None without a tag.
    """
    if tag == 1:
        return 1, None
    shown = turned_size(stored, tag)
    if recorded is not None and shown != stored:
        return (tag, SHOWN) if recorded == shown else (1, STORED)
    return (tag, SHOWN_BY_OPTION) if exif == "shown" else (1, STORED_BY_OPTION)


def exif_warning(changed: dict[str, int]) -> str | None:
    """Return a warning about images that may have been turned wrongly, by a manifest's counts."""
    if not (STORED in changed and SHOWN_BY_OPTION in changed):
        return None
    return (
        f"the sizes of {changed[STORED]} images say that their annotations are of the stored "
        f"pixels, so those of the {changed[SHOWN_BY_OPTION]} whose sizes fit both may be too: "
        "check them, and convert with --exif stored if their boxes are wrong"
    )


def as_stored(record: Json, orientation: int) -> Json:
    """Return the record for the tar of an image that was annotated turned."""
    if orientation == 1:
        return record
    return {**_turn_record(record, inverse_of(orientation)), ORIENTATION_KEY: orientation}


def as_seen(record: Json) -> Json:
    """Return the record of a tar for the image as it was annotated; undoes ``as_stored``."""
    if ORIENTATION_KEY not in record:
        return record
    seen = _turn_record(record, record[ORIENTATION_KEY])
    del seen[ORIENTATION_KEY]
    return seen


def _turn_record(record: Json, orientation: int) -> Json:
    size = (record["height"], record["width"])
    height, width = turned_size(size, orientation)
    annotations = [_turn_annotation(entry, size, orientation) for entry in record["annotations"]]
    return {**record, "height": height, "width": width, "annotations": annotations}


def _turn_annotation(annotation: Json, size: Size, orientation: int) -> Json:
    """Return an annotation turned with its image, which had ``size`` (height, width) before."""
    x, y, w, h = annotation["bbox"]
    x0, y0, x1, y1 = turn_points([x, y, x + w, y + h], size, orientation)
    height, width = turned_size((h, w), orientation)
    turned = {**annotation, "bbox": [min(x0, x1), min(y0, y1), width, height]}
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        turned["segmentation"] = [turn_points(part, size, orientation) for part in mask]
    elif mask is not None:
        turned["segmentation"] = _turn_runs(mask, orientation)
    if keypoints := annotation.get("keypoints"):
        turned["keypoints"] = _turn_keypoints(keypoints, size, orientation)
    return turned


def _turn_keypoints(keypoints: list[float], size: Size, orientation: int) -> list[float]:
    """Return x, y, visibility of each keypoint; those that are not labeled stay as they are."""
    turned = list(keypoints)
    centers = (size[0] - 1, size[1] - 1)  # COCO's 0 is the center of the first pixel
    for place in range(0, len(keypoints), 3):
        if keypoints[place + 2]:
            point = keypoints[place : place + 2]
            turned[place : place + 2] = turn_points(point, centers, orientation)
    return turned


def _turn_runs(mask: Json, orientation: int) -> Json:
    """Return a run-length encoded mask, compressed or not, as a compressed one."""
    if isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, *mask["size"])
    bitmap = turn_pixels(coco_mask.decode(mask), orientation)
    counts: bytes = coco_mask.encode(np.asfortranarray(bitmap))["counts"]
    return {"size": list(bitmap.shape), "counts": counts.decode("ascii")}
