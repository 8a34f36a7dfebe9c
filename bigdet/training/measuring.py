"""The evaluation during training: detections, and the numbers that the log gets."""

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


def predict(
    config: RunConfig,
    phase: str,
    detector: Detector,
    val_set: ShardSet,
    classes: Sequence[str],
    must_stop: Callable[[], bool],
) -> SavedResults | None:
    """Detect the objects of the whole validation set (a collective).

    Args:
        config: resolved; detections are buffered in its run folder.
        phase: name of the phase, for the size of images.
        detector: in any mode.
        val_set: of the phase; images in the order of its index.
        classes: names of the detector's classes, in the order of its labels.
        must_stop: called on all ranks after every batch; must return the same on all of them.

    Returns:
        All detections on rank 0, no detections on the others; None when asked to stop.
    """
    tta, size_cap = config.evaluation.tta, plan_of(eval_resize(config, phase))
    return predict_split(
        detector if tta is None else AugmentedDetector(detector, tta, val_set.categories, size_cap),
        val_set,
        passes_of(config, size_cap if tta is None else None),
        distributed.device(),
        must_stop,
        Path(config.output),
        class_ids(val_set, classes),
    )


def counters(config: RunConfig, state: RunState) -> dict[str, float]:
    """Return the costs of the run so far, and the stated costs of imported weights."""
    imported = imported_cost(config, state.phase)
    return state.counters() | {f"imported/{name}": n for name, n in imported.items()}


def flat_metrics(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers of an evaluation by their names in ``metrics.jsonl``: ``bbox/AP``, ..."""
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
