"""Run folders, checkpoints and weights from before some options existed mean what they meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigdet.config.earlier import keep_former
from bigdet.config.load import dump_config, load_config, parse_config
from bigdet.config.model import SECTIONS
from bigdet.config.rpn import proposal_limits
from bigdet.config.run import check_config
from tests.shipped import CONFIGS, config_of

NEW = {
    "model.rpn": ["low_quality_iou", "border"],
    "model.roi": ["crowd_coverage", "sampling_ratio"],
    "model.keypoint": ["min_visible"],
    "data.train": ["min_keypoints"],
    "evaluation": ["precise_bn"],
    "evaluation.tta": ["pool"],
}
NEW_IN_PHASES = ["decay_norms", "decay_biases", "bias_lr_factor"]


def former_text(config_name: str, *overrides: str) -> str:
    """A resolved config as it was written before these options and sections."""
    values: dict[str, Any] = yaml.safe_load(
        dump_config(load_config(CONFIGS / f"{config_name}.yaml", overrides))
    )
    for name, options in SECTIONS.items():  # all were there, whatever the detector
        values["model"][name] = values["model"][name] or dataclasses.asdict(options())
    for section, names in NEW.items():
        place: Any = values
        for part in section.split("."):
            place = (place or {}).get(part)
        for option in names if place else []:
            del place[option]
    for phase in values["phases"].values():
        for option in NEW_IN_PHASES:
            del phase[option]
        del phase["resize"]["draw"]
    del values["device"]
    if values["model"]["rpn"]["train_proposals"] is None:
        values["model"]["rpn"]["train_proposals"] = 2000  # the default then
    return yaml.safe_dump(values, sort_keys=False)


def test_a_resolved_config_from_before_has_what_was_in_force_then(tmp_path: Path):
    text = former_text("r50_direct", "evaluation.tta={}", "evaluation.resize=null")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for config in (parse_config(text, "x"), load_config(path)):
        check_config(config)
        # Every anchor that was an object's best was positive; regions in crowds were left out; what
        # came before NMS was as many as after it; views had NMS of their own.
        rpn = proposal_limits(config.model.rpn, config.model.detector)
        assert (rpn.low_quality_iou, rpn.border) == (0.0, None)
        assert (rpn.train_candidates, rpn.train_proposals) == (2000, 2000)
        assert (config.model.roi.crowd_coverage, config.model.roi.sampling_ratio) == (0.7, 2)
        assert config.evaluation.tta is not None
        assert config.evaluation.tta.pool == "detections"
        phase = config.phases["pretrain"]
        assert (phase.decay_norms, phase.decay_biases, phase.bias_lr_factor) == (False, True, 1.0)
        assert phase.resize.draw == "step"


@pytest.mark.parametrize("name", ["quickstart", "retinanet_r50_direct", "small_direct"])
def test_other_detectors_and_numbers_of_before_load_too(name: str):
    config = parse_config(former_text(name), "x")
    check_config(config)
    now = config_of(name).model
    if name == "retinanet_r50_direct":
        assert config.model == now
        return
    assert config.model.rpn.train_proposals == now.rpn.train_proposals == 300
    limits = proposal_limits(config.model.rpn, config.model.detector)
    assert limits.train_candidates == 300
    assert config.model.rpn.low_quality_iou == 0.0


def test_a_config_written_by_hand_has_the_defaults_of_today():
    config = parse_config(
        "output: x\nmodel: {detector: faster_rcnn, backbone: resnet18}\n"
        "data: {train: {shards: a}, val: {shards: b}}\n"
        "phases: {train: {steps: 1, images_per_gpu: 1, lr: 1, resize: {kind: direct, size: 64}}}",
        "x",
    )
    assert (config.model.rpn.low_quality_iou, config.model.rpn.train_proposals) == (0.3, None)
    assert config.model.roi.crowd_coverage is None


def test_what_is_written_today_is_read_as_it_is():
    for name in ("r50_gn_scratch", "quickstart", "keypoint_r50_gn"):
        config = config_of(name)
        assert parse_config(dump_config(config), "x") == config


def test_a_resumed_run_keeps_the_defaults_that_it_began_with(caplog: pytest.LogCaptureFixture):
    before = parse_config(former_text("r50_direct"), "x")
    with caplog.at_level("INFO"):
        kept = keep_former(config_of("r50_direct"), before)
    assert kept.model == before.model
    (message,) = caplog.messages
    for word in ("train_proposals=2000", "low_quality_iou=0.0", "crowd_coverage=0.7"):
        assert word in message
    # Now the checkpoint has all options: the same command continues again.
    again = parse_config(dump_config(kept), "x")
    assert keep_former(config_of("r50_direct"), again).model == before.model


def test_a_resumed_run_goes_on_to_gather_what_it_gathered() -> None:
    own = config_of("r50_direct")
    assert own.engine.gather_precision is None
    text = dump_config(own).replace("gather_precision: null", "gather_precision: fp32")
    before = parse_config(text, "x")
    assert keep_former(own, before).engine.gather_precision == "fp32"
    assert keep_former(own, own).engine.gather_precision is None


def test_an_option_that_was_set_is_not_replaced():
    before = parse_config(former_text("r50_direct"), "x")
    own = config_of("r50_direct")
    rpn = dataclasses.replace(own.model.rpn, low_quality_iou=0.2, train_proposals=500)
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, rpn=rpn))
    kept = keep_former(own, before)
    assert (kept.model.rpn.low_quality_iou, kept.model.rpn.train_proposals) == (0.2, 500)
    new = config_of("r50_direct")
    assert keep_former(new, new) is new
