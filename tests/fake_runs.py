"""Run folders with numbers made by hand, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bigdet.config.load import dump_config
from bigdet.run_dir import RunDir
from tests.commands.runs import ROOT
from tests.shipped import unchecked

CLASSES = ("cat", "dog")


def write_run(
    folder: Path,
    aps: Sequence[float],
    *overrides: str,
    gpu_seconds_per_step: float = 36.0,
    cpu_seconds_per_step: float | None = None,
    objects: int = 10,
    pictures: int = 0,
    imported: Mapping[str, float] | None = None,
) -> Path:
    """Write a run of quickstart's two phases of 30 and 20 steps, logged and measured each 10.

    Every step has 4 images, 12 instances and 4000 pixels, and costs ``gpu_seconds_per_step``, a
    quarter of it waiting for data.

    Args:
        folder: of the run.
        aps: box AP after each 10 steps, up to 5; a finished run has 5.
        overrides: of the config.
        gpu_seconds_per_step: what a step costs.
        cpu_seconds_per_step: CPU time of a step, half as much of evaluations; None as on a GPU.
        objects: of each class in the validation set.
        pictures: images that the last phase drew.
        imported: what was stated of its first weights, by its keys in ``metrics.jsonl``.
    """
    run_dir = RunDir(folder)
    words = [
        "phases.pretrain.steps=30",
        "phases.finetune.steps=20",
        "phases.pretrain.drops=[]",
        f"output={folder}",
        *overrides,
    ]
    folder.mkdir(parents=True)
    config = unchecked(ROOT / "configs" / "quickstart.yaml", words)
    run_dir.config.write_text(dump_config(config))
    lines: list[dict[str, Any]] = []
    for number, ap in enumerate(aps, start=1):
        total, phase = 10 * number, "pretrain" if number <= 3 else "finetune"
        step = total if number <= 3 else total - 30
        costs = counters(total, step, gpu_seconds_per_step) | dict(imported or {})
        if cpu_seconds_per_step is not None:
            costs |= cpu_counters(total, step, cpu_seconds_per_step)
        place = {"phase": phase, "step": step}
        losses = {
            "loss/total": 4.0 / number,
            "loss/box_delta": 1.0 / number,
            "lr": 0.01,
            "grad_norm": 2.0,
            "time/step_seconds": 0.5,
            "time/data_seconds": 0.125,
            "images_per_second": 8.0,
            "memory_gib": 1.5,
        }
        lines += [
            {**place, **losses, **costs},
            {**place, "bbox/AP": ap, "segm/AP": ap / 2, **costs},
        ]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = lines[-1]
    file = run_dir.evaluation(last["phase"], last["step"])
    file.parent.mkdir()
    file.write_text(json.dumps(evaluation(aps[-1], objects)))
    start = {"time": "2026-01-01T00:00:00+00:00", "ranks": 2, "device": "CPU", "torch": "2.15"}
    run_dir.environment.write_text(json.dumps([start]))
    if len(aps) == 5:
        run_dir.weights.touch()
    if pictures:
        write_pictures(run_dir, pictures)
    return folder


def counters(total: int, step: int, gpu_seconds: float) -> dict[str, float]:
    """What so many steps have taken, of the run and of its phase."""
    return {
        "seen/images": 4 * total,
        "seen/instances": 12 * total,
        "seen/pixels": 4000 * total,
        "seen/gpu_seconds": gpu_seconds * total,
        "cost/data_gpu_seconds": gpu_seconds * total / 4,
        "cost/evaluation_gpu_seconds": 3.6 * total,
        "phase_cost/steps": step,
        "phase_cost/images": 4 * step,
        "phase_cost/instances": 12 * step,
        "phase_cost/pixels": 4000 * step,
        "phase_cost/compute_gpu_seconds": gpu_seconds * step * 0.75,
        "phase_cost/data_gpu_seconds": gpu_seconds * step / 4,
        "phase_cost/evaluation_gpu_seconds": 3.6 * step,
    }


def cpu_counters(total: int, step: int, seconds: float) -> dict[str, float]:
    """What so many steps have taken on a CPU, of the run and of its phase."""
    return {
        "cost/cpu_seconds": seconds * total,
        "cost/evaluation_cpu_seconds": seconds * total / 2,
        "phase_cost/cpu_seconds": seconds * step,
        "phase_cost/evaluation_cpu_seconds": seconds * step / 2,
    }


def evaluation(ap: float, objects: int) -> dict[str, Any]:
    """The numbers of an evaluation, laid out as evaluation/analysis.py says."""
    kinds = {"bbox": ap, "segm": ap / 2}
    return {
        **{kind: {"AP": value} for kind, value in kinds.items()},
        "per_class": {kind: dict.fromkeys(CLASSES, value) for kind, value in kinds.items()},
        "analysis": {kind: analysis(value, objects) for kind, value in kinds.items()},
    }


def analysis(ap: float, objects: int) -> dict[str, Any]:
    types = ["classification", "localization", "both", "duplicate", "background", "missed"]
    one = {"objects": objects, "detections": 20, "AP": ap, "AP50": ap, "AP75": None, "AR": ap}
    filled = [0] * 8 + [3, 7]
    return {
        "by_iou": {f"{0.5 + 0.05 * place:.2f}": ap * (1 - place / 10) for place in range(10)},
        "by_size": {
            "all": {"objects": 2 * objects, "AP": ap, "AR": ap},
            "large": {"objects": 0, "AP": None, "AR": None},
        },
        "recall": {"1": ap, "10": ap, "100": ap},
        "per_class": {name: dict(one) for name in CLASSES},
        "calibration": {
            "edges": [place / 10 for place in range(11)],
            "count": filled,
            "score": [None] * 8 + [0.85, 0.95],
            "precision": [None] * 8 + [0.5, 1.0],
            "ece": 0.1,
        },
        "confusion": {
            "min_score": 0.3,
            "pairs": [["cat", "cat", 6], ["cat", "dog", 2], ["cat", None, 2], [None, "dog", 1]],
        },
        "errors": {
            "count": dict.fromkeys(types, 3),
            "dAP": dict.fromkeys(types, 0.05),
            "special": {"AP50": ap, "false_positives": 0.1, "false_negatives": 0.2},
        },
    }


def write_pictures(run_dir: RunDir, count: int) -> None:
    """Write pictures of the last phase, each of its own gray."""
    (run_dir.pictures / "truth").mkdir(parents=True)
    listed = []
    for number in range(count):
        names = {"found": f"finetune-{number}.jpg", "truth": f"truth/{number}.jpg"}
        for name in names.values():
            Image.new("RGB", (800, 600), (40 * number,) * 3).save(run_dir.pictures / name)
        listed.append({"among": "worst", "image_id": number, "num_right": 3, "num_missed": 2,
                       "num_wrong": 1, **names})  # fmt: skip
    run_dir.picture_list("finetune").write_text(json.dumps(listed))
