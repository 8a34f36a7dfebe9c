"""No rank ever holds the whole model: the memory of every rank, measured from start to resume.

    python -m tests.ranks.sharded_memory --backbone vit_h

A Mask R-CNN with this backbone trains some steps of one 128-pixel image per rank on 4 ranks, saves,
and is killed in the middle of a step; 2 ranks go on under the other engine. So ZeRO-3 -> FSDP2, and
FSDP2 -> ZeRO-3. At all times the resident memory of a rank is at most

    base + what it holds of weights, gradients and optimizer state + 2 x the largest unit

and, while a save is under way, one more copy of its weights and optimizer state. The base is what
the same run takes with a tiny backbone, without what it holds. Fails where a rank takes more, or
the losses after a resume are not those of a run that goes on. ViT-H takes about 20 GiB of memory
and disk, and minutes per step on 2 cores. Freed memory goes back to the system here at once
(``MALLOC_MMAP_THRESHOLD_``), or what is measured is what the C library keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.load import load_config
from bigdet.config.run import RunConfig
from bigdet.engine import checkpoint, writing
from bigdet.models.backbones.vit import ViT
from bigdet.pieces.index import MODEL
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import optim
from bigdet.training.phases import build_empty, start_weights
from tests.ranks.memory import Watch
from tests.spawn import RankError, run_ranks
from tests.unit.models.scenes import make_scene

CONFIG = Path(__file__).parents[2] / "configs" / "vitdet_h.yaml"
PHASE, CLASSES = "train", ["a", "b", "c"]
TINY = "tests.ranks.sharded_memory:tiny_vit"
WORDS = [
    "engine.precision=fp32", "engine.activation_checkpointing=true", "model.drop_path=0",
    "phases.train.start_from.source=random", "model.rpn.train_proposals=50",
    "model.rpn.train_candidates=100", "model.roi.rois_per_image=16",
]  # fmt: skip
ENGINES = {
    "zero3": ["engine.kind=deepspeed", "engine.zero_stage=3"],
    "fsdp": ["engine.kind=fsdp", "engine.zero_stage=null"],
}
LANES, SAVED_AT, SIZE, LR = 4, 2, 128, 1e-4
MIB = 2**20
# As in tests/ranks/test_detector.py; the steps of AdamW before add to it.
LOSSES_CLOSE = {"rtol": 1e-3, "atol": 1e-5}
TIMEOUT = 3 * 3600.0


def tiny_vit(drop_path: float, relative_positions: bool) -> ViT:
    return ViT(48, depth=4, num_heads=3, drop_path=drop_path, relative_positions=relative_positions)


def lanes(step: int) -> list[Batch]:
    """This rank's images of a step, of `LANES`."""
    share = LANES // distributed.world_size()
    own = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    boxes = [(4, 4, 64, 60), (40, 64, 126, 120)]
    return [make_scene([boxes], [(SIZE, SIZE)], (SIZE, SIZE), seed=10 * step + n) for n in own]


def settings(backbone: str, engine: str) -> RunConfig:
    """The published recipe, with few proposals, in fp32."""
    return load_config(CONFIG, [f"model.backbone={backbone}", *ENGINES[engine], *WORDS])


class Rank:
    """One rank of a run; it notes the most memory that each part of the run takes."""

    def __init__(self, backbone: str, engine: str, folder: Path) -> None:
        from bigdet.engine import deepspeed_engine, fsdp_engine  # noqa: F401  # part of the base

        self.folder = folder
        self.config = settings(backbone, engine)
        self.report: dict[str, Any] = {"losses": {}, "most": {}}
        self.watch = Watch()

    def note(self, part: str) -> None:
        """Note the most memory since the last part, in MiB."""
        self.report["most"][part] = {key: n / MIB for key, n in self.watch.most().items()}
        self.watch.restart()

    def start(self, saved: Path | None) -> Any:
        """Build the engine as a run does, from random weights or a checkpoint."""
        from bigdet.engine.build import build_engine

        detector = build_empty(self.config, PHASE, CLASSES)
        sizes = {p: p.nbytes / MIB for p in detector.parameters()}
        units = [{p for part in unit for p in part.parameters()} for unit in detector.units]
        units.append(sizes.keys() - set().union(*units))
        self.report["whole"] = sum(sizes.values())
        self.report["unit"] = max(sum(sizes[p] for p in unit) for unit in units)
        make = partial(optim.build_optimizer, phase=self.config.phases[PHASE])
        build = partial(
            build_engine, detector, make, self.config.engine, LANES // distributed.world_size(),
            distributed.device(), detector.units,
        )  # fmt: skip
        if saved is not None:
            engine: Any = build()
            engine.load_state(checkpoint.load(saved).engine)
            return engine
        with start_weights(self.config, PHASE, CLASSES, RunDir(self.folder)) as stored:
            engine = build()
            engine.begin(stored)
        return engine

    def step(self, engine: Any, number: int, *, is_killed: bool = False) -> None:
        """Take a step, and note the mean loss of all lanes."""
        engine.set_lr(LR)
        result = engine.train_step(self._until_killed(lanes(number), is_killed))
        assert result.is_finite
        loss = distributed.mean_over_ranks(result.losses["total"]).item()
        self.report["losses"][str(number)] = loss

    def _until_killed(self, batches: Sequence[Batch], is_killed: bool) -> Iterator[Batch]:
        yield batches[0]
        if is_killed:  # after the backward pass, before the update
            self.note("kill")
            file = self.folder / f"killed-{distributed.rank()}.json"
            file.write_text(json.dumps(self.report))
            distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from batches[1:]

    def save(self, engine: Any, path: Path) -> None:
        """Save as a run does, and note the seconds until it is complete on all ranks."""
        weights = engine._weights(MODEL, engine._shapes)
        parts = {
            "state": [*weights, *engine._optimizer_parts()],
            "gradients": [part for part in weights if part.name in engine._trained],
        }
        for name, held in parts.items():
            self.report[name] = sum(part.values.nbytes for part in held) / MIB
        disks = writing.find_disks(path.parent)
        distributed.barrier()
        started = time.monotonic()
        share = engine.share(distributed.rank(), distributed.world_size())
        writing.write(writing.Save(path, 1, disks, {"format": "test"}, {"step": SAVED_AT}), share)
        distributed.barrier()
        self.report["seconds to save"] = round(time.monotonic() - started, 1)


def run(
    backbone: str, engine_name: str, folder: Path, saved: str | None, is_ended: bool = False
) -> dict[str, Any]:
    """Run from the start into a kill, or on from a checkpoint, on all ranks; give the report.

    With ``is_ended`` nothing comes after the save.
    """
    rank = Rank(backbone, engine_name, folder)
    engine = rank.start(None if saved is None else folder / saved)
    if saved is None:
        rank.note("start")
        for step in range(1, SAVED_AT + 1):
            rank.step(engine, step)
        rank.note("steps")
    else:
        rank.note("resume")
    rank.save(engine, folder / (engine_name if saved is None else f"{saved}-again"))
    rank.note("save")
    if not is_ended:
        rank.step(engine, SAVED_AT + 1)
        rank.note("step after")
    if saved is None:
        rank.step(engine, SAVED_AT + 2, is_killed=True)
    return rank.report


def run_ways(
    backbone: str, ways: Sequence[tuple[str, str]], ranks: int = 4
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Run each way, and resume it on half as many ranks; give the reports of all ranks by run."""
    half = ranks // 2
    found = {}
    for before, after in ways:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = partial(run_ranks, run, timeout_seconds=TIMEOUT)
            try:
                start(ranks, folder, backbone, before, folder, None)
            except RankError as error:
                files = [folder / f"killed-{rank}.json" for rank in range(ranks)]
                if not all(file.is_file() for file in files):
                    raise AssertionError("a rank failed before the kill") from error
            found[before, ranks] = [json.loads(file.read_text()) for file in files]
            found[after, half] = start(half, folder, backbone, after, folder, before)
            expected, resumed = (
                found[run][0]["losses"][f"{SAVED_AT + 1}"]
                for run in ((before, ranks), (after, half))
            )
            torch.testing.assert_close(resumed, expected, **LOSSES_CLOSE)
            write(
                f"{before} on {ranks} ranks, then {after} on {half}: loss of the next step "
                f"{expected:.6f} without the kill, {resumed:.6f} after it"
            )
            if half > 1 and after == "fsdp":  # to see how long a save takes; without gradients
                found[after, 1] = start(1, folder, backbone, after, folder, before, True)
    return found


def check(reports: dict[tuple[str, int], list[dict[str, Any]]], bases: dict[str, float]) -> int:
    """Print the memory of each rank and its limit; give how often it was more."""
    failures = 0
    for (engine, world), ranks in reports.items():
        for rank, report in enumerate(ranks):
            held = report["state"] + report["gradients"]
            limit = bases[engine] + held + 2 * report["unit"]
            write(
                f"{engine} on {world}, rank {rank}: holds {held:.0f} MiB of "
                f"{4 * report['whole']:.0f}, largest unit {report['unit']:.0f}, base "
                f"{bases[engine]:.0f}; saved in {report['seconds to save']} s"
            )
            for part, most in report["most"].items():
                allowed = limit + (report["state"] if part == "save" else 0)
                is_more = most["resident"] > allowed
                failures += is_more
                figures = ", ".join(f"{key} {value:.0f}" for key, value in most.items())
                verdict = "MORE THAN" if is_more else "at most"
                write(f"    {part:10s} {figures}: {verdict} {allowed:.0f}")
    return failures


def base_of(reports: dict[tuple[str, int], list[dict[str, Any]]], engine: str) -> float:
    """The most that runs of an engine with a tiny backbone took besides what they held."""
    return max(
        most["resident"] - report["state"] * (2 if part == "save" else 1) - report["gradients"]
        for (name, _), ranks in reports.items()
        for report in ranks
        for part, most in report["most"].items()
        if name == engine
    )


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Measure a tiny backbone, then the one that is asked for; 1 if a rank took too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_h")
    parser.add_argument("--ways", nargs="+", default=["zero3:fsdp", "fsdp:zero3"])
    parser.add_argument("--ranks", type=int, default=4, help="half as many resume")
    options = parser.parse_args()
    from tests.ranks.sharded_memory import run_ways  # not of __main__, where ranks find no function

    os.environ["MALLOC_MMAP_THRESHOLD_"] = f"{MIB}"
    ways = [tuple(way.split(":")) for way in options.ways]
    tiny = run_ways(TINY, ways, options.ranks)
    bases = {engine: base_of(tiny, engine) for engine in ENGINES}
    return 1 if check(run_ways(options.backbone, ways, options.ranks), bases) else 0


if __name__ == "__main__":
    sys.exit(main())
