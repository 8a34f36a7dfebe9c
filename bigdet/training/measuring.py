"""The evaluation during training: AP to a file, the log and the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigdet import distributed
from bigdet.config.resize import plan_of
from bigdet.config.run import RunConfig, eval_resize, imported_cost
from bigdet.data.format.mix import class_ids
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.coco_metrics import KIND_NAMES
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.split import passes_of, predict_split
from bigdet.evaluation.tta import AugmentedDetector
from bigdet.models.detector import Detector
from bigdet.training.state import RunState


def eval_size(config: RunConfig, phase: str) -> tuple[int, int]:
    """Return the short side and the longest long side, pixels, at which a phase is evaluated."""
    return plan_of(eval_resize(config, phase))


def predict(
    config: RunConfig,
    detector: Detector,
    val_set: ShardSet,
    classes: Sequence[str],
    size_cap: tuple[int, int],
    must_stop: Callable[[], bool],
    folder: Path,
) -> SavedResults | None:
    """Detect the objects of the whole validation set; every rank must call it.

    Args:
        config: of the run.
        detector: the model.
        val_set: what AP is measured on.
        classes: names of the detector's classes, in the order of its labels.
        size_cap: short side and longest long side, pixels.
        must_stop: asked by all ranks after every batch; the same answer on all of them.
        folder: where detections wait on disk.

    Returns:
        On rank 0 all detections, nothing on the others; None when it was told to stop.
    """
    tta = config.evaluation.tta
    return predict_split(
        detector if tta is None else AugmentedDetector(detector, tta, val_set.categories, size_cap),
        val_set,
        passes_of(config, size_cap if tta is None else None),
        distributed.device(),
        must_stop,
        folder,
        class_ids(val_set, classes),
    )


def counters(config: RunConfig, state: RunState) -> dict[str, float]:
    """Return what the run has taken so far, and what was stated of weights from elsewhere."""
    imported = imported_cost(config, state.phase)
    return state.counters() | {f"imported/{name}": n for name, n in imported.items()}


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
