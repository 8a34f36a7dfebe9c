"""AP by class, size and IoU, calibration, confusion and the cost of errors, as numbers.

``evaluation/PHASE-STEP.json`` has them under ``analysis``, per kind (``bbox``, ``segm``,
``keypoints``), for the plots of a report. Numbers are in 0..1 unless they are counts; null if there
are no objects.

    by_iou       {"0.50": AP, ..., "0.95": AP}
    by_size      {"all" | "small" | "medium" | "large": {"objects": count, "AP", "AR"}}
    recall       {"1" | "10" | "100": AR with as many detections per image and class}; the last is
                 evaluation.max_detections; for LVIS only "300", per image
    per_class    {name: {"objects", "detections": counts, "AP", "AP50", "AP75", "AR"}}
    calibration  {"edges": 11 scores, "count": 10 counts, "score": 10 mean scores, "precision": 10
                 shares that are right, "ece": expected calibration error}; null if a score is not
                 in [0, 1]
    confusion    {"min_score": 0.3, "pairs": [[true class, detected class, count], ...]}; null
                 instead of a class: no object, or no detection. Pairs that never occur are left
                 out
    errors       {"count": {type: count}, "dAP": {type: gain}, "special": {"AP50",
                 "false_positives", "false_negatives"}}; see ``error_types.py``

In calibration and confusion a detection is right, or an object found, at an IoU of 0.5; detections
in crowds are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.data.format.manifest import unique_names
from bigdet.evaluation.coco_metrics import (
    THRESHOLDS,
    Measured,
    mean_of_defined,
    measure,
    never_counts,
    rules_of,
)
from bigdet.evaluation.detections import DetectionTable, Kind
from bigdet.evaluation.error_types import (
    TYPES,
    Cover,
    error_costs,
    find_cover,
    find_errors,
    match_all,
)
from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.matching import NOTHING

NUM_BINS = 10
CONFUSION_SCORE = 0.3

Analysis = dict[str, Any]


def analyze(
    truth: GroundTruth, found: DetectionTable, kind: Kind, max_detections: int = MAX_DETECTIONS
) -> tuple[Measured, Analysis]:
    """Return precision and recall of one kind, and the numbers in this module's docstring.

    Args:
        truth: the objects.
        found: the detections.
        kind: boxes, masks or keypoints.
        max_detections: see ``coco_metrics.rules_of``.
    """
    limit = rules_of(truth, kind, max_detections).limits[-1]
    cover = find_cover(truth, found, kind, max(MAX_DETECTIONS, limit))
    measured = measure(truth, found, kind, max_detections, cover.same_class)
    errors = find_errors(truth, cover, kind)
    return measured, {
        "by_iou": {
            f"{threshold:.2f}": mean_of_defined(precision[..., 0])
            for threshold, precision in zip(THRESHOLDS, measured.precision, strict=True)
        },
        "by_size": _by_size(truth, kind, measured),
        "recall": {
            str(limit): mean_of_defined(measured.recall[:, :, 0, place])
            for place, limit in enumerate(measured.rules.limits)
        },
        "per_class": _per_class(truth, found, kind, measured),
        "calibration": _calibration(cover, errors.types == len(TYPES)),
        "confusion": _confusion(truth, cover, kind),
        "errors": error_costs(truth, cover, errors, kind),
    }


def _by_size(truth: GroundTruth, kind: Kind, measured: Measured) -> Analysis:
    names = ["all", "small", "medium", "large"]
    if kind == "keypoints":
        names.remove("small")
    counts = ~never_counts(truth, kind)
    sizes: Analysis = {}
    for place, (name, (least, most)) in enumerate(zip(names, measured.rules.areas, strict=True)):
        inside = counts & (truth.areas >= least) & (truth.areas <= most)
        sizes[name] = {
            "objects": int(inside.sum()),
            "AP": mean_of_defined(measured.precision[..., place]),
            "AR": mean_of_defined(measured.recall[:, :, place, -1]),
        }
    return sizes


def _per_class(
    truth: GroundTruth, found: DetectionTable, kind: Kind, measured: Measured
) -> Analysis:
    num_classes = len(truth.categories)
    objects = np.bincount(truth.labels[~never_counts(truth, kind)], minlength=num_classes)
    detections = np.bincount(found.labels, minlength=num_classes)
    aps = [measured.class_aps(threshold) for threshold in (None, 0.5, 0.75)]
    recalls = [mean_of_defined(measured.recall[:, n, 0, -1]) for n in range(len(measured.labels))]
    recall = dict(zip(measured.labels, recalls, strict=True))
    names = unique_names(truth.categories)
    return {
        names[label]: {
            "objects": int(objects[label]),
            "detections": int(detections[label]),
            **{name: ap[label] for name, ap in zip(("AP", "AP50", "AP75"), aps, strict=True)},
            "AR": recall[label],
        }
        for label in sorted(measured.labels)
    }


def _calibration(cover: Cover, is_right: NDArray[np.bool_]) -> Analysis | None:
    """Compare scores with the share of detections that are right."""
    counts = is_right | ~cover.in_crowd
    scores, right = cover.scores[counts], is_right[counts]
    if ((scores < 0) | (scores > 1)).any():
        return None
    places = np.minimum((scores * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count = np.bincount(places, minlength=NUM_BINS)
    score_sum = np.bincount(places, weights=scores, minlength=NUM_BINS)
    right_sum = np.bincount(places, weights=right, minlength=NUM_BINS)

    def means(sums: NDArray[Any]) -> list[float | None]:
        return [s / n if n else None for s, n in zip(sums.tolist(), count.tolist(), strict=True)]

    return {
        "edges": [place / NUM_BINS for place in range(NUM_BINS + 1)],
        "count": count.tolist(),
        "score": means(score_sum),
        "precision": means(right_sum),
        "ece": float(np.abs(score_sum - right_sum).sum() / len(scores)) if len(scores) else None,
    }


def _confusion(truth: GroundTruth, cover: Cover, kind: Kind) -> Analysis:
    """Count how often one class is detected as another."""
    nothing = len(truth.categories)
    finds = match_all(truth, cover, same_class=False, min_score=CONFUSION_SCORE)
    is_found = np.zeros(len(truth.labels), dtype=np.bool_)
    is_found[finds[finds != NOTHING]] = True
    shown = (cover.scores >= CONFUSION_SCORE) & ((finds != NOTHING) | ~cover.in_crowd)
    labels = np.append(truth.labels, nothing)  # NOTHING, -1, is the last one
    unfound = truth.labels[~is_found & ~never_counts(truth, kind)]
    table = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)  # true class, detected class
    np.add.at(table, (labels[finds[shown]], cover.labels[shown]), 1)
    table[:, nothing] += np.bincount(unfound, minlength=nothing + 1)
    names = [*unique_names(truth.categories), None]
    return {
        "min_score": CONFUSION_SCORE,
        "pairs": [
            [names[true], names[detected], int(table[true, detected])]
            for true, detected in np.argwhere(table).tolist()
        ],
    }
