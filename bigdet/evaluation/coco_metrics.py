"""Average precision as COCO defines it, with pycocotools, on the ground truth of a shard set.

Detections come as COCO results: a list of dicts with ``image_id``, ``category_id``, ``score`` and
``bbox`` (xywh, pixels of the original image), and maybe ``segmentation`` (compressed RLE) or
``keypoints`` (x, y, score of each, flat).
Letters: T IoU thresholds, R recalls, K classes, A area ranges, D limits of detections per image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bigdet.data.shards import FLAG_KEYPOINTS, FLAG_MASKS, ShardSet

Kind = Literal["bbox", "segm", "keypoints"]
Result = dict[str, Any]  # one detection in the COCO results format
Metrics = dict[str, Any]  # kind -> name -> number, and "per_class" -> kind -> class -> AP

METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
"""Our names and the positions of these numbers in ``COCOeval.stats``."""
KEYPOINT_METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APm": 3, "APl": 4, "AR20": 5}
"""The same for keypoints, of which small objects have none: 20 detections of an image count."""
KIND_NAMES: dict[Kind, str] = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""What people call the kinds."""
OTHER_SIGMA = 0.05
"""Tolerance of keypoints in object sides, where they are not the 17 that COCO has measured."""


def evaluation_kinds(shards: ShardSet, with_masks: bool, with_keypoints: bool) -> tuple[Kind, ...]:
    """Return what can be measured: boxes always, the rest if both model and data have it.

    Args:
        shards: the validation set.
        with_masks: the model predicts masks.
        with_keypoints: the model predicts keypoints.
    """
    flags = int(np.bitwise_or.reduce(shards.index["flags"])) if len(shards) else 0
    kinds: list[Kind] = ["bbox"]
    if with_masks and flags & FLAG_MASKS:
        kinds.append("segm")
    if with_keypoints and flags & FLAG_KEYPOINTS:
        kinds.append("keypoints")
    return tuple(kinds)


def category_ids(shards: ShardSet) -> list[int]:
    """Return the data set's own category id of each label, ``(K,)``."""
    return [category.id for category in shards.categories]


def coco_ground_truth(shards: ShardSet) -> dict[str, Any]:
    """Return the annotations of all samples as the content of a COCO file.

    Annotations are numbered anew from 1: data sets do have the id 0, which pycocotools takes for
    "not matched". An object without a mask beside others that have one is a box to ignore.
    """
    ids = category_ids(shards)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in range(len(shards)):
        record = shards.record(row)
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": record["file_name"], **size})
        for source in record["annotations"]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["image_id"],
                "category_id": ids[source["label"]],
                "bbox": source["bbox"],
                "area": source["area"],
                "iscrowd": source["iscrowd"],
            }
            if "segmentation" in source:
                annotation["segmentation"] = source["segmentation"]
            if "keypoints" in source:
                annotation["keypoints"] = source["keypoints"]
            annotations.append(annotation)
    categories = [{"id": category.id, "name": category.name} for category in shards.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def evaluate_detections(
    shards: ShardSet, results: Sequence[Result], kinds: Sequence[Kind]
) -> Metrics:
    """Measure detections against the ground truth of a whole shard set.

    Args:
        shards: the validation set; images without detections count too.
        results: detections of any of its images, in any order; with ``bbox`` for the kind
            ``bbox``, ``segmentation`` for ``segm``, ``keypoints`` for ``keypoints``.
        kinds: what to measure, see ``evaluation_kinds``.

    Returns:
        Per kind the numbers of ``METRICS`` (keypoints: ``KEYPOINT_METRICS``) in 0..1, and under
        ``per_class`` the AP by class name.
        None stands where there is nothing to measure: no object of this class or size.
    """
    truth = coco_ground_truth(shards)
    names = [category["name"] for category in truth["categories"]]
    metrics: Metrics = {}
    per_class = {}
    for kind in kinds:
        stats, class_aps = _measure(truth, results, kind)
        places = KEYPOINT_METRICS if kind == "keypoints" else METRICS
        metrics[kind] = {name: _defined(stats[place]) for name, place in places.items()}
        per_class[kind] = dict(zip(names, class_aps, strict=True))
    metrics["per_class"] = per_class
    return metrics


def metrics_table(metrics: Metrics, per_class: bool = False) -> str:
    """Return the numbers as text, in 0..1, with a dash where there is nothing to measure.

    Args:
        metrics: what ``evaluate_detections`` returns.
        per_class: add a line with the AP of each class.
    """
    kinds = [kind for kind in KIND_NAMES if kind in metrics]
    rows = [["", *METRICS]]
    rows += [
        [KIND_NAMES[kind], *(_text(metrics[kind].get(name)) for name in METRICS)] for kind in kinds
    ]
    lines = [f"{first:<8}" + "".join(f"{cell:>7}" for cell in cells) for first, *cells in rows]
    if per_class:
        aps = metrics["per_class"]
        width = max(len(name) for name in aps["bbox"])
        lines += ["", " " * width + "".join(f"{KIND_NAMES[kind] + ' AP':>12}" for kind in kinds)]
        for name in aps["bbox"]:
            cells = "".join(f"{_text(aps[kind][name]):>12}" for kind in kinds)
            lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


def _measure(
    truth: dict[str, Any], results: Sequence[Result], kind: Kind
) -> tuple[NDArray[np.float64], list[float | None]]:
    """Return the numbers of COCOeval, and the AP of each category in the order of ``truth``."""
    counts = {len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a}
    num_keypoints = max(counts, default=0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints; numbers are returned
        gt = _index(
            {
                **truth,
                "annotations": [_truth_of(a, kind, num_keypoints) for a in truth["annotations"]],
            }
        )
        found = [_detection_of(r, number + 1, kind) for number, r in enumerate(results)]
        evaluation = COCOeval(gt, _index({**truth, "annotations": found}), kind)
        if kind == "keypoints" and len(evaluation.params.kpt_oks_sigmas) != num_keypoints:
            evaluation.params.kpt_oks_sigmas = np.full(num_keypoints, OTHER_SIGMA)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][
        :, :, :, 0, -1
    ]  # (T, R, K): all areas, most detections
    by_id = {
        category: _mean_of_defined(precision[:, :, place])
        for place, category in enumerate(evaluation.params.catIds)
    }
    return evaluation.stats, [by_id[category["id"]] for category in truth["categories"]]


def _index(dataset: dict[str, Any]) -> COCO:
    """Return pycocotools' view of a data set (``loadRes`` fails where nothing was detected)."""
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _truth_of(annotation: dict[str, Any], kind: Kind, num_keypoints: int) -> dict[str, Any]:
    """Copy an annotation, which pycocotools writes into.

    Without a mask, or without any labelled keypoint, it is a box to ignore.
    """
    if kind == "keypoints":
        points = annotation.get("keypoints", [0] * (3 * num_keypoints))
        num_labelled = sum(visibility > 0 for visibility in points[2::3])
        return {**annotation, "keypoints": points, "num_keypoints": num_labelled}
    if kind == "segm" and "segmentation" not in annotation:
        x, y, width, height = annotation["bbox"]
        right, bottom = x + width, y + height
        corners = [[x, y, right, y, right, bottom, x, bottom]]
        return {**annotation, "segmentation": corners, "iscrowd": 1}
    return dict(annotation)


def _detection_of(result: Result, number: int, kind: Kind) -> dict[str, Any]:
    """Return the annotation that pycocotools expects; its area decides between APs, APm and APl."""
    annotation = {key: result[key] for key in ("image_id", "category_id", "score")}
    annotation.update(id=number, iscrowd=0)
    if kind == "bbox":
        area = result["bbox"][2] * result["bbox"][3]
        return {**annotation, "bbox": result["bbox"], "area": area}
    if kind == "keypoints":  # the area is that of the points' own box, as in pycocotools' loadRes
        points = result["keypoints"]
        width, height = max(points[0::3]) - min(points[0::3]), max(points[1::3]) - min(points[1::3])
        box = [min(points[0::3]), min(points[1::3]), width, height]
        return {**annotation, "keypoints": points, "bbox": box, "area": width * height}
    # The area of the mask, as in the COCO server; with a box beside it loadRes takes the box's.
    mask = result["segmentation"]
    return {**annotation, "segmentation": mask, "area": float(coco_mask.area(mask))}


def _defined(number: float) -> float | None:
    """Return the number, or None for pycocotools' -1: nothing to measure."""
    return None if number < 0 else float(number)


def _mean_of_defined(precision: NDArray[np.float64]) -> float | None:
    """Return the mean over thresholds and recalls, or None for a class without objects."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
