"""A run with a frozen backbone: what it leaves, and how it continues from its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigdet import evaluate
from bigdet.models.build import build_detector
from bigdet.models.weights import load_detector
from bigdet.pieces.index import read_index, read_state
from bigdet.weights.own_runs import load_run
from bigdet.weights.torchvision_layout import to_torchvision
from tests.commands.runs import Command, numbers, weights

WORDS = [
    "phases.pretrain.steps=2",
    "phases.pretrain.warmup_steps=1",
    "phases.finetune.freeze_stages=0",
    "phases.finetune.freeze=backbone",
    "evaluation.every=null",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes_shards) -> Path:
    """An uninterrupted run of one process, whose checkpoints are also in the folder remote."""
    folder = tmp_path_factory.mktemp("frozen")
    remote = f"checkpoint.remote=file://{folder}/remote"
    code, printed = Command(folder / "run", shapes_shards, *WORDS, remote).finish()
    assert code == 0, printed
    assert "the backbone is frozen: " in printed
    return folder / "run"


def frozen_file(run: Path) -> Path:
    (file,) = (run / "frozen").iterdir()
    return file


def losses(run: Path) -> list[dict]:
    """The log lines of the last two steps."""
    lines = [line for line in numbers(run) if (line["phase"], line["step"]) > ("finetune", 2)]
    return [line for line in lines if line["phase"] == "finetune" and "loss/total" in line]


def test_no_checkpoint_has_the_backbone_and_a_file_has_it_once(whole):
    before = load_file(whole / "checkpoints/pretrain-2/model.safetensors")
    frozen = load_file(frozen_file(whole))
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
    left = load_file(whole / "checkpoints/finetune-4/model.safetensors")
    assert left
    assert not any(name.startswith("backbone.") for name in left)
    final = weights(whole)
    assert final.keys() == left.keys() | frozen.keys()
    assert all(torch.equal(final[name], each) for name, each in {**left, **frozen}.items())


def test_its_final_weights_are_a_detector_by_themselves_and_others_need_the_file(whole, tmp_path):
    frozen = load_file(frozen_file(whole))
    shutil.copy(whole / "model.safetensors", tmp_path)
    for place in (tmp_path, whole, whole / "checkpoints/finetune-2"):
        detector = load_detector(place)  # with it, as it was trained
        found = detector.backbone.conv1.weight
        assert torch.equal(found, frozen["backbone.conv1.weight"])
        assert len(detector.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])) == 1
    shutil.copy(whole / "checkpoints/finetune-4/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"its frozen backbone is not in it, and frozen/\w{16}\."):
        load_detector(tmp_path)
    shutil.copytree(whole / "frozen", tmp_path / "frozen")
    plain = load_detector(tmp_path, keep_frozen=False)
    expected = frozen["backbone.conv1.weight"].float()
    for name in ("backbone.body.conv1.weight", "roi_heads.box_predictor.bbox_pred.weight"):
        assert name in to_torchvision(plain, plain.state_dict())
    for source in (whole, tmp_path / "model.safetensors"):
        torch.manual_seed(0)
        other = build_detector(plain.config, plain.num_classes)
        load_run(other, source, ["backbone", "fpn"], ["circle", "square", "triangle", "star"])
        assert torch.equal(other.backbone.conv1.weight, expected)
        assert torch.equal(other.fpn.laterals[0].conv.weight, plain.fpn.laterals[0].conv.weight)


def test_evaluation_from_its_folder_gives_the_numbers_of_the_run(
    whole, shapes_shards, tmp_path, in_process
):
    own = json.loads((whole / "evaluation/finetune-4.json").read_text())
    for place in (whole, whole / "checkpoints/finetune-4"):
        out = tmp_path / "ap.json"
        words = [str(place), "--shards", f"{shapes_shards}/val", "--out", str(out)]
        assert evaluate.main(words) == 0
        assert json.loads(out.read_text()) == own


def test_a_fresh_machine_continues_exactly_from_the_remote(whole, shapes_shards, tmp_path):
    shutil.copytree(whole.parent / "remote", tmp_path / "remote")
    assert [file.name for file in (tmp_path / "remote/frozen").iterdir()] == [
        frozen_file(whole).name
    ]
    shutil.rmtree(tmp_path / "remote/finetune-4")
    (tmp_path / "remote/latest").write_text("finetune-2\n")
    more = [f"checkpoint.remote=file://{tmp_path}/remote", "checkpoint.with_frozen=false"]
    code, printed = Command(tmp_path / "run", shapes_shards, *WORDS, *more).finish()
    assert code == 0, printed
    assert frozen_file(tmp_path / "run").read_bytes() == frozen_file(whole).read_bytes()
    assert losses(tmp_path / "run") == losses(whole)
    assert len(losses(whole)) == 2
    expected = load_file(whole / "checkpoints/finetune-4/model.safetensors")
    found = weights(tmp_path / "run")  # without the backbone
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    load_detector(tmp_path / "run")


def test_another_run_continues_from_its_checkpoint_with_a_share_on_each_rank(
    whole, shapes_shards, tmp_path
):
    start = f"resume={whole}/checkpoints/finetune-2"
    engine = ["engine.kind=fsdp", "engine.zero_stage=null"]
    more = [*WORDS, *engine, start]
    code, printed = Command(tmp_path / "run", shapes_shards, *more, ranks=2).finish()
    assert code == 0, printed
    assert "MiB on each rank (divided over 2)" in printed
    assert frozen_file(tmp_path / "run").read_bytes() == frozen_file(whole).read_bytes()
    found, expected = (
        [line["loss/total"] for line in losses(r)] for r in (tmp_path / "run", whole)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-3, atol=1e-5)


def test_another_backbone_than_the_checkpoints_is_refused(whole, shapes_shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    tensors = load_file(frozen_file(other))
    tensors["backbone.bn1.bias"] += 1
    save_file(tensors, frozen_file(other))
    start = f"resume={other}/checkpoints/finetune-2"
    code, printed = Command(tmp_path / "run", shapes_shards, *WORDS, start).finish()
    assert code == 1
    assert f"{frozen_file(other).name}: its tensors have the hash" in printed
    assert "Traceback" not in printed
