"""A run with a frozen backbone: what it leaves, and how it continues from its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigdet.models.weights import load_detector
from bigdet.pieces.index import read_index, read_state
from tests.commands.runs import Command, numbers

WORDS = [
    "phases.pretrain.steps=2",
    "phases.pretrain.warmup_steps=1",
    "phases.finetune.freeze_stages=0",
    "phases.finetune.freeze=backbone",
    "evaluation.every=null",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes_shards) -> Path:
    """An uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("frozen") / "run"
    code, printed = Command(output, shapes_shards, *WORDS).finish()
    assert code == 0, printed
    assert "the backbone is frozen: " in printed
    return output


def test_no_checkpoint_has_the_backbone_and_a_file_has_it_once(whole):
    before = load_file(whole / "checkpoints/pretrain-2/model.safetensors")
    frozen = load_file(whole / "frozen/finetune.safetensors")
    names = {name for name in before if name.startswith("backbone.")}
    assert set(frozen) == names
    for name in names:
        assert torch.equal(frozen[name], before[name].to(frozen[name].dtype)), name
    assert frozen["backbone.conv1.weight"].dtype == torch.bfloat16
    for checkpoint in ("checkpoints/finetune-2", "checkpoints/finetune-4"):
        folder = whole / checkpoint
        catalog = read_index(folder, read_state(folder)["files"]).catalog
        assert catalog["model"].keys() >= catalog["exp_avg"].keys() > set()
        assert not any(name.startswith("backbone.") for kind in catalog.values() for name in kind)
    for checkpoint in ("checkpoints/finetune-4", "."):
        left = load_file(whole / checkpoint / "model.safetensors")
        assert left
        assert not any(name.startswith("backbone.") for name in left)
    for place in (whole, whole / "checkpoints/finetune-4"):
        detector = load_detector(place)  # with it, as it was trained
        found = detector.backbone.conv1.weight
        assert torch.equal(found, frozen["backbone.conv1.weight"])
        assert len(detector.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])) == 1


def test_another_run_continues_from_its_checkpoint_with_another_engine(
    whole, shapes_shards, tmp_path
):
    start = f"resume={whole}/checkpoints/finetune-2"
    engine = ["engine.kind=fsdp", "engine.zero_stage=null"]
    code, printed = Command(tmp_path / "run", shapes_shards, *WORDS, *engine, start).finish()
    assert code == 0, printed
    frozen = "frozen/finetune.safetensors"
    assert (tmp_path / "run" / frozen).read_bytes() == (whole / frozen).read_bytes()
    losses = [
        [line["loss/total"] for line in numbers(output) if line.get("step", 0) > 2
         and line["phase"] == "finetune" and "loss/total" in line]
        for output in (whole, tmp_path / "run")
    ]  # fmt: skip
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(output / "model.safetensors") for output in (whole, tmp_path / "run")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_another_backbone_than_the_checkpoints_is_refused(whole, shapes_shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    tensors = load_file(other / "frozen/finetune.safetensors")
    tensors["backbone.bn1.bias"] += 1
    save_file(tensors, other / "frozen/finetune.safetensors")
    start = f"resume={other}/checkpoints/finetune-2"
    code, printed = Command(tmp_path / "run", shapes_shards, *WORDS, start).finish()
    assert code == 1
    assert "finetune.safetensors: its tensors have the hash" in printed
    assert "Traceback" not in printed
