"""Options that nothing heeds are refused where a user wrote them, also with their default value."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bigdet.config.load import dump_config, load_config, parse_config
from bigdet.config.rules import ConfigError

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"  # Mask R-CNN, adamw
PRETRAIN = "phases.pretrain"

IGNORED = [
    ("model.retina.focal_gamma", "2.0"),
    ("model.retina.anchor_sizes", "[32, 64, 128, 256, 512]"),
    ("model.cascade.gradients", "detectron2"),
    ("model.keypoint.width", "512"),
    ("model.roi.box_beta", "1.0"),
    ("model.stride_in_1x1", "false"),
    ("data.train.window", "1024"),
    (f"{PRETRAIN}.momentum", "0.9"),
    (f"{PRETRAIN}.decay_factor", "0.1"),  # its schedule is constant
    (f"{PRETRAIN}.resize.divide_by", "2"),
    (f"{PRETRAIN}.resize.jitter_range", "[0.1, 2.0]"),
    (f"{PRETRAIN}.resize.pad_to", "batch"),
]
"""Defaults of parts that the quickstart does not choose."""


def refusal(path: Path, *overrides: str) -> str:
    """What the rules say, nothing if the config is taken."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def written(
    folder: Path,
    *,
    model: str = "detector: faster_rcnn, backbone: resnet18",
    phase: str = "norm_mode: live",
    more: str = "",
    fragment: str = "",
) -> Path:
    """A config of one phase."""
    (folder / "fragment.yaml").write_text(fragment or "seed: 0")
    path = folder / "config.yaml"
    path.write_text(f"""
include: [fragment.yaml]
output: x
data: {{train: {{shards: x}}, val: {{shards: x}}}}
model: {{{model}}}
phases:
  train: {{steps: 900, images_per_gpu: 2, lr: 0.1, resize: {{kind: direct, size: 64}}, {phase}}}
{more}""")
    return path


@pytest.mark.parametrize(("key", "value"), IGNORED)
def test_a_default_of_a_part_that_is_not_chosen_is_refused(key: str, value: str):
    assert key in refusal(QUICKSTART, f"{key}={value}")
    assert "would be ignored" in refusal(QUICKSTART, f"{key}={value}")


def test_defaults_of_parts_that_are_chosen_are_taken():
    words = [f"{PRETRAIN}.betas=[0.9, 0.999]", "model.roi.nms_iou=0.5", "model.drop_path=0"]
    assert refusal(QUICKSTART, *words, f"{PRETRAIN}.resize.scale_range=[0.8, 1.2]") == ""


def test_it_is_refused_in_a_file_too(tmp_path: Path):
    model = "detector: faster_rcnn, backbone: resnet18, retina: {focal_gamma: 2.0}"
    assert "model.retina.focal_gamma: is for retinanet" in refusal(written(tmp_path, model=model))
    model = "detector: retinanet, backbone: resnet18, roi: {nms_iou: 0.5}"
    assert "model.roi.nms_iou: retinanet has no box" in refusal(written(tmp_path, model=model))
    more = "evaluation: {resize: {kind: short_side, size: 64, pad_to: batch}}"
    assert "evaluation.resize.pad_to: is for training" in refusal(written(tmp_path, more=more))


def test_a_warm_up_can_be_turned_off_whatever_its_factor(tmp_path: Path):
    path = written(tmp_path, phase="norm_mode: live, warmup_factor: 0.1")
    assert refusal(path, "phases.train.warmup_steps=0") == ""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("phases.train.layer_decay=0.7", "layer_decay: the backbone is frozen, and all other"),
        ("phases.train.model.drop_path=0.1", "drop_path: a frozen backbone has no drop path"),
        ("model.drop_path=0.1", "model.drop_path: every phase has a frozen backbone"),
    ],
)
def test_options_of_a_backbone_that_is_not_trained_are_refused(word: str, said: str):
    frozen = QUICKSTART.with_name("dinov3_l_frozen.yaml")
    assert said in refusal(frozen, word)
    assert refusal(frozen, word, "phases.train.freeze=null") == ""


def test_norm_of_a_backbone_with_layer_norm_is_refused(tmp_path: Path):
    model = "detector: faster_rcnn, backbone: swin_t, norm: bn"
    path = written(tmp_path, model=model, phase="norm_mode: null")
    assert "model.norm: swin_t has LayerNorm" in refusal(path)
    assert refusal(path, "model.norm=gn", "model.norm_scope=all") == ""


def test_the_command_line_may_choose_another_part_than_the_file(tmp_path: Path):
    path = written(tmp_path, phase="norm_mode: live, optimizer: sgd, momentum: 0.9")
    assert refusal(path) == ""
    assert refusal(path, "phases.train.optimizer=adamw") == ""  # as a sweep does
    words = ["phases.train.optimizer=adamw", "phases.train.momentum=0.9"]
    assert "phases.train.momentum" in refusal(path, *words)
    assert "phases.train.betas" in refusal(path, "phases.train.betas=[0.9, 0.999]")


def test_the_command_line_may_set_an_option_back(tmp_path: Path):
    path = written(tmp_path, phase="norm_mode: live, optimizer: sgd, momentum: 0.8")
    words = ["phases.train.optimizer=adamw"]
    assert "phases.train.momentum" in refusal(path, *words)
    assert refusal(path, *words, "phases.train.momentum=0.9") == ""


@pytest.mark.parametrize("gamma", ["2.0", "1.5"])
def test_it_is_refused_in_a_fragment_too(tmp_path: Path, gamma: str):
    path = written(tmp_path, fragment=f"model: {{retina: {{focal_gamma: {gamma}}}}}")
    assert "model.retina.focal_gamma: is for retinanet" in refusal(path)


def test_an_experiment_may_choose_another_part_than_its_fragment(tmp_path: Path):
    fragment = "model: {detector: retinanet, retina: {focal_gamma: 2.0}}"
    model = "detector: faster_rcnn, backbone: resnet18"
    assert refusal(written(tmp_path, fragment=fragment, model=model)) == ""
    model = "backbone: resnet18"
    path = written(tmp_path, fragment=fragment, model=model)
    assert refusal(path) == ""
    assert refusal(path, "model.detector=faster_rcnn") == ""


@pytest.mark.parametrize("newer", [[], ["log", "checkpoint", "model.rpn"]])
def test_the_config_of_a_run_folder_lists_every_option(tmp_path: Path, newer: list[str]):
    values = OmegaConf.create(dump_config(load_config(QUICKSTART)))
    for key in newer:  # an older run does not know options that came later
        section, _, name = key.rpartition(".")
        (OmegaConf.select(values, section) if section else values).pop(name)
    path = tmp_path / "config.yaml"
    OmegaConf.save(values, path)
    assert refusal(path) == ""
    assert f"{PRETRAIN}.momentum" in refusal(path, f"{PRETRAIN}.momentum=0.9")


def test_an_evaluation_refuses_thresholds_of_another_detector():
    text = dump_config(load_config(QUICKSTART))
    parse_config(text, "model.safetensors", ["model.roi.score_threshold=0.05"])
    with pytest.raises(ConfigError, match=r"model\.retina\.score_threshold: is for retinanet"):
        parse_config(text, "model.safetensors", ["model.retina.score_threshold=0.05"])
