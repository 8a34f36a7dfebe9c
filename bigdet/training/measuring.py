"""The evaluation during training: AP to a file, the log and the best checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigdet import distributed
from bigdet.config.derived import has_keypoints, has_masks, plan_of, test_resize
from bigdet.config.schema import RunConfig
from bigdet.data.shards import ShardSet
from bigdet.evaluation.coco_metrics import KIND_NAMES, evaluation_kinds
from bigdet.evaluation.detections import Kind
from bigdet.evaluation.predict import predict_split
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.scoring import evaluate_detections
from bigdet.evaluation.tta import AugmentedDetector
from bigdet.evaluation.waiting import work_on_main
from bigdet.models.detector import Detector
from bigdet.run_dir import write_text

logger = logging.getLogger(__name__)


def test_size(config: RunConfig, phase: str) -> tuple[int, int]:
    """Return the short side and the longest long side, pixels, at which a phase is tested."""
    resize = test_resize(config, phase)
    return plan_of(resize)


def evaluate(
    config: RunConfig,
    detector: Detector,
    val_set: ShardSet,
    size_cap: tuple[int, int],
    must_stop: Callable[[], bool],
    folder: Path,
    look: Callable[[SavedResults, Sequence[Kind]], None],
) -> dict[str, Any] | None:
    """Measure the detector on the whole validation set; every rank must call it.

    Args:
        config: of the run.
        detector: the model.
        val_set: what AP is measured on.
        size_cap: short side and longest long side, pixels.
        must_stop: asked by all ranks after every batch; the same answer on all of them.
        folder: where detections wait on disk.
        look: is shown the detections and what was measured of them, on rank 0; they are gone then.

    Returns:
        On every rank the numbers of ``evaluate_detections``; None when it was told to stop.
    """
    tta = config.evaluation.tta
    results = predict_split(
        detector if tta is None else AugmentedDetector(detector, tta, val_set.categories),
        val_set,
        size_cap if tta is None else None,
        config.evaluation.images_per_gpu,
        config.data.workers,
        distributed.device(),
        must_stop,
        config.engine.precision,
        folder,
    )
    if results is None:
        return None
    metric, model = config.evaluation.metric, detector.config
    kinds = evaluation_kinds(val_set, has_masks(model), has_keypoints(model), metric)

    def score_and_look() -> dict[str, Any]:
        metrics = evaluate_detections(val_set, results, kinds, metric)
        look(results, kinds)
        return metrics

    return work_on_main(score_and_look, must_stop)


def write_evaluation(metrics: dict[str, Any], file: Path) -> None:
    """Write the numbers of one evaluation as JSON, whole or not at all."""
    write_text(file, json.dumps(metrics, indent=1))


def flat_metrics(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers of an evaluation by the names of ``metrics.jsonl``: ``bbox/AP``, ..."""
    return {
        f"{kind}/{name}": value
        for kind in KIND_NAMES
        if kind in metrics
        for name, value in metrics[kind].items()
    }


def one_line(flat: dict[str, float | None]) -> str:
    """Return the headline numbers, in percent: ``bbox AP 41.2, segm AP 37.0``."""
    shown = [
        f"{key.replace('/', ' ')} {100 * value:.1f}"
        for key, value in flat.items()
        if key.endswith(("/AP", "/AP50")) and value is not None
    ]
    return ", ".join(shown) or "nothing to measure"
