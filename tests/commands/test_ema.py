"""Averages of weights in a run: evaluated next to the weights, handed on, resumed, and the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bigdet import train
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
    "phases.pretrain.steps=3",
    "phases.pretrain.ema.decay=0.25",
    "phases.pretrain.layer_decay=0.8",
    "phases.finetune.steps=2",
    "phases.finetune.ema.decay=0.9",
    "phases.finetune.ema.evaluate=both",
]


def train_two(folder: Path, shards: Path) -> list[int]:
    """Train, and on from the middle of each phase."""
    codes = [train.main(arguments(folder / "whole", shards, *WORDS))]
    shutil.copytree(folder / "whole", folder / "resumed")
    (folder / "resumed/model.safetensors").unlink()
    for name in ("pretrain-3", "finetune-1", "finetune-2"):
        shutil.rmtree(folder / "resumed/checkpoints" / name)
    (folder / "resumed/checkpoints/latest").write_text("pretrain-2\n")
    return [*codes, train.main(arguments(folder / "resumed", shards, *WORDS))]


def of_checkpoint(output: Path, name: str) -> tuple[dict[str, torch.Tensor], ...]:
    """What a checkpoint says the model is, and the weights that training goes on from."""
    stored = open_stored(output / "checkpoints" / name)
    tensors = [dict(zip(stored.catalog[k], stored.whole(k), strict=True)) for k in (MODEL, NEWEST)]
    return tuple({name: value.double() for name, value in kind.items()} for kind in tensors)


def test_a_run_evaluates_hands_on_and_ends_with_averages(tmp_path: Path, shapes_shards: Path):
    (codes,) = run_ranks(train_two, 1, tmp_path, tmp_path, shapes_shards)
    assert codes == [0, 0]
    whole = tmp_path / "whole"
    assert_same_run(tmp_path / "resumed", whole)

    # Decay at step n: (1 + n) / (10 + n), but at most 0.25.
    averages = [of_checkpoint(whole, f"pretrain-{n}") for n in (1, 2, 3)]
    for before, (average, newest), decay in zip(averages, averages[1:], (0.25, 0.25), strict=False):
        for name, value in newest.items():
            expected = decay * before[0][name] + (1 - decay) * value
            torch.testing.assert_close(average[name], expected, rtol=1e-6, atol=1e-7)
    # The next phase starts from the average: its first one is 2/11 of that, 9/11 of the newest.
    average, newest = of_checkpoint(whole, "finetune-1")
    for name, value in newest.items():
        expected = 2 / 11 * averages[-1][0][name] + 9 / 11 * value
        torch.testing.assert_close(average[name], expected, rtol=1e-6, atol=1e-7)
    assert "backbone.conv1.weight" not in newest  # frozen there

    final, (last, _) = weights(whole), of_checkpoint(whole, "finetune-2")
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
        ("finetune", 2, "bbox/AP"),
        ("finetune", 2, "weights/bbox/AP"),
        ("pretrain", 3, "bbox/AP"),
    ]
