"""Checkpoints of the earlier layout, whole files by the code that wrote them, go on working."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdet.engine import checkpoint, keeping
from bigdet.engine.parts import Piece, Share
from bigdet.engine.whole import write_whole
from bigdet.engine.writing import Disks, Save, write
from bigdet.models.weights import find_weights, read_metadata, read_safetensors
from bigdet.pieces.reading import open_stored
from bigdet.pieces.tensor_file import Spec

WEIGHT = torch.arange(12.0).view(3, 4)
MODEL = {"head.weight": WEIGHT, "head.count": torch.tensor(7)}
OPTIMIZER = {"head.weight": {"exp_avg": -WEIGHT, "step": torch.tensor(3.0)}}
SCALE = {"value": 1024.0, "good_steps": 7}


def save_as_before(
    folder: Path, number: int, model: dict[str, Tensor], optimizer: Any, run: dict[str, Any]
) -> None:
    """What ``checkpoint._write`` did until pieces came, but for syncing and renaming."""
    folder.mkdir(parents=True)
    flat = {f"{name}/{key}": v for name, values in optimizer.items() for key, v in values.items()}
    save_file(model, folder / "model.safetensors", {"phase": "train"})
    save_file(flat, folder / "optimizer.safetensors")
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    content = {**run, "files": files, "number": number, "loss_scale": SCALE}
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(content, indent=1))
    (folder.parent / "latest").write_text(f"{folder.name}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints/train-3"
    save_as_before(folder, 5, MODEL, OPTIMIZER, {"step": 3})
    return folder


def test_any_range_of_an_earlier_checkpoint_is_read(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    assert (loaded.run, loaded.is_adopted) == ({"step": 3}, False)
    stored = loaded.engine
    assert stored.loss_scale == SCALE
    assert stored.catalog == {
        "model": {"head.weight": Spec("F32", (3, 4)), "head.count": Spec("I64", ())},
        "exp_avg": {"head.weight": Spec("F32", (3, 4))},
        "step": {"head.weight": Spec("F32", ())},
    }
    assert stored.read("model", "head.weight", 3, 4).tolist() == [3, 4, 5, 6]  # over two rows
    assert stored.read("exp_avg", "head.weight", 11).tolist() == [-11]
    assert stored.read("step", "head.weight").tolist() == [3]
    assert stored.read("model", "head.count").tolist() == [7]


def test_its_weights_are_found_and_it_needs_no_other_file_of_them(folder: Path) -> None:
    assert find_weights(folder) == folder / "model.safetensors"
    assert find_weights(folder.parents[1]) == folder / "model.safetensors"
    assert read_metadata(folder / "model.safetensors") == {"phase": "train"}
    torch.testing.assert_close(read_safetensors(find_weights(folder))[0], MODEL, rtol=0, atol=0)
    before = (folder / "model.safetensors").read_bytes()
    assert write_whole(folder)
    keeping.clean(folder.parent, keep=1, protected=[])
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_damage_is_named_with_the_checkpoint_before_it(folder: Path, name: str) -> None:
    later = folder.with_name("train-4")
    save_as_before(later, 6, MODEL, OPTIMIZER, {"step": 4})
    content = bytearray((later / name).read_bytes())
    content[-1] ^= 1
    (later / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{later}/{name}: altered.* resume={folder}"):
        checkpoint.load(later)
    (later / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{later}/{name}: has .* resume={folder}"):
        checkpoint.load(later)


def test_a_run_goes_on_in_pieces_and_writes_over_an_earlier_checkpoint(folder: Path) -> None:
    later = folder.with_name("train-4")
    for path, number in ((later, 6), (folder, 7)):
        share = Share(
            [Piece("model", "head.weight", 0, WEIGHT.flatten() + number)],
            {"model": {"head.weight": Spec("F32", (3, 4))}},
        )
        write(Save(path, number, Disks(), {"phase": "train"}, {"step": number}), share)
        assert (folder / "model.safetensors").exists() == (path == later)
    assert sorted(path.name for path in folder.iterdir()) == [
        "index-7.json", "pieces-7-0.safetensors", "state.json",
    ]  # fmt: skip
    assert find_weights(folder) == folder
    tensors, metadata = read_safetensors(folder)
    torch.testing.assert_close(tensors, {"head.weight": WEIGHT + 7}, rtol=0, atol=0)
    assert metadata == read_metadata(folder) == {"phase": "train"}


def test_a_checkpoint_whose_replacement_a_crash_cut_off_comes_back(folder: Path) -> None:
    folder.rename(folder.with_name(".part-replaced-train-3"))
    keeping.clean(folder.parent, keep=1, protected=[])
    assert checkpoint.load(folder).run == {"step": 3}


def test_a_copy_of_an_earlier_run_is_known_as_one(folder: Path, tmp_path: Path) -> None:
    checkpoint.adopt(folder, tmp_path / "fork")
    copy = tmp_path / "fork/train-3"
    assert checkpoint.load(copy).is_adopted
    torch.testing.assert_close(
        open_stored(copy).read("model", "head.weight"), WEIGHT.flatten(), rtol=0, atol=0
    )
    (copy / "adopted").write_text(f"{folder}\n")  # as earlier versions wrote it
    assert checkpoint.load(copy).is_adopted
    (copy / "adopted").write_text(f"{folder}\n4\n")  # of what was there before
    assert not checkpoint.load(copy).is_adopted
