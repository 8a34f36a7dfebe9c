"""The model: detector, backbone, normalization and widths; RPN and heads have their own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from omegaconf import MISSING

from bigdet.config.families import (
    BACKBONES,
    DETECTOR_OPTIONS,
    DETECTORS,
    LACKS,
    backbone_facts,
    detector_facts,
)
from bigdet.config.heads import (
    CascadeConfig,
    KeypointConfig,
    RetinaConfig,
    RoiConfig,
    check_keypoint,
    check_retina,
    check_roi,
)
from bigdet.config.own import FORM
from bigdet.config.rpn import RpnConfig, check_rpn
from bigdet.config.rules import CHOICES, ConfigError, Ignored, below_one, positive, require
from bigdet.config.timm_names import PREFIX as TIMM

BoxHead = Literal["2fc", "4conv1fc"]
Neck = Literal["fpn", "simple"]
Norm = Literal["bn", "gn", "ln", "none"]
NormScope = Literal["backbone", "all"]
Section = TypeVar("Section")
SECTIONS: dict[str, type] = {
    "rpn": RpnConfig,
    "roi": RoiConfig,
    "cascade": CascadeConfig,
    "keypoint": KeypointConfig,
    "retina": RetinaConfig,
}
"""Sections of parts that some detectors have; they are None in the models of others."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector."""

    detector: str = field(default=MISSING, metadata={CHOICES: (*DETECTORS, FORM)})
    """Which detector: one of these, or a function of your own."""
    backbone: str = field(default=MISSING, metadata={CHOICES: (*BACKBONES, f"{TIMM}NAME", FORM)})
    """Which backbone: one of these, a network of timm, or a function of your own. ``bigdet train
    --options model.backbone`` lists timm's names. Networks whose patches have another size get
    patches of 16 pixels here, and their weights are resampled."""
    taps: list[int] = field(default_factory=list)
    """For a plain ``timm:NAME`` (its features have one stride): numbers of the blocks whose outputs
    are concatenated for the pyramid. Empty: the last block."""
    token_window: int | None = 14
    """For a plain ``timm:NAME`` with absolute positions: all blocks but ``global_blocks`` attend
    within windows of this many patches per side (ViTDet). None: all blocks attend over the whole
    image."""
    rope_window: int | None = None
    """The same for a plain ``timm:NAME`` with rotary positions that are scaled to the grid of its
    training (EVA-02): within a window they count from its corner, scaled so that it spans that
    grid, as in EVA-02's detectors (16 or 32 patches). None: all blocks attend over the whole
    image."""
    global_blocks: int = 4
    """With windows of patches: how many blocks attend over the whole image. The blocks are cut into
    so many runs, as equally long as can be, and the last of each is one of them."""
    image_windows: int = 1
    """For a plain ``timm:NAME``: images are cut into this many windows per side. Each goes through
    the network by itself, and so does the whole image at the size of a window; the features of both
    are concatenated (DINOv3: 3). 1: images are not cut."""
    box_head: BoxHead = "2fc"
    """Two fully connected layers, or four 3x3 convolutions and one."""
    neck: Neck = "fpn"
    """``fpn``: a feature pyramid network, whose coarse levels are added to the finer ones.
    ``simple``: ViTDet's pyramid for plain ViTs: the same convolutions, but levels are not added;
    the fine levels of other backbones then see no coarse ones."""
    norm: Norm = "bn"
    """Normalization of convolutional backbones and, by scope, of neck and heads: batch, group or
    layer normalization (``ln``: over the channels of each position, as in ViTDet)."""
    norm_scope: NormScope | None = None
    """Where ``norm`` goes: ``backbone`` or ``all`` (never the RPN head). None: ``backbone`` with
    bn, ``all`` with gn and ln."""
    relative_positions: bool = False
    """The attention of vit_* backbones has relative positions too, which start at 0, as in
    detectron2's ViTDet (about 1 AP more). They are made for windows of 14 and images of 1024
    pixels, and interpolated for others."""
    pad_to_square: bool = False
    """Canvases are padded to squares before the backbone, as detectron2 does for ViTDet. Training
    with ``resize.kind`` jitter or direct has squares anyway; at test time the positions of a ViT
    then have the scale that they were trained at, and a step takes up to twice as long."""
    stride_in_1x1: bool = False
    """Bottlenecks of a ResNet have their stride in the first 1x1 convolution, as in MSRA's
    (Caffe's) R-50 and R-101 and detectors on them: ``STRIDE_IN_1X1`` in detectron2,
    ``style='caffe'`` in mmdetection. Weights fit either way, but are right for one only."""
    width: int = 256
    """Channels of the FPN and of the convolutions in the heads. Without an FPN (vgg16) they are
    the backbone's."""
    fc_width: int = 1024
    """Channels of the fully connected layers of the box head."""
    compile: bool = False
    """Compile backbone, FPN and RPN (or RetinaNet's) head with torch.compile in training. Worth it
    if the canvas has few sizes: resizes ``direct`` and ``jitter``, and ``pad_to: two_shapes``. The
    first steps take minutes."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth in a Swin, ConvNeXt or ViT backbone, in [0, 1)."""
    rpn: RpnConfig | None = None
    """Region proposals. None: the detector has none."""
    roi: RoiConfig | None = None
    """Regions of interest. None: the detector has none."""
    cascade: CascadeConfig | None = None
    """Stages of a cascade. None: the detector is not a cascade."""
    keypoint: KeypointConfig | None = None
    """The head of ``keypoint_rcnn``. None: the detector has none."""
    retina: RetinaConfig | None = None
    """RetinaNet. None: the detector is another one."""

    def __post_init__(self) -> None:
        """Fill in the sections of bigdet's detectors; those of a user's own when it is loaded."""
        if self.detector in DETECTORS:
            for name in SECTIONS.keys() & DETECTORS[self.detector].options:
                if getattr(self, name) is None:
                    object.__setattr__(self, name, SECTIONS[name]())


def used(section: Section | None) -> Section:
    """Return a section that the detector of a model uses, so that it is not None.

    Raises:
        ConfigError: it is None: a detector of a user's own does not name it among its options.
    """
    if section is None:
        raise ConfigError(
            "model.detector: it uses a section of model (rpn, roi, cascade, keypoint or retina) "
            "that is null. Name that section in the options of its describe_detector."
        )
    return section


def settle_sections(
    model: ModelConfig, detectors: Collection[str], written: Collection[str]
) -> ModelConfig:
    """Return a model with the sections of ``detectors``, and no others but what a user set in them.

    ``written`` has the full keys that a user set to their defaults: they stay, to be refused.
    """
    options = [option for name in detectors for option in detector_facts(name).options]
    changes: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        found = getattr(model, name)
        if name in options and found is None:
            changes[name] = section()
        is_written = any(key.startswith(f"model.{name}.") for key in written)
        if name not in options and found == section() and not is_written:
            changes[name] = None
    return dataclasses.replace(model, **changes)


def model_parts(model: ModelConfig) -> list[str]:
    """Return the parts of a detector, in the order in which data flows through them."""
    parts = detector_facts(model.detector).parts
    return [part for part in parts if part != "fpn" or has_fpn(model)]


def has_fpn(model: ModelConfig) -> bool:
    """Tell whether a feature pyramid is between the backbone and the heads."""
    return backbone_facts(model.backbone).has_levels


def has_masks(model: ModelConfig) -> bool:
    """Tell whether a detector learns and predicts masks."""
    return "masks" in detector_facts(model.detector).learns


def has_keypoints(model: ModelConfig) -> bool:
    """Tell whether a detector learns and predicts keypoints."""
    return "keypoints" in detector_facts(model.detector).learns


def has_cascade(model: ModelConfig) -> bool:
    """Tell whether the detector has a cascade of three box heads."""
    return detector_facts(model.detector).is_cascade


def is_class_agnostic(model: ModelConfig) -> bool:
    """Tell whether a region has one box for all classes, with the default filled in."""
    chosen = used(model.roi).class_agnostic
    return has_cascade(model) if chosen is None else chosen


def reported(model: ModelConfig) -> tuple[str, int] | None:
    """Return the option that limits the detections of an image and its value, if there is one."""
    section = detector_facts(model.detector).limits
    if section is None:
        return None
    return f"model.{section}.detections_per_image", getattr(model, section).detections_per_image


def parts_with_batch_norm(model: ModelConfig) -> list[str]:
    """Return the parts of a detector that have BN layers (the RPN head never has)."""
    if model.norm != "bn":
        return []
    parts = ["backbone"] if "norm" in backbone_facts(model.backbone).heeds else []
    if model.norm_scope != "all":
        return parts
    own = detector_facts(model.detector).normalized
    if model.box_head != "4conv1fc":  # only that one has convolutions
        own = tuple(part for part in own if part != "box_head")
    return [*parts, *(part for part in own if part in model_parts(model))]


def has_batch_norm(model: ModelConfig) -> bool:
    """Tell whether the model has BN layers, so that a phase must set ``norm_mode``."""
    return bool(parts_with_batch_norm(model))


def lacking(model: ModelConfig, option: str) -> str:
    """Return why an option of `LACKS` has no effect on the backbone; empty if it has one."""
    facts = backbone_facts(model.backbone)
    if option in facts.heeds:
        return ""
    return f"{model.backbone} {f'takes no {option}' if facts.is_own else LACKS[option]}"


def check_model(model: ModelConfig) -> None:
    """Check the detector, and that backbone, norms and widths fit it."""
    _check_backbone(model)
    _check_norm(model)
    positive("model", model, "width", "fc_width")
    if model.rpn is not None:
        check_rpn(model.rpn, has_fpn=has_fpn(model))
    if model.roi is not None:
        check_roi(model.roi)
    if model.keypoint is not None:
        check_keypoint(model.keypoint)
    if model.retina is not None:
        check_retina(model.retina)


def check_drop_path(key: str, model: ModelConfig) -> None:
    """Check that the backbone has stochastic depth if a section, ``key``, asks for it."""
    if model.drop_path and (lacks := lacking(model, "drop_path")):
        with_it = ", ".join(name for name, row in BACKBONES.items() if "drop_path" in row.heeds)
        raise ConfigError(
            f"{key}.drop_path: found {model.drop_path}, but {lacks}. Remove it, or choose one of "
            f"{with_it}."
        )
    below_one(key, model, "drop_path")


def _check_backbone(model: ModelConfig) -> None:
    check_drop_path("model", model)
    positive("model", model, "token_window", "rope_window", "image_windows")
    if depth := backbone_facts(model.backbone).depth:
        expected = f"1 to {depth}, the number of its blocks"
        is_fine = 1 <= model.global_blocks <= depth
        require(is_fine, "model.global_blocks", model.global_blocks, expected)
    if (depth := backbone_facts(model.backbone).depth) and model.taps:
        is_rising = model.taps == sorted({tap for tap in model.taps if 1 <= tap <= depth})
        expected = f"rising numbers from 1 to {depth}, its blocks"
        require(is_rising, "model.taps", model.taps, expected)
    if not has_fpn(model) and "rpn" not in model_parts(model):
        raise ConfigError(
            f"model.backbone: {model.backbone} has one level of features, but {model.detector} "
            f"needs a pyramid. Choose another backbone, or faster_rcnn."
        )


def _check_norm(model: ModelConfig) -> None:
    if model.norm == "none" and model.norm_scope is not None:
        raise ConfigError("model.norm_scope: set, but model.norm is none. Remove norm_scope.")
    if not has_fpn(model) and model.norm != "none":
        raise ConfigError(
            f"model.norm: found {model.norm}, but {model.backbone} has no normalization. Write "
            f"none."
        )
    lacks = lacking(model, "norm")
    if has_fpn(model) and lacks and model.norm != "bn" and model.norm_scope == "backbone":
        raise ConfigError(
            f"model.norm: found {model.norm} for the backbone only, but {lacks}. Remove "
            f"model.norm, or set model.norm_scope: all."
        )
    facts = detector_facts(model.detector)
    if model.norm_scope == "all" and not facts.normalized:
        raise ConfigError(
            f"model.norm_scope: found all, but {model.detector} has no part besides the "
            f"backbone that is normalized. Write backbone, or leave it out."
        )
    if model.norm_scope == "all" and model.norm == "bn" and "retina" in facts.options:
        raise ConfigError(
            "model.norm_scope: found all, but the levels of the pyramid share retinanet's head, "
            "whose statistics differ, so one BN cannot fit them. Write backbone, or norm: gn."
        )


def ignored_in_model(model: ModelConfig, detectors: Collection[str]) -> Ignored:
    """Yield the options without effect; ``detectors`` are those of all phases."""
    for option in LACKS:
        if option not in ("norm", "drop_path") and (lacks := lacking(model, option)):
            yield f"model.{option}", lacks
    if "global_blocks" in backbone_facts(model.backbone).heeds:
        windows = model.rope_window if lacking(model, "token_window") else model.token_window
        if windows is None:
            yield "model.global_blocks", "all blocks attend over the whole image"
    if not has_fpn(model):
        yield "model.width", f"the heads are as wide as {model.backbone}'s features"
        yield "model.neck", f"{model.backbone} has one level of features"
    elif (lacks := lacking(model, "norm")) and model.norm == "bn" and model.norm_scope != "all":
        yield "model.norm", f"{lacks}, and norm_scope excludes all other parts"
    facts = detector_facts(model.detector)
    heeded = [option for each in detectors for option in detector_facts(each).options]
    for name, lacks in DETECTOR_OPTIONS.items():
        if name in ("cascade", "keypoint"):  # a phase may have them
            known = [each for each, row in DETECTORS.items() if name in row.options]
            if name not in heeded:
                yield f"model.{name}", f"is for {' and '.join(known)}"
        elif name not in facts.options:
            yield f"model.{name}", lacks.format(model.detector)
    are_cascades = [detector_facts(each).is_cascade for each in detectors]
    if model.roi is not None and are_cascades and all(are_cascades):
        yield "model.roi.positive_iou", "the stages of a cascade have 0.5, 0.6 and 0.7"
