"""Sharded training with layer decay, averages and checkpointing: killed, and resumed elsewhere.

    python -m tests.ranks.large_backbones --backbones vit_s tests.ranks.large_backbones:vit_l

For each backbone one rank trains some steps. Two ranks train the same under ZeRO-3 and under FSDP2,
are killed in the middle of a step, and go on under the other engine from what they had saved. The
test suite does it with a tiny ViT. Prints a line for each with losses, bytes and the largest
differences; fails where they are not explained by rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.engine import checkpoint, writing
from bigdet.engine.base import Engine
from bigdet.engine.parts import Part, Share, copy_share
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.backbones.vit import ViT
from bigdet.models.build import build_detector
from bigdet.pieces.index import MODEL
from bigdet.pieces.reading import Stored, open_stored
from bigdet.structures import Batch
from bigdet.training.optim import parameter_groups
from tests.ranks.toy import ENGINES
from tests.spawn import RankError, run_ranks
from tests.unit.models.scenes import make_scene

LANES, STEPS, SAVED_AT = 2, 3, 2
LR, DECAY = 1e-4, 0.7
WAYS = [("zero3", "fsdp"), ("fsdp", "zero3")]
# Losses as in tests/ranks/test_detector.py. AdamW steps by the sign of tiny gradients, whose sums
# are in another order: each step may move a weight by up to twice the rate.
LOSSES_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny_vit(drop_path: float) -> ViT:
    return ViT(width=48, depth=4, num_heads=3, drop_path=drop_path)


def vit_l(drop_path: float) -> ViT:
    return ViT(width=1024, depth=24, num_heads=16, drop_path=drop_path)


def lanes(step: int, size: int) -> list[Batch]:
    """This rank's images of a step: of LANES, each with one or two objects."""
    share = LANES // distributed.world_size()
    own = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    boxes = [(4, 4, size // 2, size // 2 - 4), (size // 3, size // 2, size - 2, size - 8)]
    shape = (size, size)
    return [make_scene([boxes[: 1 + n]], [shape], shape, seed=10 * step + n) for n in own]


def make_engine(backbone: str, name: str) -> Engine:
    from bigdet.engine.build import build_engine  # takes seconds

    torch.manual_seed(0)
    config = ModelConfig(
        detector="mask_rcnn",
        backbone=backbone,
        drop_path=0.1,
        width=32,
        fc_width=32,
        rpn=RpnConfig(anchor_sizes=[16, 24, 32, 48, 64], train_proposals=30),
        roi=RoiConfig(rois_per_image=32),
    )
    detector = build_detector(config, num_classes=3).train()
    enable_checkpointing(detector)
    return build_engine(
        detector,
        lambda module: AdamW(parameter_groups(module, 0.1, layer_decay=0.8), lr=LR),
        EngineConfig(**ENGINES[name], precision="fp32", clip_norm=1.0),
        LANES // distributed.world_size(),
        torch.device("cpu"),
        detector.units,
        with_ema=True,
    )


def train(
    backbone: str, size: int, name: str, folder: Path, resumed: str | None, is_killed: bool
) -> dict[str, Any]:
    """Train on all ranks, from the start or a checkpoint, to the end or into a kill.

    Returns:
        Losses of the steps by number, groups of the optimizer, bytes of this rank's averages, and
        its peak of memory in GiB. The averages at the end are in ``folder/end-RESUMED``.
    """
    engine: Any = make_engine(backbone, name)
    num_groups = len(engine._optimizer.param_groups)
    first = 1
    if resumed is not None:
        saved = checkpoint.load(folder / resumed).engine
        engine.load_state(saved)
        check_held(engine, saved)
        first = SAVED_AT + 1
    losses = {}
    for step in range(first, STEPS + 1):
        engine.set_lr(LR)
        kill = is_killed and step == SAVED_AT + 1
        result = engine.train_step(_until_killed(lanes(step, size), kill))
        assert result.is_finite
        engine.update_ema(DECAY)
        losses[step] = distributed.mean_over_ranks(result.losses["total"]).item()
        if is_killed and step == SAVED_AT:
            _save(engine.share(distributed.rank(), distributed.world_size()), folder / name)
            (folder / f"{name}.json").write_text(json.dumps(losses))
    with engine.averaged():
        averages = engine._weights(MODEL, engine._shapes)
        share = copy_share(averages, distributed.rank(), distributed.world_size())
    _save(share, folder / f"end-{resumed or 'one'}")
    return {
        "losses": losses,
        "groups": num_groups,
        "bytes": sum(value.nbytes for value in engine._ema.values),
        "peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _save(share: Share, path: Path) -> None:
    """Write a checkpoint as a run does; on rank 0 this ends when it is complete."""
    disks = writing.find_disks(path.parent)
    writing.write(writing.Save(path, 1, disks, {"format": "test"}, {"step": SAVED_AT}), share)
    distributed.barrier()


def check_held(engine: Any, saved: Stored) -> None:
    """Compare what a rank holds of averages, weights and optimizer state with what was saved."""
    with engine.averaged():
        _check_parts(engine._weights(MODEL, engine._shapes), saved)
    _check_parts([*engine._newest(), *engine._optimizer_parts()], saved)


def _check_parts(parts: Sequence[Part], saved: Stored) -> None:
    for part in parts:
        expected = saved.read(part.kind, part.name, part.first, part.values.numel())
        assert torch.equal(part.values.detach().flatten(), expected), (part.kind, part.name)


def largest_difference(one: Stored, other: Stored) -> float:
    """Compare the averages of two checkpoints, tensor by tensor."""
    assert one.catalog == other.catalog
    return max(
        (one.read(MODEL, name).double() - other.read(MODEL, name).double()).abs().max().item()
        for name in one.catalog[MODEL]
    )


def _until_killed(batches: Sequence[Batch], is_killed: bool) -> Iterator[Batch]:
    yield batches[0]
    if is_killed:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from batches[1:]


def compare(
    backbone: str, size: int, folder: Path, ways: Sequence[Sequence[str]] = WAYS
) -> dict[str, Any]:
    """Train on one rank and, killed and resumed, on two; ``AssertionError`` where they differ."""
    (alone,) = run_ranks(train, 1, folder, backbone, size, "zero0", folder, None, False,
                         timeout_seconds=3000)  # fmt: skip
    report = {"alone": alone}
    for before, after in ways:
        try:
            run_ranks(train, 2, folder, backbone, size, before, folder, None, True,
                      timeout_seconds=3000)  # fmt: skip
        except RankError:
            saved = json.loads((folder / f"{before}.json").read_text())  # else it failed before
        else:
            raise AssertionError("it was not killed")
        main, other = run_ranks(train, 2, folder, backbone, size, after, folder, before, False,
                                timeout_seconds=3000)  # fmt: skip
        assert main["losses"] == other["losses"]
        losses = {int(step): loss for step, loss in saved.items()} | main["losses"]
        torch.testing.assert_close(losses, alone["losses"], **LOSSES_CLOSE)
        ends = open_stored(folder / "end-one"), open_stored(folder / f"end-{before}")
        moved = largest_difference(*ends)
        assert moved <= 2 * LR * STEPS, moved
        report[f"{before} -> {after}"] = {
            "bytes": main["bytes"],
            "peak GiB": main["peak GiB"],
            "loss": max(abs(losses[step] - value) for step, value in alone["losses"].items()),
            "weights": moved,
        }
    return report


def main() -> int:
    """Compare backbones, one after the other; 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", required=True)
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--ways", nargs="+", default=["zero3:fsdp", "fsdp:zero3"])
    options = parser.parse_args()
    from tests.ranks.large_backbones import compare  # not of __main__, where ranks do not find it

    for backbone in options.backbones:
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            ways = [way.split(":") for way in options.ways]
            report = compare(backbone, options.size, Path(folder), ways)
        sys.stdout.write(f"{backbone}: {report} in {time.time() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
