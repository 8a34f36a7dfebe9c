"""Average precision as PASCAL VOC defines it: over 11 recalls (2007) or all of them (from 2010 on).

A detection belongs to the object of its class that it overlaps most. It is right if it is the
first of that object to overlap it enough, ignored if the object is difficult (crowd, in shards),
and else wrong. VOC counts inclusive pixels where boxes here have continuous edges, so the IoU is
the same without VOC's + 1.

Letters: T IoU thresholds, N detections and M objects of a class.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigdet.evaluation.coco_metrics import THRESHOLDS, Index, Numbers, labels_in
from bigdet.evaluation.detections import DetectionTable
from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.overlaps import box_overlaps, pair_up

VocMetric = Literal["voc07", "voc12"]


def measure_voc(
    truth: GroundTruth,
    found: DetectionTable,
    metric: VocMetric,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> list[list[float | None]]:
    """Measure boxes.

    Args:
        truth: what is there to find.
        found: detections with boxes.
        metric: ``voc07``: mean of the precision at 11 recalls; ``voc12``: area under the curve.
        thresholds: ``(T,)`` least IoUs; VOC itself has 0.5 alone.

    Returns:
        The AP of each class, in the order of the labels, at each threshold; None for a class
        without objects.
    """
    return [
        [_class_ap(truth, found, rows, objects, metric, threshold) for threshold in thresholds]
        for rows, objects in labels_in(truth, found, range(len(truth.categories)))
    ]


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
        rows: ``(N,)`` the class's detections by image.
        objects: ``(M,)`` its objects by image.
        metric: how precision is averaged.
        threshold: least IoU.
    """
    is_difficult = truth.is_crowd[objects]
    total = int((~is_difficult).sum())
    if not total:
        return None
    detections, others = pair_up(found.images[rows], truth.images[objects])
    ious = box_ious(truth, found, rows[detections], objects[others])
    best, overlap = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    order = np.lexsort((others, -ious, detections))  # of equal IoUs the first object
    firsts = order[np.flatnonzero(np.diff(detections[order], prepend=-1))]
    best[detections[firsts]], overlap[detections[firsts]] = others[firsts], ious[firsts]
    by_score = np.argsort(-found.scores[rows], kind="stable")
    best, enough = best[by_score], overlap[by_score] >= threshold
    counts = ~(enough & is_difficult[best])
    claims = np.flatnonzero(enough & counts)
    is_right = np.zeros(len(rows), dtype=np.bool_)
    is_right[claims[np.unique(best[claims], return_index=True)[1]]] = True
    right = np.cumsum(is_right[counts])
    precision = right / np.arange(1, len(right) + 1)
    return average_precision(right / total, precision, metric)


def box_ious(truth: GroundTruth, found: DetectionTable, rows: Index, objects: Index) -> Numbers:
    """Return the IoU of pairs of boxes, of difficult objects too."""
    return box_overlaps(found.boxes[rows], truth.boxes[objects], np.zeros(len(rows), np.bool_))


def average_precision(recall: Numbers, precision: Numbers, metric: VocMetric) -> float:
    """Return the AP of a curve.

    Args:
        recall: rising, by falling score.
        precision: likewise.
        metric: how to average the highest precision at or beyond each recall.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if metric == "voc07":
        # 0.1 * n as VOC's own code has it, so that rounding decides alike.
        return float(np.mean(envelope[np.searchsorted(recall, np.arange(0.0, 1.1, 0.1))]))
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope[:-1]))
