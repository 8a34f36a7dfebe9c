"""Let a detector memorize 16 real images: does everything work together, from pixels to AP?

Its command line is in ``cli/arguments/overfit.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.overfit import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bigdet.cli.running import run_command
from bigdet.config.families import detector_facts
from bigdet.config.load import parse_config
from bigdet.config.model import has_keypoints, has_masks
from bigdet.config.resize import plan_of
from bigdet.config.run import RunConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.evaluation.coco_metrics import KIND_NAMES, evaluation_kinds
from bigdet.evaluation.scoring import evaluate_detections, metrics_table
from bigdet.evaluation.split import Passes, predict_split
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.norms import update_running_statistics
from bigdet.ops.sizes import eval_size
from bigdet.training import optim
from bigdet.training.phase_stream import stream_for_phase

NUM_IMAGES = 16
MIN_SIDE = 24  # pixels
NAME = "overfit"
CONFIG = """
output: nowhere
data: {train: {shards: nowhere}, val: {shards: nowhere}, workers: 0}
model: {backbone: resnet18, norm: gn}
phases:
  overfit:
    steps: 600
    images_per_gpu: 4
    resize: {kind: short_side, size: 128, cap: 224}
    flip: 0.0
    optimizer: adamw
    lr: 0.001
    weight_decay: 0.0
    warmup_steps: 20
"""

SMALL = {
    "width": ["model.width=64"],
    "fc_width": ["model.fc_width=256"],
    "rpn": [
        "model.rpn.anchor_sizes=[16,32,64,96,128]",
        "model.rpn.train_proposals=200",
        "model.rpn.test_proposals=100",
    ],
    "roi": ["model.roi.rois_per_image=64"],
    "keypoint": ["model.keypoint.width=64"],
    "retina": ["model.retina.anchor_sizes=[16,32,64,96,128]"],
}
"""Overrides that make a detector small, by an option of ``model`` that it uses."""


def main(argv: Sequence[str]) -> int:
    """Train until all AP50 exceed the goal or the steps run out."""
    arguments = parse_arguments(argv)
    options = [f"model.detector={arguments.detector}"]
    used = detector_facts(arguments.detector).options
    options += [word for option, words in SMALL.items() if option in used for word in words]
    config = parse_config(CONFIG, "bigdet overfit", [*options, *arguments.overrides])
    with tempfile.TemporaryDirectory() as folder:
        shards = pick(ShardSet(arguments.shards), config, Path(folder) / "picked")
        return train(shards, config, arguments.goal, arguments.every)


def pick(shards: ShardSet, config: RunConfig, folder: Path) -> ShardSet:
    """Write the chosen images as their own shard set."""
    plan = plan_of(config.phases[NAME].resize)
    needs_keypoints = has_keypoints(config.model)
    rows = (r for r in range(len(shards)) if _is_fit(shards.record(r), plan, needs_keypoints))
    chosen = list(islice(rows, NUM_IMAGES))
    if len(chosen) < NUM_IMAGES:
        raise ValueError(
            f"--shards {shards.address}: only {len(chosen)} images have no object below {MIN_SIDE} "
            f"pixels at the training size, expected {NUM_IMAGES}. Train at a larger "
            f"phases.{NAME}.resize.size."
        )
    writer = ShardWriter(
        folder,
        name="picked",
        source=shards.manifest.source,
        categories=list(shards.categories),
        options={},
    )
    with writer:
        for row in chosen:
            sample = shards.read(row)
            writer.add(sample.image_bytes, sample.record, sample.orientation)
    return ShardSet(folder)


def _is_fit(record: dict[str, Any], plan: tuple[int, int], needs_keypoints: bool) -> bool:
    height, width = eval_size(record["height"], record["width"], *plan)
    scales = (width / record["width"], height / record["height"])
    return bool(record["annotations"]) and all(
        not annotation["iscrowd"]
        and annotation["bbox"][2] * scales[0] >= MIN_SIDE
        and annotation["bbox"][3] * scales[1] >= MIN_SIDE
        and (not needs_keypoints or any(annotation.get("keypoints", [])[2::3]))
        for annotation in record["annotations"]
    )


def train(shards: ShardSet, config: RunConfig, goal: float, every: int) -> int:
    """Train and measure; return the exit code."""
    phase, model = config.phases[NAME], config.model
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = build_detector(model, shards.num_classes).to(device).train()
    optimizer = optim.build_optimizer(detector, phase)
    stream = stream_for_phase(config, NAME, shards)
    print(f"{model.detector} {model.backbone}, {shards.manifest.instances} objects, {device}")
    start, training_seconds = time.monotonic(), 0.0
    reached: dict[str, float] = {}
    for step, batch in enumerate(islice(stream, phase.steps), start=1):
        began = time.monotonic()
        losses = detector(batch.to(device))
        total = torch.stack(list(losses.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * optim.lr_factor(phase, step) * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
        update_running_statistics(detector)
        training_seconds += time.monotonic() - began
        if step % every and step != phase.steps:
            continue
        metrics = measure(detector, shards, config, device)
        reached = {kind: metrics[kind]["AP50"] for kind in KIND_NAMES if kind in metrics}
        shown = ", ".join(f"{kind} AP50 {ap50:.3f}" for kind, ap50 in reached.items())
        print(
            f"step {step}: loss {total.item():.3f}, {shown}, {training_seconds:.0f} s", flush=True
        )
        if min(reached.values()) > goal:
            break
    print(metrics_table(metrics))
    is_reached = min(reached.values()) > goal
    print(
        f"AP50 above {goal}: {'yes' if is_reached else 'NO'}; {training_seconds:.0f} s of "
        f"training, {time.monotonic() - start:.0f} s in all"
    )
    return 0 if is_reached else 1


def measure(
    detector: Detector, shards: ShardSet, config: RunConfig, device: torch.device
) -> dict[str, Any]:
    """Evaluate the detector on its training images."""
    size_cap = plan_of(config.phases[NAME].resize)
    results = predict_split(detector, shards, Passes(size_cap, images_per_gpu=4), device)
    assert results is not None
    kinds = evaluation_kinds(shards, has_masks(config.model), has_keypoints(config.model))
    return evaluate_detections(shards, results, kinds)


if __name__ == "__main__":
    run_command(main)
