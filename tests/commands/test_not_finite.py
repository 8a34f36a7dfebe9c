"""The commands with weights that are not finite, or with steps that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from bigdet import evaluate, predict, train
from bigdet.data.format.manifest import Manifest
from bigdet.data.format.shard_set import ShardSet
from tests.commands.runs import arguments
from tests.commands.tiny_detector import save_detector

pytestmark = pytest.mark.usefixtures("in_process")


def changed_weights(folder: Path, shards: Path, part: str, value: float) -> Path:
    """The file of a detector of a tiny run in which one number of a part is replaced."""
    manifest: Manifest = ShardSet(str(shards / "val")).manifest
    categories = [{"id": each.id, "name": each.name} for each in manifest.categories]
    path = save_detector(folder, categories) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.startswith(part))
    tensors[name][(0,) * tensors[name].ndim] = value
    save_file(tensors, path, metadata)
    return path


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_every_command_refuses_them_by_name(
    tmp_path: Path, shapes_shards: Path, command: str
) -> None:
    path = changed_weights(tmp_path / "nan", shapes_shards, "fpn.", float("nan"))
    shards, source = str(shapes_shards / "val"), f"phases.pretrain.start_from.source={path}"
    main, words = {
        "train": (train.main, arguments(tmp_path / "run", shapes_shards, source)),
        "evaluate": (evaluate.main, [str(path), "--shards", shards]),
        "predict": (predict.main, [str(path), shards, "--out", str(tmp_path / "found")]),
    }[command]
    with pytest.raises(
        ValueError, match=rf"{path}: 1 of \d+ tensors is not finite: fpn\.\S+ \(1 of"
    ):
        main(words)
    assert not (tmp_path / "run/metrics.jsonl").exists()  # it is reported before the first step


def test_a_phase_whose_steps_were_all_skipped_does_not_finish(
    tmp_path: Path, shapes_shards: Path
) -> None:
    # Finite, but its sums with the pixels of an image are not.
    path = changed_weights(tmp_path / "huge", shapes_shards, "backbone.conv1.weight", 3e38)
    more = [f"phases.pretrain.start_from.source={path}", "phases.pretrain.steps=3"]
    more += ["log.tensorboard=false", "data.workers=0", "engine.zero_stage=0"]
    with pytest.raises(ValueError, match=r"pretrain step 3: all 3 steps of the phase were skipped"):
        train.main(arguments(tmp_path / "run", shapes_shards, *more))
    assert not (tmp_path / "run/model.safetensors").exists()
    assert not (tmp_path / "run/checkpoints/pretrain-3").exists()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    values = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["bad_steps"] for line in values] == [1, 2, 3]
    assert [line["grad_norm"] for line in values] == [None, None, None]
    assert all("bbox/AP" not in line for line in values)
