"""Rules on options that some detectors heed and others do not, and on test-time augmentation."""

from __future__ import annotations

from bigdet.config.derived import BOTTLENECKS, has_fpn, model_parts
from bigdet.config.load import ConfigError
from bigdet.config.model_schema import ModelConfig
from bigdet.config.rules import not_negative, positive, require, unused, unused_section
from bigdet.config.schema import TtaConfig

_LEVELS = 5


def check_family(model: ModelConfig) -> None:
    """Check that the detector's options fit it, and that there are no others."""
    if model.backbone not in BOTTLENECKS:
        reason = f"{model.backbone} has no blocks with 1x1 convolutions"
        unused("model", model, "stride_in_1x1", reason)
    if not has_fpn(model):
        _check_single_level(model)
    if model.detector == "retinanet":
        _check_retinanet(model)
        return
    reason = f"is for retinanet, but model.detector is {model.detector}"
    unused_section("model.retina", model.retina, reason)
    sizes = model.rpn.anchor_sizes
    if has_fpn(model):
        _check_sizes("model.rpn.anchor_sizes", sizes, "P2 to P6")
    else:
        require(bool(sizes) and min(sizes) > 0, "model.rpn.anchor_sizes", sizes, "sizes above 0")


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


def _check_retinanet(model: ModelConfig) -> None:
    key, retina = "model.retina", model.retina
    for name in ("box_head", "fc_width"):
        unused("model", model, name, "retinanet has no box head")
    reason = "retinanet has no proposals, and model.retina says what is reported"
    for name in ("rpn", "roi"):
        unused_section(f"model.{name}", getattr(model, name), reason)
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
