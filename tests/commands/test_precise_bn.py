"""Statistics of BN measured anew before evaluations: training is the same, and so is a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from bigdet import train
from tests.commands.runs import arguments, assert_same_run, numbers, weights
from tests.spawn import run_ranks

WORDS = [
    "data.workers=0",
    "evaluation.every=4",
    "phases.finetune.steps=2",
    "log.tensorboard=false",
    "evaluation.pictures=0",
    "checkpoint.keep=20",
]


def train_three(folder: Path, shards: Path) -> list[int]:
    """Train without it, with it, and on from the middle of the second run."""
    precise = "evaluation.precise_bn=2"
    codes = [
        train.main(arguments(folder / "plain", shards, *WORDS)),
        train.main(arguments(folder / "precise", shards, *WORDS, precise)),
    ]
    shutil.copytree(folder / "precise", folder / "resumed")
    checkpoints = folder / "resumed/checkpoints"
    (folder / "resumed/model.safetensors").unlink()
    for name in ("pretrain-6", "finetune-2"):
        shutil.rmtree(checkpoints / name)
    (checkpoints / "latest").write_text("pretrain-4\n")
    return [*codes, train.main(arguments(folder / "resumed", shards, *WORDS, precise))]


def test_training_is_the_same_and_a_resumed_run_too(tmp_path: Path, shapes_shards: Path):
    (codes,) = run_ranks(train_three, 1, tmp_path, tmp_path, shapes_shards)
    assert codes == [0, 0, 0]
    plain, precise = numbers(tmp_path / "plain"), numbers(tmp_path / "precise")
    for one, other in zip(plain, precise, strict=True):
        if one["phase"] == "pretrain" and "loss/total" in one:
            assert one == other  # live BN does not read the running statistics
    own, other = weights(tmp_path / "plain"), weights(tmp_path / "precise")
    differing = {name for name in own if not torch.equal(own[name], other[name])}
    assert "backbone.bn1.running_mean" in differing  # which fixed BN has taken over
    assert_same_run(tmp_path / "resumed", tmp_path / "precise")
