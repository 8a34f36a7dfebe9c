"""Weights of one list of classes for a detector of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigdet.config.load import load_config
from bigdet.models.build import build_detector
from bigdet.models.weights import load_parts, save_detector_weights, weights_metadata
from bigdet.run_dir import RunDir
from bigdet.training.phases import build_for_phase
from bigdet.weights.classes import carry_classes
from bigdet.weights.own_runs import load_run
from bigdet.weights.start import check_hand_over, check_start, start_table

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
SOURCE = ["Person", "Wild Bird", "sports car", "boat"]
OWN = ["dog", "wild  bird", "person"]  # rows 1 and 0 of the source, and one of its own


def detector(classes, seed):
    torch.manual_seed(seed)
    config = load_config(CONFIG, ["model.width=32", "model.fc_width=16"])
    made = build_detector(config.model, len(classes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)  # biases too
    return made.eval()


def test_shared_classes_predict_what_they_did_and_new_ones_stay_as_they_were():
    source, own = detector(SOURCE, 1), detector(OWN, 2)
    fresh = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    tensors, kept = carry_classes(own.state_dict(), source.state_dict(), SOURCE, OWN)
    assert kept == 2
    load_parts(own, tensors, ["backbone", "fpn", "rpn", "box_head", "mask_head"], "source")
    pooled = torch.randn(5, 32, 7, 7)
    logits, deltas = own.box_head(pooled)
    source_logits, source_deltas = source.box_head(pooled)
    torch.testing.assert_close(logits[:, [1, 2, 3]], source_logits[:, [1, 0, 4]])  # 4: background
    torch.testing.assert_close(deltas[:, [1, 2]], source_deltas[:, [1, 0]])
    pooled = torch.randn(2, 32, 14, 14)
    masks = own.mask_head(pooled, torch.tensor([1, 2]))
    torch.testing.assert_close(masks, source.mask_head(pooled, torch.tensor([1, 0])))
    state = own.state_dict()
    for name, rows in (
        ("box_head.classifier.weight", 0),
        ("box_head.regressor.bias", slice(0, 4)),
        ("mask_head.predictor.weight", 0),
    ):
        assert torch.equal(state[name][rows], fresh[name][rows]), name


def test_rows_of_anchor_shapes_are_moved_shape_by_shape():
    # 2 anchor shapes: rows are shape 0 of all classes, then shape 1 of all classes.
    own = {"retina_head.classifier.bias": torch.zeros(2 * 3)}
    source = {"retina_head.classifier.bias": torch.arange(10.0, 18.0)}  # 4 classes
    carried, kept = carry_classes(own, source, list("abcd"), ["new", "b", "a"])
    assert kept == 2
    assert carried["retina_head.classifier.bias"].tolist() == [0, 11, 10, 0, 15, 14]


def test_a_class_of_exactly_the_name_is_taken_before_one_of_another_spelling():
    own = {"mask_head.predictor.bias": torch.zeros(2)}
    source = {"mask_head.predictor.bias": torch.tensor([5.0, 6.0])}
    for names in (["dog", "Dog"], ["Dog", "dog"]):
        carried, kept = carry_classes(own, source, names, ["Dog", "dog"])
        expected = [6.0, 5.0] if names[0] == "dog" else [5.0, 6.0]
        assert (carried["mask_head.predictor.bias"].tolist(), kept) == (expected, 2)


def test_weights_that_are_the_same_for_all_classes_are_left_alone():
    own = {"box_head.regressor.bias": torch.zeros(4), "fpn.convs.0.bias": torch.zeros(4)}
    source = {name: torch.arange(4.0) for name in own}
    assert carry_classes(own, source, list("abcd"), list("xyz")) == (source, 0)


def test_one_box_for_all_classes_is_kept_where_there_is_one_class(tmp_path: Path):
    words = ["model.width=32", "model.fc_width=16"]
    heads = {"cascade_rcnn": "stages.2.regressor", "faster_rcnn": "regressor"}
    for name, layer in heads.items():
        config = load_config(CONFIG, [*words, f"model.detector={name}"])
        source, own = (build_detector(config.model, 1) for _ in range(2))
        path = tmp_path / f"{name}.safetensors"
        metadata = weights_metadata(config, [{"name": "dog"}], "finetune")
        save_detector_weights(path, source, metadata)
        fresh = own.box_head.get_submodule(layer).weight.clone()
        _, kept = load_run(own, path, ["box_head"], ["cat"])
        assert kept == 0
        # A cascade's four rows are of all classes, the other's of the dog alone.
        expected = source.box_head.get_submodule(layer).weight if "cascade" in name else fresh
        assert torch.equal(own.box_head.get_submodule(layer).weight, expected), name


def test_the_table_says_where_every_part_came_from():
    source, own = detector(SOURCE, 1), detector(OWN, 2)
    tensors, kept = carry_classes(own.state_dict(), source.state_dict(), SOURCE, OWN)
    rows = load_parts(own, tensors, ["backbone", "box_head"], "runs/x")
    lines = [line.split() for line in start_table(own, rows, len(OWN), kept)]
    assert lines[0] == ["part", "tensors", "parameters", "classes", "kept", "from"]
    table = {line[0]: line[1:] for line in lines[1:]}
    assert list(table) == ["backbone", "fpn", "rpn", "box_head", "mask_head"]
    assert table["backbone"][2:] == ["runs/x"]
    # 2fc on 32 x 7 x 7 features: 1568 x 16 + 16, 16 x 16 + 16, (3 + 1) x 17, 12 x 17
    assert table["box_head"] == ["8", "25,648", "2", "of", "3", "runs/x"]
    assert table["mask_head"][2:] == ["random"]


def test_other_shapes_are_still_refused():
    source, own = detector(SOURCE, 1), detector(OWN, 2)
    with pytest.raises(ValueError, match=r"box_head\.classifier\.bias: \(5,\) for \(4,\)"):
        load_parts(own, source.state_dict(), ["box_head"], "source")


def test_a_phase_starts_from_a_run_with_other_classes(tmp_path, caplog):
    words = ["model.width=32", "model.fc_width=16", f"phases.pretrain.start_from.source={tmp_path}"]
    config = load_config(CONFIG, words)
    source = detector(SOURCE, 1)
    metadata = weights_metadata(config, [{"name": name} for name in SOURCE], "finetune")
    save_detector_weights(tmp_path / "model.safetensors", source, metadata)
    with caplog.at_level("INFO", "bigdet"):
        built = build_for_phase(
            config, "pretrain", OWN, RunDir(tmp_path / "run"), torch.device("cpu"), False
        )
    assert torch.equal(built.box_head.classifier.bias[2], source.box_head.classifier.bias[0])
    assert any("box_head" in line and "2 of 3" in line for line in caplog.messages)
    assert any("not stated (start_from.cost)" in line for line in caplog.messages)
    file = f"phases.pretrain.start_from={{source: {tmp_path}/model.safetensors, pixels: bgr}}"
    with pytest.raises(ValueError, match=r"bigdet wrote it, so images are RGB\. Leave out pixels"):
        check_start(load_config(CONFIG, [*words[:2], file]), "pretrain", OWN)
    other = load_config(CONFIG, [*words, "model.backbone=resnet18", "model.fc_width=32"])
    expected = r"They were trained with model\.backbone=resnet10 \(here resnet18\), "
    with pytest.raises(ValueError, match=rf"{expected}model\.fc_width=16 \(here 32\)\.$"):
        check_start(other, "pretrain", OWN)


OWN_NETS = """
output: run
data: {train: {shards: a}, val: {shards: b}}
model: {backbone: "tests.own_nets:Plain", detector: "tests.own_nets:points", norm: gn}
engine: {kind: fsdp, zero_stage: null, precision: fp32}
phases:
  first: {steps: 2, images_per_gpu: 2, resize: {kind: direct, size: 64}, lr: 0.01, warmup_steps: 0}
  second: {steps: 2, images_per_gpu: 2, resize: {kind: direct, size: 64}, lr: 0.01, warmup_steps: 0}
"""


def test_an_own_head_is_not_handed_on_to_other_classes(tmp_path: Path):
    (tmp_path / "own.yaml").write_text(OWN_NETS)
    config = load_config(tmp_path / "own.yaml")
    check_hand_over(config, "second", ["a", "b"], ["a", "b"])
    said = r"^phases\.second\.start_from\.parts: found points, .* rows of points\.weight are of"
    for others in (["b"], ["a", "c"], ["b", "a"]):  # as many, and in another order, too
        with pytest.raises(ValueError, match=said):
            check_hand_over(config, "second", ["a", "b"], others)
    without = load_config(tmp_path / "own.yaml", ["phases.second.start_from.parts=[backbone]"])
    check_hand_over(without, "second", ["a", "b"], ["b"])
