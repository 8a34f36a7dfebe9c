"""The objects of a whole shard set as flat arrays, for all metrics.

Letters: I images, M objects of all images, P keypoints of an object.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import LABEL_LISTS, ShardSet
from bigdet.data.making.annotations import own_area
from bigdet.evaluation.federated import Verified, verified
from bigdet.evaluation.run_lengths import mask_areas


@dataclass(frozen=True)
class GroundTruth:
    """The objects to find. Objects of one image are adjacent, in the order of its record.

    Attributes:
        address: path or URL of the shard set, for messages.
        categories: in the order of the labels.
        image_ids: ``(I,)`` int64, rising. Other arrays refer to an image by its index here.
        sizes: ``(I, 2)`` int64 height and width, pixels.
        images: ``(M,)`` int64, the image of each object.
        labels: ``(M,)`` int64.
        boxes: ``(M, 4)`` float64 xywh, pixels.
        areas: ``(M,)`` float64 pixels, as given by the data set.
        is_crowd: ``(M,)`` bool.
        masks: M counts of compressed RLE, of the box if an object has no mask; empty if read
            without masks, like the next two.
        mask_areas: ``(M,)`` float64 areas of the masks, pixels.
        has_mask: ``(M,)`` bool.
        keypoints: ``(M, P, 3)`` float64 x, y, visibility, 0 for none; P is 0 if read without
            keypoints.
        verified: which classes are annotated on which image; None: all on all.
        source_ids: number of each image whose id in the data set is a string.
    """

    address: str
    categories: Sequence[Category]
    image_ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    masks: list[bytes]
    mask_areas: NDArray[np.float64]
    has_mask: NDArray[np.bool_]
    keypoints: NDArray[np.float64]
    verified: Verified | None
    source_ids: dict[str, int]


@functools.lru_cache(maxsize=1)
def read_ground_truth(shards: ShardSet, with_masks: bool, with_keypoints: bool) -> GroundTruth:
    """Read the objects of all samples; the last result is cached.

    Args:
        shards: the shard set.
        with_masks: convert polygons to masks, which takes most of the time.
        with_keypoints: read the keypoints of categories that have them.
    """
    order = np.argsort(shards.index["image_id"], kind="stable")
    num_points = keypoints_per_object(shards.categories) if with_keypoints else 0
    images, labels, is_crowd = array("q"), array("q"), array("b")
    # Lists of floats would need 8 times as much memory.
    boxes, areas, points = array("d"), array("d"), array("d")
    masks: list[bytes] = []
    has_mask: list[bool] = []
    none = [0.0] * (3 * num_points)
    absent, partial = array("q"), array("q")
    source_ids: dict[str, int] = {}
    for place, row in enumerate(order.tolist()):
        record = shards.record(row)
        if "source_id" in record:
            source_ids[record["source_id"]] = record["image_id"]
        for pairs, name in zip((absent, partial), LABEL_LISTS, strict=True):
            pairs.extend(place * shards.num_classes + label for label in record.get(name, []))
        objects, size = record["annotations"], (record["height"], record["width"])
        images.extend([place] * len(objects))
        labels.extend([each["label"] for each in objects])
        boxes.extend([number for each in objects for number in each["bbox"]])
        # 0 in sets that were not made by bigdet means unknown, not small.
        areas.extend([each["area"] or own_area(each, size)[1] for each in objects])
        is_crowd.extend([each["iscrowd"] for each in objects])
        if with_masks:
            masks += [_run_lengths(each, *size) for each in objects]
            has_mask += ["segmentation" in each for each in objects]
        if num_points:
            points.extend([n for each in objects for n in each.get("keypoints", none)])
    count = len(labels)
    sizes = np.stack([shards.index["height"][order], shards.index["width"][order]], axis=1)
    image_of_object = np.array(images, dtype=np.int64)
    present = image_of_object * shards.num_classes + np.array(labels, dtype=np.int64)
    is_federated = shards.manifest.federated
    pixels = _checked_areas(shards, masks, image_of_object, sizes.astype(np.int64), order)
    return GroundTruth(
        address=shards.address,
        categories=shards.categories,
        image_ids=shards.index["image_id"][order].astype(np.int64),
        sizes=sizes.astype(np.int64),
        images=image_of_object,
        labels=np.array(labels, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(count, 4),
        areas=np.array(areas, dtype=np.float64),
        is_crowd=np.array(is_crowd, dtype=np.bool_),
        masks=masks,
        mask_areas=pixels,
        has_mask=np.array(has_mask, dtype=np.bool_),
        keypoints=np.array(points, dtype=np.float64).reshape(count, num_points, 3),
        verified=verified(shards.num_classes, present, absent, partial) if is_federated else None,
        source_ids=source_ids,
    )


def _checked_areas(
    shards: ShardSet,
    masks: list[bytes],
    images: NDArray[np.int64],
    sizes: NDArray[np.int64],
    order: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the areas of all masks; ``ValueError`` for the first invalid one."""
    areas, are_masks = mask_areas(masks, sizes.prod(axis=1)[images[: len(masks)]])
    if not are_masks.all():
        row = int(order[images[np.flatnonzero(~are_masks)[0]]])
        raise ValueError(
            f"{shards.place(row)}: sample {shards.key(row)} has a segmentation that is not a mask "
            f"of its image. `bigdet check-shards {shards.address}` lists all; make the set again."
        )
    return areas


def keypoints_per_object(categories: Sequence[Category]) -> int:
    """Return P, the same for all categories with keypoints; 0 if there are none."""
    return max((len(category.keypoints or []) for category in categories), default=0)


def _run_lengths(annotation: dict[str, Any], height: int, width: int) -> bytes:
    """Return an object's mask, or its box if it has none, as counts of compressed RLE."""
    x, y, across, down = annotation["bbox"]
    right, bottom = x + across, y + down
    segmentation = annotation.get("segmentation", [[x, y, right, y, right, bottom, x, bottom]])
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, height, width)
        rle = coco_mask.merge(parts) if len(parts) > 1 else parts[0]
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        return bytes(segmentation["counts"], "ascii")
    counts: bytes = rle["counts"]
    return counts
