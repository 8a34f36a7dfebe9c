"""The hand-over from a Mask R-CNN to a cascade: weights, metadata, and what is left anew."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from bigdet.config import families
from bigdet.config.load import load_config
from bigdet.models.backbones.resnet import ResNet
from bigdet.models.heads.cascade import CascadeHead
from bigdet.models.weights import load_detector, save_detector_weights, weights_metadata
from bigdet.run_dir import RunDir
from bigdet.training.phases import build_empty, build_for_phase, start_weights

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
SMALL = ["model.width=16", "model.fc_width=16"]
CPU = torch.device("cpu")
CATEGORIES = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


def leave(run_dir: RunDir, config, phase: str, detector: torch.nn.Module) -> Path:
    """Write what a phase leaves behind at its end."""
    folder = run_dir.checkpoint(phase, config.phases[phase].steps)
    folder.mkdir(parents=True)
    metadata = weights_metadata(config, CATEGORIES, phase)
    save_detector_weights(RunDir(folder).weights, detector, metadata)
    return RunDir(folder).weights


def test_a_cascade_starts_with_the_heads_of_the_mask_rcnn_before_it(tmp_path, caplog):
    overrides = [*SMALL, "phases.finetune.model.detector=cascade_mask_rcnn"]
    config, run_dir = load_config(CONFIG, overrides), RunDir(tmp_path)
    first = build_for_phase(config, "pretrain", ["a", "b"], run_dir, CPU, False)
    assert load_detector(leave(run_dir, config, "pretrain", first)).config.detector == "mask_rcnn"
    caplog.clear()  # of what the first phase said, where an earlier test turned it on
    with caplog.at_level(logging.INFO, "bigdet"):
        second = build_for_phase(config, "finetune", ["a", "b"], run_dir, CPU, False)
    assert "box_head: one, copied to all 3 stages of the cascade" in caplog.messages
    assert not any("random" in message for message in caplog.messages)
    pooled = torch.randn(4, 16, 7, 7)
    assert isinstance(second.box_head, CascadeHead)
    for stage in second.box_head.stages:
        torch.testing.assert_close(stage(pooled), first.box_head(pooled), rtol=0, atol=0)
    for name, tensor in first.state_dict().items():
        if not name.startswith("box_head."):
            assert torch.equal(tensor, second.state_dict()[name]), name

    loaded = load_detector(leave(run_dir, config, "finetune", second))
    assert loaded.config.detector == "cascade_mask_rcnn"
    assert torch.equal(
        loaded.box_head.stages[2].regressor.weight, second.box_head.stages[2].regressor.weight
    )


def test_a_head_that_the_phase_before_did_not_have_starts_anew_and_is_named(tmp_path, caplog):
    overrides = [*SMALL, "model.detector=faster_rcnn", "phases.finetune.model.detector=mask_rcnn"]
    config, run_dir = load_config(CONFIG, overrides), RunDir(tmp_path)
    first = build_for_phase(config, "pretrain", ["a", "b"], run_dir, CPU, False)
    leave(run_dir, config, "pretrain", first)
    caplog.clear()  # of what the first phase said, where an earlier test turned it on
    with caplog.at_level(logging.INFO, "bigdet"):
        second = build_for_phase(config, "finetune", ["a", "b"], run_dir, CPU, False)
    fresh = [message.split()[2] for message in caplog.messages if message.endswith("random")]
    assert fresh == ["mask_head"]
    assert torch.equal(second.box_head.regressor.weight, first.box_head.regressor.weight)


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_weights_to_start_from_in_a_file_are_those_of_a_detector_built_whole(tmp_path, phase):
    config, run_dir = load_config(CONFIG, SMALL), RunDir(tmp_path)
    first = build_for_phase(config, "pretrain", ["a", "b"], run_dir, CPU, False)
    leave(run_dir, config, "pretrain", first)
    whole = build_for_phase(config, phase, ["a", "b"], run_dir, CPU, False)
    empty = build_empty(config, phase, ["a", "b"])
    assert empty.training
    assert [p.requires_grad for p in empty.parameters()] == [
        p.requires_grad for p in whole.parameters()
    ]
    with start_weights(config, phase, ["a", "b"], run_dir) as stored:
        found = dict(zip(stored.catalog["model"], stored.whole(), strict=True))
        torch.testing.assert_close(found, dict(whole.state_dict()), rtol=0, atol=0)
    assert not (tmp_path / ".start").exists()


class Scaled(ResNet):
    """A network whose first weights are scaled by their own mean while it is built."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        weight = next(self.parameters())
        self.scale = float(weight.mean())


def test_a_network_that_needs_its_weights_while_it_is_built_is_built_whole(monkeypatch, caplog):
    assert all(
        p.is_meta for p in build_empty(load_config(CONFIG, SMALL), "pretrain", ["a"]).parameters()
    )
    facts = families.backbone_facts("resnet10")
    own = dataclasses.replace(facts, build=f"{__name__}:Scaled")
    monkeypatch.setitem(families.BACKBONES, "resnet10", own)
    caplog.clear()  # of what the first phase said, where an earlier test turned it on
    with caplog.at_level(logging.WARNING, "bigdet"):
        detector = build_empty(load_config(CONFIG, SMALL), "pretrain", ["a", "b"])
    assert not any(tensor.is_meta for tensor in detector.state_dict().values())
    (message,) = caplog.messages
    assert f"({__name__}.Scaled: " in message
    assert "meta tensor" in message


def test_a_resumed_phase_loads_nothing(tmp_path):
    config = load_config(CONFIG, [*SMALL, "phases.finetune.model.detector=cascade_mask_rcnn"])
    detector = build_for_phase(config, "finetune", ["a", "b"], RunDir(tmp_path), CPU, True)
    assert isinstance(detector.box_head, CascadeHead)  # its weights come from the checkpoint


@pytest.mark.parametrize("is_agnostic", ["null", "true"])
def test_the_boxes_of_all_phases_are_of_one_kind(tmp_path, is_agnostic):
    overrides = [
        *SMALL,
        "phases.finetune.model.detector=cascade_mask_rcnn",
        f"model.roi.class_agnostic={is_agnostic}",
    ]
    config, run_dir = load_config(CONFIG, overrides), RunDir(tmp_path)
    first = build_for_phase(config, "pretrain", ["a", "b"], run_dir, CPU, False)
    leave(run_dir, config, "pretrain", first)
    second = build_for_phase(config, "finetune", ["a", "b"], run_dir, CPU, False)
    num_boxes = 1 if is_agnostic == "true" else 2
    assert len(second.box_head.stages[0].regressor.weight) == 4 * num_boxes
