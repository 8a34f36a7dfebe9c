"""Average precision as PASCAL VOC defines it: over 11 recalls (2007) or all of them (from 2010 on).

A detection belongs to the object of its class that it overlaps most. It is right if it is the
first of that object with enough overlap, ignored if the object is difficult (crowd in shards), and
otherwise wrong. VOC counts inclusive pixels, while boxes here have continuous edges, so the IoU is
the same without VOC's + 1.

Letters: T IoU thresholds, N detections and M objects of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigdet.evaluation.coco_metrics import THRESHOLDS, Index, Numbers
from bigdet.evaluation.detections import DetectionTable
from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.matching import Pairs
from bigdet.evaluation.overlaps import box_overlaps, pair_up
from bigdet.evaluation.sorting import lexsort

VocMetric = Literal["voc07", "voc12"]


def measure_voc(
    truth: GroundTruth,
    found: DetectionTable,
    metric: VocMetric,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> list[list[float | None]]:
    """Measure the AP of boxes.

    Args:
        truth: the objects.
        found: detections with boxes.
        metric: ``voc07``: mean of the precision at 11 recalls; ``voc12``: area under the curve.
        thresholds: ``(T,)`` least IoUs; VOC only uses 0.5.

    Returns:
        The AP of each class, in the order of the labels, at each threshold; None for a class
        without objects.
    """
    return [
        [_class_ap(truth, found, rows, objects, metric, threshold) for threshold in thresholds]
        for rows, objects in _labels_in(truth, found, range(len(truth.categories)))
    ]


def _labels_in(
    truth: GroundTruth, found: DetectionTable, labels: Sequence[int]
) -> list[tuple[Index, Index]]:
    """Return the detections and the objects of each label.

    Both in the order of images; within an image the best detections first, and of equal scores the
    earlier ones.
    """
    by_image = lexsort(-found.scores, found.images)
    rows = _by_label(found.labels[by_image], labels)
    objects = _by_label(truth.labels, labels)
    return [(by_image[mine], others) for mine, others in zip(rows, objects, strict=True)]


def _by_label(values: Index, labels: Sequence[int]) -> list[Index]:
    """Return the indices of each label in ``values``, rising."""
    order = np.argsort(values, kind="stable")
    bounds = np.searchsorted(values[order], [[label, label + 1] for label in labels])
    return [order[first:end] for first, end in bounds.reshape(-1, 2).tolist()]


def _class_ap(
    truth: GroundTruth,
    found: DetectionTable,
    rows: Index,
    objects: Index,
    metric: VocMetric,
    threshold: float,
) -> float | None:
    """Return the AP of one class at one threshold.

    Args:
        truth: all objects.
        found: all detections.
        rows: ``(N,)`` rows of the class's detections, by image.
        objects: ``(M,)`` rows of its objects, by image.
        metric: how precision is averaged.
        threshold: least IoU.
    """
    is_difficult = truth.is_crowd[objects]
    total = int((~is_difficult).sum())
    if not total:
        return None
    detections, others = pair_up(found.images[rows], truth.images[objects])
    no_crowd = np.zeros(len(detections), np.bool_)  # the IoU of difficult objects is the usual one
    ious = box_overlaps(found.boxes[rows[detections]], truth.boxes[objects[others]], no_crowd)
    best, overlap = Pairs(detections, others, ious).best(len(rows))
    by_score = np.argsort(-found.scores[rows], kind="stable")
    best, enough = best[by_score], overlap[by_score] >= threshold
    counts = ~(enough & is_difficult[best])
    claims = np.flatnonzero(enough & counts)
    is_right = np.zeros(len(rows), dtype=np.bool_)
    is_right[claims[np.unique(best[claims], return_index=True)[1]]] = True
    right = np.cumsum(is_right[counts])
    precision = right / np.arange(1, len(right) + 1)
    return average_precision(right / total, precision, metric)


def average_precision(recall: Numbers, precision: Numbers, metric: VocMetric) -> float:
    """Return the AP of a curve.

    Args:
        recall: in the order of falling scores, so rising.
        precision: in the same order.
        metric: how to average the highest precision at or beyond each recall.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if metric == "voc07":
        # 0.1 * n like VOC's code, for the same rounding.
        return float(np.mean(envelope[np.searchsorted(recall, np.arange(0.0, 1.1, 0.1))]))
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope[:-1]))
