"""The evaluation during training: AP to a file, the log and the best checkpoint; pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.derived import has_keypoints, has_masks, plan_of, test_resize
from bigdet.config.schema import RunConfig
from bigdet.data.decode import decode_image
from bigdet.data.shards import ShardSet
from bigdet.drawing import draw_detections
from bigdet.evaluation.coco_metrics import KIND_NAMES, evaluation_kinds
from bigdet.evaluation.predict import predict_split
from bigdet.evaluation.scoring import evaluate_detections
from bigdet.evaluation.tta import AugmentedDetector
from bigdet.evaluation.waiting import work_on_main
from bigdet.models.detector import Detector
from bigdet.run_dir import RunDir, write_text

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
) -> dict[str, Any] | None:
    """Measure the detector on the whole validation set; every rank must call it.

    Args:
        config: of the run.
        detector: the model.
        val_set: what AP is measured on.
        size_cap: short side and longest long side, pixels.
        must_stop: asked by all ranks after every batch; the same answer on all of them.
        folder: where detections wait on disk.

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
    return work_on_main(lambda: evaluate_detections(val_set, results, kinds, metric), must_stop)


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


def draw_validation(
    detector: Detector,
    val_set: ShardSet,
    size_cap: tuple[int, int],
    count: int,
    run_dir: RunDir,
    prefix: str,
) -> list[Path]:
    """Draw the first validation images with their detections; every rank must call it.

    All ranks detect, since sharded weights are gathered for it; rank 0 draws.

    Returns:
        On rank 0 the files written, ``pictures/PREFIX-KEY.jpg``.
    """
    rows = range(min(count, len(val_set)))
    with distributed.together():
        images = [decode_image(val_set.read(row).image_bytes) for row in rows]
    was_training = detector.training
    detector.eval()
    detector.test_size = size_cap
    found = [detector.predict([image])[0].to(torch.device("cpu")) for image in images]
    detector.train(was_training)
    files: list[Path] = []
    with distributed.together():
        if distributed.is_main():
            categories = [asdict(category) for category in val_set.categories]
            run_dir.pictures.mkdir(parents=True, exist_ok=True)
            for row, image, detections in zip(rows, images, found, strict=True):
                pixels = image.permute(1, 2, 0).numpy()
                file = run_dir.pictures / f"{prefix}-{val_set.key(row)}.jpg"
                draw_detections(pixels, detections, categories, 0.5).save(file, quality=90)
                files.append(file)
    return files
