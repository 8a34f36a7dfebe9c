"""Compares what bigdet.plan predicts with runs of 1, 2 and 4 CPU ranks on this machine.

    python tests/commands/check_plan.py --stages 0 2

Every rank takes one micro-batch per step. The speed of all-reduce is the one that --doctor measures
on as many ranks; a rank computes as fast as alone while there are cores, and shares them beyond.
Prints one JSON object per run, with the ratio of measured to predicted seconds.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bigdet.config.load import load_config
from bigdet.data.making.sources.shapes import make_shapes
from bigdet.planning.cluster import Cluster, Work, forecast
from bigdet.training.sizes import model_sizes
from tests.commands.runs import Command, arguments, deepspeed

STEPS = 14
WARM_STEPS = 4
WIDE = [
    "model.width=128",
    "model.fc_width=1024",
    f"phases.pretrain.steps={STEPS}",
    "phases.finetune.steps=2",
    "checkpoint.every=1000",
    "data.workers=0",
    "phases.finetune.images_per_step=8",
    "log.tensorboard=false",
    "evaluation.pictures=0",
]


def measured_step(folder: Path, ranks: int, stage: int) -> float:
    """Median seconds of a step on some ranks, data not counted."""
    more = [*WIDE, f"engine.zero_stage={stage}", f"phases.pretrain.images_per_step={2 * ranks}"]
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    run = Command(output, folder, *more, launcher=deepspeed(ranks))
    code, printed = run.finish()
    assert code == 0, printed
    seconds = [
        line["time/step_seconds"] - line["time/data_seconds"]
        for line in run.lines()
        if line["phase"] == "pretrain" and "loss/total" in line
    ]
    return statistics.median(seconds[WARM_STEPS:])


def measured_links(folder: Path, ranks: int) -> Cluster:
    """What all-reduce does on some ranks of this machine."""
    sizes = f"phases.pretrain.images_per_step={2 * ranks}"
    doctor = Command(folder / "doctor", folder, *WIDE, sizes, "--doctor", launcher=deepspeed(ranks))
    code, printed = doctor.finish()
    assert code == 0, printed
    found = re.search(r"([\d.]+) GB/s per rank, (\d+) us", printed)
    assert found is not None, printed
    return Cluster(ranks, float(found[1]) * 1e9, 1.0, float(found[2]) * 1e-6, overlaps=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shapes(folder / "train", split="train", images=32)
        make_shapes(folder / "val", split="val", images=8)
        words = arguments(folder, folder, *WIDE)
        sizes = model_sizes(load_config(words[0], words[1:]), "pretrain", num_classes=3)
        for ranks in options.ranks:
            alone = measured_step(folder, 1, 0)  # each time: the speed of a shared machine drifts
            links = measured_links(folder, ranks) if ranks > 1 else Cluster(1, 1.0, 1.0, 0.0)
            for stage in options.stages:
                work = Work(sizes, 2, alone * max(1, ranks / cores), 0.0, 1)
                predicted = forecast(f"ZeRO-{stage}", ranks, links, work)
                measured = measured_step(folder, ranks, stage)
                row = {
                    "ranks": ranks,
                    "measured_seconds": round(measured, 3),
                    "measured / predicted": round(measured / predicted.step_seconds, 2),
                    "GB/s": round(links.inside / 1e9, 2),
                    **dataclasses.asdict(predicted),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
