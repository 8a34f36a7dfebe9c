"""Prints what a training step takes on the null GPU, for the detectors of the papers at full size.

    python -m tests.nullgpu.table [--steps 5] [ROW ...]

Launches, waits of the host, copies, the peak of allocated memory and what torch's allocator has
reserved for it are those of a real GPU and the same in each run. Host time is the CPU seconds of
the process, the median over steps: it depends on the machine. All rows are plain PyTorch but one,
``r50_zero0``, which has the engine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bigdet.benchmarks.step import NUM_CLASSES, make_scene
from bigdet.config.load import load_config
from bigdet.config.run import RunConfig
from bigdet.engine.build import build_engine
from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.models.norms import update_running_statistics
from bigdet.ops.later import Later
from bigdet.pieces.building import materialize
from bigdet.structures import Batch
from bigdet.training.optim import build_optimizer
from bigdet.training.phases import build_empty
from bigdet.training.prefetch import prefetch
from tests.nullgpu import null_gpu
from tests.nullgpu.run import GPU, pinned

OBJECTS = 7  # of an image, as in COCO
LARGE, SMALL = (800, 1344), (448, 448)
TWO_FC = "model.box_head=2fc"
GRAPHS = "device.cuda_graphs=true"
HEADER = ("step", "launches", "waits", "copies", "peak GiB", "reserved GiB", "host ms")
Step = Callable[[Batch], None]


@dataclass(frozen=True)
class Row:
    """A training step: config with options, phase, height and width, images; plain or by engine."""

    words: list[str]
    phase: str
    size: tuple[int, int]
    images: int = 8
    has_engine: bool = False


ROWS = {
    "r50": Row(["configs/r50_direct.yaml", TWO_FC], "finetune", LARGE),
    "r50_zero0": Row(["configs/r50_direct.yaml", TWO_FC], "finetune", LARGE, has_engine=True),
    "r50_graphs": Row(
        ["configs/r50_direct.yaml", TWO_FC, GRAPHS, "phases.finetune.resize.pad_to=two_shapes"],
        "finetune",
        LARGE,
    ),
    "r50_gn": Row(["configs/r50_gn_scratch.yaml"], "train", LARGE),
    "r50_gn_cascade": Row(["configs/r50_gn_cascade.yaml"], "cascade", LARGE),
    "swin_t": Row(["configs/swin_t_direct.yaml"], "finetune", LARGE),
    "retinanet": Row(["configs/retinanet_r50_direct.yaml"], "finetune", LARGE),
    "x152_gn": Row(["configs/x152_gn_late_cascade.yaml"], "train", LARGE),
    "x152_gn_cascade": Row(["configs/x152_gn_late_cascade.yaml"], "cascade", LARGE),
    "448_2fc": Row(["configs/r50_direct.yaml", TWO_FC], "pretrain", SMALL, images=64),
    "448_2fc_graphs": Row(
        ["configs/r50_direct.yaml", TWO_FC, GRAPHS], "pretrain", SMALL, images=64
    ),
    "448_4conv1fc": Row(
        ["configs/r50_direct.yaml", "model.box_head=4conv1fc"], "pretrain", SMALL, images=64
    ),
}


def _plain_step(detector: Detector, config: RunConfig, phase: str) -> Step:
    materialize(detector, partial(torch.empty_like, device=GPU))
    total = TotalLoss(detector.to(GPU), config.engine.precision, GPU)
    optimizer = build_optimizer(detector, config.phases[phase])

    def step(batch: Batch) -> None:
        for moved in prefetch([batch], GPU):
            total(moved)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engine_step(detector: Detector, config: RunConfig, phase: str) -> Step:
    make_optimizer = partial(build_optimizer, phase=config.phases[phase])
    engine = build_engine(detector, make_optimizer, config.engine, 1, GPU, detector.units)
    engine.set_lr(0.01)
    return lambda batch: engine.launch_step(prefetch([batch], GPU)).read() and None


def measure(row: Row, num_steps: int) -> list[str]:
    """What the steps after the second one take, each the same: the columns after the name."""
    config = load_config(row.words[0], row.words[1:])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    reserved_before = torch.cuda.memory_reserved()
    detector = build_empty(config, row.phase, [str(number) for number in range(NUM_CLASSES)])
    step = (_engine_step if row.has_engine else _plain_step)(detector, config, row.phase)
    batch = pinned(make_scene(row.images, row.size, OBJECTS, seed=0))
    # The one number that sizes depend on: of the regions on objects.
    Later.read = lambda _: float(row.images * 6 * OBJECTS)  # type: ignore[method-assign]
    seen, seconds = [], []
    for _ in range(2 + num_steps):
        null_gpu.reset()
        torch.cuda.reset_peak_memory_stats()
        start = time.process_time()
        step(batch)
        update_running_statistics(detector)
        seconds.append(time.process_time() - start)
        gib = [
            f"{number / 2**30:.1f}"
            for number in (
                torch.cuda.max_memory_allocated() - before,
                torch.cuda.memory_reserved() - reserved_before,
            )
        ]
        counts = null_gpu.counts()
        waits = counts["syncs"] + sum(null_gpu.waits.values())
        copies = counts["to_device"] + counts["to_host"]
        seen.append([f"{counts['launches']:,}", str(waits), str(copies), *gib])
        assert counts["refused"] == counts["pageable"] == 0, counts
    assert all(found == seen[2] for found in seen[2:]), seen
    return [*seen[2], f"{1000 * statistics.median(seconds[2:]):.0f}"]


def _print(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--steps", type=int, default=5, help="to measure; default 5")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.rows) - ROWS.keys():
        parser.error(f"{', '.join(unknown)}: expected rows of {', '.join(ROWS)}")
    if not arguments.inside:  # in a process that sees the null GPU
        if reason := null_gpu.missing():
            parser.error(f"the null GPU cannot be built: {reason}")
        with tempfile.TemporaryDirectory() as folder:
            null_gpu.build(Path(folder))
            words = [sys.executable, "-m", "tests.nullgpu.table", "--inside", *sys.argv[1:]]
            sys.exit(subprocess.call(words, env=null_gpu.environment(Path(folder))))
    null_gpu.install()
    _print(HEADER)
    _print(["---"] * len(HEADER))
    for name in arguments.rows or ROWS:
        _print([name, *measure(ROWS[name], arguments.steps)])
        gc.collect()


if __name__ == "__main__":
    main()
