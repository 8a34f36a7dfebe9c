"""Where the weights of a phase come from, and what it does to the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from bigdet.config.load import parse_config
from bigdet.config.run import check_config
from bigdet.models.activation_checkpointing import Checkpointed
from bigdet.models.backbones.vgg import VGG
from bigdet.models.build import build_detector
from bigdet.models.norms import batch_norms
from bigdet.models.rcnn import RCNN
from bigdet.models.weights import save_detector_weights, weights_metadata
from bigdet.run_dir import RunDir
from bigdet.training.phases import build_for_phase
from bigdet.weights.own_runs import hidden_differences
from bigdet.weights.whole_detectors import with_sampling

CONFIG = """
output: runs/x
data: {train: {shards: a}, val: {shards: b}}
model: {detector: mask_rcnn, backbone: resnet18, width: 16, fc_width: 16}
engine: {activation_checkpointing: CHECKPOINTED}
phases:
  train:
    {steps: 2, images_per_gpu: 1, lr: 0.1, resize: {kind: direct, size: 96}, norm_mode: sync,
     freeze_stages: 2, start_from: {source: "SOURCE"}}
"""


def test_a_phase_starts_from_a_backbone_that_others_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = torchvision.models.resnet18()
    path = tmp_path / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    config = parse_config(
        CONFIG.replace("SOURCE", str(path)).replace("CHECKPOINTED", "true"), "test"
    )
    with caplog.at_level(logging.INFO):
        detector = build_for_phase(
            config, "train", list("abc"), RunDir(tmp_path), torch.device("cpu"), is_resumed=False
        )
    expected = reference.state_dict()
    for name, tensor in detector.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # 11,176,512 numbers: torchvision's 11,689,512 less 512 x 1000 + 1000 of its classifier. 20
    # convolutions and norms of 4 tensors each.
    rows = {m.split()[2]: m.split()[3:] for m in caplog.messages if m.startswith("phase train: ")}
    assert rows["backbone"] == ["100", "11,176,512", str(path)]
    assert {rows[part][-1] for part in ("fpn", "rpn", "box_head", "mask_head")} == {"random"}
    frozen = batch_norms(detector.backbone.layer1)
    assert {norm.mode for norm in frozen} == {"fixed"}
    assert {norm.mode for norm in batch_norms(detector.backbone.layer2)} == {"sync"}
    parts = [part for part in detector.modules() if isinstance(part, Checkpointed)]
    assert len(parts) == 4
    assert all(part.is_checkpointed for part in parts)


@pytest.mark.parametrize(("ema", "value"), [("null", 1.0), ("true", 2.0)])
def test_a_phase_may_start_from_the_moving_average(tmp_path: Path, ema: str, value: float) -> None:
    plain, average = (
        {name: torch.full_like(tensor, number) for name, tensor in state.items()}
        for number in (1.0, 2.0)
        for state in [torchvision.models.resnet18().state_dict()]
    )
    path = tmp_path / "resnet18.pth"
    torch.save({"model": plain, "model_ema": average}, path)
    text = CONFIG.replace('"SOURCE"', f"{path}, ema: {ema}").replace("CHECKPOINTED", "false")
    detector = build_for_phase(
        parse_config(text, "test"),
        "train",
        list("abc"),
        RunDir(tmp_path),
        torch.device("cpu"),
        is_resumed=False,
    )
    assert {float(tensor.mean()) for tensor in detector.backbone.state_dict().values()} == {value}


def test_vgg_brings_fc6_and_fc7_when_asked_for_the_box_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**VGG().state_dict()}
    for name, inputs in (("classifier.0", 512 * 49), ("classifier.3", 16)):
        state |= {f"{name}.weight": torch.rand(16, inputs), f"{name}.bias": torch.rand(16)}
    path = tmp_path / "vgg.pth"
    torch.save(state, path)
    text = CONFIG.replace("CHECKPOINTED", "false").replace("steps: 2", "steps: 900")
    for old, new in (
        ('"SOURCE"', f"{path}, parts: [backbone, box_head]"),
        (", norm_mode: sync", ""),
        ("mask_rcnn", "faster_rcnn"),
        ("resnet18, width: 16", "vgg16, norm: none"),
    ):
        text = text.replace(old, new)
    config = parse_config(text, "test")
    check_config(config)
    with caplog.at_level(logging.INFO):
        detector = build_for_phase(
            config, "train", list("abc"), RunDir(tmp_path), torch.device("cpu"), is_resumed=False
        )
    assert isinstance(detector, RCNN)
    assert torch.equal(detector.box_head.fcs[1].weight, state["classifier.3.weight"])
    rows = {m.split()[2]: m.split()[5:] for m in caplog.messages if m.startswith("phase train: ")}
    assert rows["backbone"] == [str(path)]
    assert rows["box_head"] == ["0", "of", "3", str(path), "(fc6,", "fc7)"]
    assert rows["rpn"] == ["random"]


def test_activation_checkpointing_is_off_by_default(tmp_path: Path) -> None:
    text = CONFIG.replace("SOURCE", "random").replace("CHECKPOINTED", "false")
    config = parse_config(text.replace("freeze_stages: 2", "freeze_stages: 0"), "test")
    detector = build_for_phase(
        config, "train", list("abc"), RunDir(tmp_path), torch.device("cpu"), is_resumed=False
    )
    assert not any(p.is_checkpointed for p in detector.modules() if isinstance(p, Checkpointed))


def test_a_start_from_heads_that_pool_otherwise_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"
    text = CONFIG.replace("SOURCE", str(path)).replace("CHECKPOINTED", "false")
    config = parse_config(text, "test")
    adaptive = with_sampling(config, 0)
    detector = build_detector(config.model, 3)
    categories = [{"id": number, "name": name} for number, name in enumerate("abc")]
    save_detector_weights(path, detector, weights_metadata(adaptive, categories, "train"))
    for own, expected in ((config, 1), (adaptive, 0)):
        caplog.clear()
        build_for_phase(
            own, "train", list("abc"), RunDir(tmp_path), torch.device("cpu"), is_resumed=False
        )
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == expected
        for message in warned:
            assert "trained with model.roi.sampling_ratio: 0, and this run has 2" in message


def test_options_that_shapes_do_not_show_are_warned_for_the_parts_that_are_loaded(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    text = CONFIG.replace("SOURCE", str(path)).replace("CHECKPOINTED", "false")
    config = parse_config(text, "test")
    detector = build_detector(config.model, 3)
    save_detector_weights(path, detector, weights_metadata(config, [], "train"))
    assert hidden_differences(detector, path, ["backbone", "fpn", "rpn", "box_head"]) == ""
    rpn = replace(config.model.rpn, anchor_sizes=[16, 32, 64, 128, 256])
    detector.config = replace(config.model, neck="simple", pad_to_square=True, rpn=rpn)
    said = hidden_differences(detector, path, ["fpn", "rpn"])
    assert said.startswith(
        f"{path} was trained with model.neck: fpn, and this run has simple; "
        "model.rpn.anchor_sizes: [32, 64, 128, 256, 512], and this run has [16, 32, 64, 128, 256]. "
    )
    assert "model.pad_to_square: False, and this run has True" in hidden_differences(
        detector, path, ["backbone"]
    )
    assert hidden_differences(detector, path, ["box_head"]) == ""
