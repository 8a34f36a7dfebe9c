"""Averages of weights in a run: evaluated next to the weights, handed on, resumed, and the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bigdet import train
from bigdet.engine import precision
from bigdet.models.weights import load_detector, read_metadata
from bigdet.pieces.index import MODEL, NEWEST
from bigdet.pieces.reading import open_stored
from bigdet.weights.start import _check_ema
from tests.commands.runs import arguments, assert_same_run, numbers, weights
from tests.spawn import run_ranks

WORDS = [
    "data.workers=0",
    "log.tensorboard=false",
    "evaluation.pictures=0",
    "checkpoint.keep=20",
    "checkpoint.every=1",
    "engine.precision=fp16",
    "phases.pretrain.steps=4",
    "phases.pretrain.ema.decay=0.25",
    "phases.pretrain.layer_decay=0.8",
    "phases.finetune.steps=3",
    "phases.finetune.ema.decay=0.9",
    "phases.finetune.ema.evaluate=both",
]


TOO_HIGH = 2.0**19
"""A loss scale of fp16 that makes the first steps of a phase overflow."""


def train_two(folder: Path, shards: Path) -> list[int]:
    """Train, and on from the middle of a phase."""
    precision.INITIAL_SCALE = TOO_HIGH
    codes = [train.main(arguments(folder / "whole", shards, *WORDS))]
    shutil.copytree(folder / "whole", folder / "resumed")
    (folder / "resumed/model.safetensors").unlink()
    for name in ("pretrain-4", "finetune-1", "finetune-2", "finetune-3"):
        shutil.rmtree(folder / "resumed/checkpoints" / name)
    (folder / "resumed/checkpoints/latest").write_text("pretrain-3\n")
    return [*codes, train.main(arguments(folder / "resumed", shards, *WORDS))]


Tensors = dict[str, torch.Tensor]


def of_checkpoint(output: Path, name: str) -> tuple[Tensors, ...]:
    """What a checkpoint says the model is, and the weights that training goes on from."""
    stored = open_stored(output / "checkpoints" / name)
    tensors = [dict(zip(stored.catalog[k], stored.whole(k), strict=True)) for k in (MODEL, NEWEST)]
    return tuple({name: value.double() for name, value in kind.items()} for kind in tensors)


def check_averages(output: Path, phase: str, steps: int, decay: float, start: Tensors) -> Tensors:
    """Work the averages of a phase out in double from its weights; give those of its end."""
    average, skipped = start, 0
    for step in range(1, steps + 1):
        found, newest = of_checkpoint(output, f"{phase}-{step}")
        state = json.loads((output / f"checkpoints/{phase}-{step}/state.json").read_text())
        if state["run"]["skipped_steps"] > skipped:
            skipped += 1
        else:
            counted = step - skipped
            factor = min(decay, (1 + counted) / (10 + counted))
            average = {
                name: factor * average[name] + (1 - factor) * value
                for name, value in newest.items()
            }
        for name, value in average.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
        average = {name: found[name] for name in newest}
    assert 0 < skipped < steps
    return found


def test_a_run_evaluates_hands_on_and_ends_with_averages(tmp_path: Path, shapes_shards: Path):
    (codes,) = run_ranks(train_two, 1, tmp_path, tmp_path, shapes_shards)
    assert codes == [0, 0]
    whole = tmp_path / "whole"
    assert_same_run(tmp_path / "resumed", whole)

    # The first step is skipped: the average is the start.
    start, newest = of_checkpoint(whole, "pretrain-1")
    assert all(torch.equal(start[name], value) for name, value in newest.items())
    handed_on = check_averages(whole, "pretrain", 4, 0.25, start)
    trained = of_checkpoint(whole, "finetune-1")[1]
    assert "backbone.conv1.weight" not in trained  # frozen there
    last = check_averages(whole, "finetune", 3, 0.9, {name: handed_on[name] for name in trained})

    final = weights(whole)
    assert all(torch.equal(final[name].double(), value) for name, value in last.items())
    assert read_metadata(whole / "model.safetensors")["weights"] == "moving average (EMA)"
    loaded = load_detector(whole).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in final.items())
    _check_ema(whole, True)
    with pytest.raises(ValueError, match=r"found the moving average .* of its weights alone"):
        _check_ema(whole, False)

    evaluated = [
        (line["phase"], line["step"], key)
        for line in numbers(whole)
        for key in line
        if key.endswith("bbox/AP")
    ]
    assert sorted(evaluated) == [
        ("finetune", 3, "bbox/AP"),
        ("finetune", 3, "weights/bbox/AP"),
        ("pretrain", 4, "bbox/AP"),
    ]
