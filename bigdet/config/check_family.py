"""Rules of the model: options that some backbones and detectors heed and others do not; and TTA."""

from __future__ import annotations

import dataclasses

from bigdet.config.derived import has_fpn, model_parts
from bigdet.config.families import (
    BACKBONES,
    DETECTOR_OPTIONS,
    LACKS,
    backbone_facts,
    detector_facts,
)
from bigdet.config.load import ConfigError
from bigdet.config.model_schema import ModelConfig
from bigdet.config.rules import not_negative, positive, require, unused, unused_section
from bigdet.config.schema import TtaConfig

_LEVELS = 5


def check_model(model: ModelConfig) -> None:
    """Check backbone, norms and sizes, and what the detector heeds of the rest."""
    if model.drop_path and (lacks := lacking(model, "drop_path")):
        with_it = [name for name, facts in BACKBONES.items() if "drop_path" in facts.heeds]
        raise ConfigError(
            f"model.drop_path: found {model.drop_path}, but {lacks}. "
            f"Remove it, or choose one of {', '.join(with_it)}."
        )
    require(0 <= model.drop_path < 1, "model.drop_path", model.drop_path, "in [0, 1)")
    if model.norm == "none" and model.norm_scope is not None:
        raise ConfigError("model.norm_scope: set, but model.norm is none. Remove norm_scope.")
    if has_fpn(model) and (lacks := lacking(model, "norm")):
        if model.norm != "bn" and model.norm_scope == "backbone":
            raise ConfigError(
                f"model.norm: found {model.norm} for the backbone only, but {lacks}. Remove "
                f"model.norm, or set model.norm_scope: all."
            )
        if model.norm == "bn" and model.norm_scope != "all":
            unused("model", model, "norm", f"{lacks}, and norm_scope leaves out all else")
    for key, value in (("model.width", model.width), ("model.fc_width", model.fc_width)):
        positive(key, value)
    rpn, roi = model.rpn, model.roi
    _check_family(model)
    require(
        bool(rpn.anchor_ratios) and all(ratio > 0 for ratio in rpn.anchor_ratios),
        "model.rpn.anchor_ratios", rpn.anchor_ratios, "a list of numbers above 0",
    )  # fmt: skip
    require(
        rpn.anchors_per_image >= 2, "model.rpn.anchors_per_image", rpn.anchors_per_image,
        "2 or more, half of them for objects",
    )  # fmt: skip
    for name in ("train_proposals", "test_proposals", "train_candidates", "test_candidates"):
        positive(f"model.rpn.{name}", getattr(rpn, name))
    for name in ("rois_per_image", "detections_per_image"):
        positive(f"model.roi.{name}", getattr(roi, name))
    for key, fraction in (
        ("model.rpn.nms_iou", rpn.nms_iou),
        ("model.roi.positive_fraction", roi.positive_fraction),
        ("model.roi.positive_iou", roi.positive_iou),
        ("model.roi.score_threshold", roi.score_threshold),
        ("model.roi.nms_iou", roi.nms_iou),
    ):
        require(0 <= fraction <= 1, key, fraction, "in [0, 1]")


def _check_family(model: ModelConfig) -> None:
    """Check that the detector's options fit it, and that there are no others."""
    if lacks := lacking(model, "stride_in_1x1"):
        unused("model", model, "stride_in_1x1", lacks)
    if not has_fpn(model):
        _check_single_level(model)
    _check_options(model)
    options = detector_facts(model.detector).options
    if "retina" in options:
        _check_retina(model)
    if "rpn" not in options:
        return
    sizes = model.rpn.anchor_sizes
    if has_fpn(model):
        _check_sizes("model.rpn.anchor_sizes", sizes, "P2 to P6")
    else:
        require(bool(sizes) and min(sizes) > 0, "model.rpn.anchor_sizes", sizes, "sizes above 0")


def lacking(model: ModelConfig, option: str) -> str:
    """Say why the backbone does not heed an option of ``families.LACKS``; nothing if it does."""
    facts = backbone_facts(model.backbone)
    if option in facts.heeds:
        return ""
    return f"{model.backbone} {f'takes no {option}' if facts.is_own else LACKS[option]}"


def _check_options(model: ModelConfig) -> None:
    """Refuse options that are for other detectors (those of heads may be of another phase's)."""
    facts = detector_facts(model.detector)
    for name, lacks in DETECTOR_OPTIONS.items():
        if name in facts.options or name in ("cascade", "keypoint"):
            continue
        reason = lacks.format(model.detector)
        if name == "roi" and facts.limits is not None:
            reason += f", and model.{facts.limits} says what is reported"
        if dataclasses.is_dataclass(section := getattr(model, name)):
            unused_section(f"model.{name}", section, reason)
        else:
            unused("model", model, name, reason)
    if model.norm_scope == "all" and not facts.normalized:
        raise ConfigError(
            f"model.norm_scope: found all, but {model.detector} says of no part that it is "
            f"normalized. Write backbone, or leave it out."
        )


def _check_single_level(model: ModelConfig) -> None:
    name = model.backbone
    if "rpn" not in model_parts(model):
        raise ConfigError(
            f"model.backbone: {name} has one level of features, but {model.detector} needs a "
            f"pyramid. Choose another backbone, or faster_rcnn."
        )
    if model.norm != "none":
        raise ConfigError(
            f"model.norm: found {model.norm}, but {name} has no normalization. Write none."
        )
    unused("model", model, "width", f"the heads are as wide as {name}'s features")


def _check_retina(model: ModelConfig) -> None:
    key, retina = "model.retina", model.retina
    if model.norm == "bn" and model.norm_scope == "all":
        raise ConfigError(
            "model.norm_scope: found all, but the levels of the pyramid share retinanet's head, "
            "and one BN has no statistics that fit them all. Write backbone, or norm: gn."
        )
    _check_sizes(f"{key}.anchor_sizes", retina.anchor_sizes, "P3 to P7")
    require(
        bool(retina.anchor_ratios) and min(retina.anchor_ratios) > 0,
        f"{key}.anchor_ratios", retina.anchor_ratios, "a list of numbers above 0",
    )  # fmt: skip
    for name in ("scales_per_octave", "candidates_per_level", "detections_per_image"):
        positive(f"{key}.{name}", getattr(retina, name))
    for name in ("focal_gamma", "box_beta"):
        not_negative(f"{key}.{name}", getattr(retina, name))
    for name in ("positive_iou", "negative_iou", "focal_alpha", "score_threshold", "nms_iou"):
        value = getattr(retina, name)
        require(0 <= value <= 1, f"{key}.{name}", value, "in [0, 1]")
    require(
        retina.negative_iou <= retina.positive_iou,
        f"{key}.negative_iou", retina.negative_iou,
        f"at most positive_iou, {retina.positive_iou}",
    )  # fmt: skip


def _check_sizes(key: str, sizes: list[int], levels: str) -> None:
    require(
        len(sizes) == _LEVELS and min(sizes) > 0,
        key, sizes, f"five sizes above 0, one for each of {levels}",
    )  # fmt: skip


def check_tta(tta: TtaConfig | None) -> None:
    """Check the views of test-time augmentation."""
    if tta is None:
        return
    key, scales = "evaluation.tta", tta.scales
    require(bool(scales) and min(scales) > 0, f"{key}.scales", scales, "sizes above 0")
    require(tta.cap >= max(scales), f"{key}.cap", tta.cap, f"at least {max(scales)}")
    vote_iou = tta.vote_iou
    require(
        vote_iou is None or 0 < vote_iou <= 1,
        f"{key}.vote_iou", vote_iou, "above 0, at most 1, or null",
    )  # fmt: skip
