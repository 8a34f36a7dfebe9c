"""Computes the numbers of an evaluation from detections, and formats them as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigdet.config.evaluation import MAX_DETECTIONS, Metric
from bigdet.data.format.manifest import unique_names
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.analysis import analyze
from bigdet.evaluation.coco_metrics import (
    KIND_NAMES,
    LVIS_METRICS,
    THRESHOLDS,
    metric_places,
)
from bigdet.evaluation.detection_limits import warn_of_dense
from bigdet.evaluation.detections import DetectionTable, Kind, Result, read_detections
from bigdet.evaluation.ground_truth import GroundTruth, read_ground_truth
from bigdet.evaluation.voc_metrics import VocMetric, measure_voc

Metrics = dict[str, Any]
"""Kind -> name -> number; ``per_class`` -> kind -> class -> AP; ``analysis`` -> kind -> numbers."""


def evaluate_detections(
    shards: ShardSet,
    results: Iterable[Result],
    kinds: Sequence[Kind],
    metric: Metric = "coco",
    where: str = "results",
    max_detections: int = MAX_DETECTIONS,
    one_area: bool = False,
) -> Metrics:
    """Score detections against the ground truth of a whole shard set.

    Args:
        shards: the validation set; images without detections count too.
        results: detections of any of its images, in any order; iterated once.
        kinds: see ``evaluation_kinds``; ``voc07`` and ``voc12`` are for boxes only.
        metric: the definition of AP.
        where: origin of the results, for messages.
        max_detections: how many detections per class and image count, for boxes and masks. A number
            other than 100 is in the result, and in the name of its AR (``AR300``).
        one_area: see ``read_detections``.

    Returns:
        Per kind the numbers of ``METRICS`` (or ``KEYPOINT_METRICS``) in 0..1, and under
        ``per_class`` the AP by class name. None if there is no object of this class or size.
        ``analysis``: see ``analysis.py``. With ``voc07`` and ``voc12`` the numbers are ``AP`` (mean
        over IoUs of 0.5 to 0.95), ``AP50`` (VOC's mAP) and ``AP75``, the AP of a class is that at
        0.5, and ``metric`` is the metric's name; in the analysis the AP by IoU and by class are
        VOC's, all else is COCO's, with difficult objects as crowds.
        A federated set is scored by LVIS's rule, see ``federated.py``: ``LVIS_METRICS`` with
        ``APr``, ``APc``, ``APf`` (rare, common, frequent classes), and ``rule`` is ``lvis``.
    """
    truth = read_ground_truth(shards, "segm" in kinds, "keypoints" in kinds)
    if truth.source_ids:
        results = with_numbers(results, truth.source_ids)
    found = read_detections(results, truth, kinds, where, one_area)
    if metric != "coco":
        return _evaluate_voc(truth, found, metric)
    names = unique_names(truth.categories)
    if truth.verified is None:
        warn_of_dense(truth, max_detections)
    metrics: Metrics = {}
    per_class: Metrics = {}
    analysis: Metrics = {}
    for kind in kinds:
        measured, analysis[kind] = analyze(truth, found, kind, max_detections)
        stats = measured.stats()
        places = metric_places(truth, kind, max_detections)
        metrics[kind] = {name: stats[place] for name, place in places.items()}
        if places is LVIS_METRICS:
            metrics[kind] |= measured.frequency_aps(truth.categories)
        aps = measured.class_aps()
        per_class[kind] = {name: aps.get(k) for k, name in enumerate(names)}
    metrics |= {"per_class": per_class, "analysis": analysis}
    if truth.verified is not None:
        metrics["rule"] = "lvis"
    elif max_detections != MAX_DETECTIONS:
        metrics["max_detections"] = max_detections
    return metrics


def limit_note(metrics: Metrics) -> str:
    """Return how many detections counted if it is not COCO's 100; otherwise empty."""
    count = metrics.get("max_detections")
    return f"up to {count} detections per class and image counted" if count else ""


def with_numbers(results: Iterable[Result], source_ids: Mapping[str, int]) -> Iterator[Result]:
    """Yield results with string image ids of the data set replaced by the images' numbers."""
    for result in results:
        name = result.get("image_id") if isinstance(result, dict) else None
        if isinstance(name, str) and name in source_ids:
            result = result | {"image_id": source_ids[name]}
        yield result


def _evaluate_voc(truth: GroundTruth, found: DetectionTable, metric: VocMetric) -> Metrics:
    aps = measure_voc(truth, found, metric)
    defined = np.array([row for row in aps if row[0] is not None], dtype=np.float64)  # (K, T)
    means = defined.mean(axis=0).tolist() if len(defined) else [None] * len(THRESHOLDS)
    at = dict(zip(THRESHOLDS.round(2).tolist(), means, strict=True))
    box = {"AP": float(defined.mean()) if len(defined) else None, "AP50": at[0.5], "AP75": at[0.75]}
    names = unique_names(truth.categories)
    of_class = dict(zip(names, aps, strict=True))
    _, analysis = analyze(truth, found, "bbox")
    analysis["by_iou"] = {f"{threshold:.2f}": ap for threshold, ap in at.items()}
    for name, numbers in analysis["per_class"].items():
        row = dict(zip(at, of_class[name], strict=True))
        known = [ap for ap in of_class[name] if ap is not None]
        mean = sum(known) / len(known) if known else None
        numbers |= {"AP": mean, "AP50": row[0.5], "AP75": row[0.75]}
    return {
        "bbox": box,
        "per_class": {"bbox": {name: row[0] for name, row in of_class.items()}},
        "analysis": {"bbox": analysis},
        "metric": metric,
    }


def metrics_table(metrics: Metrics, per_class: bool = False) -> str:
    """Return the numbers as text, in 0..1, with a dash for None.

    Args:
        metrics: the result of ``evaluate_detections``.
        per_class: add a line with the AP of each class.
    """
    kinds = [kind for kind in KIND_NAMES if kind in metrics]
    names = list(dict.fromkeys(name for kind in kinds for name in metrics[kind]))
    rows = [[KIND_NAMES[kind], *(_text(metrics[kind].get(n)) for n in names)] for kind in kinds]
    width = max(5, *(len(row[0]) for row in rows))
    lines = _aligned([["", *names], *rows], width, 7)
    if per_class:
        aps, ap = metrics["per_class"], "AP50" if "metric" in metrics else "AP"
        classes = list(dict.fromkeys(name for kind in kinds for name in aps[kind]))
        head = ["", *(f"{KIND_NAMES[kind]} {ap}" for kind in kinds)]
        cells = [[name, *(_text(aps[kind].get(name)) for kind in kinds)] for name in classes]
        columns = max(9, *(len(name) + 2 for name in head))
        lines += ["", *_aligned([head, *cells], max(map(len, classes), default=0), columns)]
    if note := limit_note(metrics):
        lines += ["", note]
    return "\n".join(lines)


def analysis_table(analysis: Metrics) -> str:
    """Return the ``analysis`` in the result of ``evaluate_detections`` as text, kind by kind."""
    lines: list[str] = []
    for kind, numbers in analysis.items():
        lines += [f"--- {KIND_NAMES[kind]} ---", ""]  # type: ignore[index]
        lines += [line for block in _blocks(numbers) for line in (*block, "")]
    return "\n".join(lines[:-1])


def _blocks(numbers: Metrics) -> Iterator[list[str]]:
    """Yield the tables of one kind."""
    by_iou = numbers["by_iou"]
    yield _aligned([["IoU", *by_iou], ["AP", *map(_text, by_iou.values())]], 5, 7)
    sizes = [
        [n, str(s["objects"]), _text(s["AP"]), _text(s["AR"])]
        for n, s in numbers["by_size"].items()
    ]
    yield _aligned([["size", "objects", "AP", "AR"], *sizes], 8, 9)
    recall = numbers["recall"]
    yield _aligned([["detections", *recall], ["AR", *map(_text, recall.values())]], 10, 7)
    errors = numbers["errors"]
    rows = [[n, str(c), _text(errors["dAP"][n])] for n, c in errors["count"].items()]
    special = errors["special"]
    rows += [
        [f"all {name.replace('_', ' ')}", "", _text(special[name])] for name in list(special)[1:]
    ]
    yield [
        f"errors at IoU 0.5, AP50 {_text(special['AP50'])}, and the gain if they were corrected:",
        *_aligned([["error", "number", "dAP"], *rows], 20, 9),
    ]
    if (bins := numbers["calibration"]) is not None:
        rows = [
            [f"{edge:.1f}", str(count), _text(score), _text(precision)]
            for edge, count, score, precision in zip(
                bins["edges"], bins["count"], bins["score"], bins["precision"], strict=False
            )
        ]
        yield [
            f"calibration at IoU 0.5, expected calibration error {_text(bins['ece'])}:",
            *_aligned([["score from", "number", "score", "right"], *rows], 10, 9),
        ]
    confused = [
        (count, true, detected)
        for true, detected, count in numbers["confusion"]["pairs"]
        if true is not None and detected is not None and true != detected
    ]
    confused.sort(key=lambda entry: -entry[0])
    yield [
        f"most often confused, scores from {numbers['confusion']['min_score']}:",
        *(f"{count:6d}  {true} taken for {detected}" for count, true, detected in confused[:10]),
        *(["  none"] if not confused else []),
    ]
    names = ["objects", "detections", "AP", "AP50", "AP75", "AR"]
    rows = [
        [name, str(one["objects"]), str(one["detections"]), *(_text(one[key]) for key in names[2:])]
        for name, one in numbers["per_class"].items()
    ]
    yield _aligned([["class", *names], *rows], max(5, *(len(row[0]) for row in rows)), 11)


def _aligned(rows: Sequence[Sequence[str]], first: int, width: int) -> list[str]:
    """Return rows as lines, the first column aligned to the left, the others to the right."""
    return [f"{head:<{first}}" + "".join(f"{c:>{width}}" for c in cells) for head, *cells in rows]


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
