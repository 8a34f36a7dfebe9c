"""From the config to a detector."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bigdet.config.families import DETECTORS, LACKS, detector_facts
from bigdet.config.model import (
    ModelConfig,
    has_cascade,
    has_fpn,
    has_keypoints,
    has_masks,
    model_parts,
    parts_with_batch_norm,
    used,
)
from bigdet.config.own import import_callable, type_name
from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.build import build_backbone, refuse_torch_norms
from bigdet.models.conventions import OWN, Conventions
from bigdet.models.detector import Detector
from bigdet.models.heads.box import BoxHead
from bigdet.models.heads.cascade import CascadeHead
from bigdet.models.heads.keypoint import KeypointHead
from bigdet.models.heads.mask import MaskHead
from bigdet.models.heads.retina import RetinaHead
from bigdet.models.heads.rpn import RegionProposals
from bigdet.models.necks.fpn import FPN, RetinaFPN, SimplePyramid
from bigdet.models.norms import Kind, batch_norms
from bigdet.models.rcnn import RCNN
from bigdet.models.retinanet import RetinaNet

NECKS = {"fpn": FPN, "simple": SimplePyramid}
TO_WRITE = (
    "losses", "features", "find", "maps", "has_maps", "eval_settings", "use_eval_settings",
)  # fmt: skip
"""What each detector defines itself."""


def head_norm(config: ModelConfig) -> Kind:
    """Give the normalization of FPN and heads: the model's, where its scope is ``all``."""
    scope = config.norm_scope or ("all" if config.norm in ("gn", "ln") else "backbone")
    return config.norm if scope == "all" else "none"


def build_detector(
    config: ModelConfig, num_classes: int, conventions: Conventions | None = None
) -> Detector:
    """Build a detector with random weights, from torch's generator, in training mode.

    Args:
        config: the model section.
        num_classes: K, without background.
        conventions: None for bigdet's own.

    Raises:
        ValueError: a user's own backbone or detector is not what is asked for.
    """
    facts = detector_facts(config.detector)
    options = {option: getattr(config, option) for option in LACKS}
    backbone = build_backbone(config.backbone, **options)
    build = import_callable("model.detector", facts.build)
    chosen = () if conventions is None else (conventions,)
    detector = build(config, num_classes, backbone, *chosen)
    if config.detector not in DETECTORS:
        _check_own(config, detector)
    assert isinstance(detector, Detector)
    detector.config = config
    detector.num_classes = num_classes
    return detector.to(memory_format=torch.channels_last)


def _check_own(config: ModelConfig, detector: Any) -> None:
    """Raise ``ValueError`` where a user's detector breaks the contract of ``Detector``."""
    where = f"model.detector: {config.detector}"
    if not isinstance(detector, Detector):
        raise ValueError(
            f"{where} returned {type_name(detector)}, expected a Detector, a subclass of that of "
            f"bigdet.models.detector."
        )
    if lacking := [n for n in TO_WRITE if getattr(type(detector), n) is getattr(Detector, n)]:
        raise ValueError(
            f"{where}: {type(detector).__name__} does not define {', '.join(lacking)}, expected "
            f"all of {', '.join(TO_WRITE)}."
        )
    parts = [name for name, _ in detector.named_children()]
    if sorted(parts) != sorted(model_parts(config)):
        raise ValueError(
            f"{where} has the parts {', '.join(parts)}, but its describe_detector says "
            f"{', '.join(model_parts(config))}."
        )
    refuse_torch_norms(where, detector)
    normalized = [name for name, part in detector.named_children() if batch_norms(part)]
    if sorted(normalized) != sorted(parts_with_batch_norm(config)):
        raise ValueError(
            f"{where} has batch normalization in {', '.join(normalized) or 'no part'}, but by the "
            f"config and its describe_detector it is in "
            f"{', '.join(parts_with_batch_norm(config)) or 'no part'}. List parts that follow "
            f"head_norm(config) as normalized, and give others none."
        )


def build_rcnn(
    config: ModelConfig,
    num_classes: int,
    backbone: Backbone,
    conventions: Conventions = OWN,
) -> Detector:
    """Build a detector that looks twice; see `build_detector`."""
    norm = head_norm(config)
    mask_head = keypoint_head = None
    fpn, width = None, backbone.channels[-1]
    if has_fpn(config):
        fpn, width = NECKS[config.neck](backbone.channels, config.width, norm), config.width
    rpn = RegionProposals(used(config.rpn), width, conventions, has_fpn(config), config.detector)
    box_head: BoxHead | CascadeHead
    make_head = partial(BoxHead, config, norm, width, num_classes, conventions)
    box_head = CascadeHead(make_head, used(config.cascade)) if has_cascade(config) else make_head()
    if has_masks(config):
        mask_head = MaskHead(norm, width, num_classes)
    if has_keypoints(config):
        keypoint_head = KeypointHead(norm, width, used(config.keypoint), num_classes)
    return RCNN(backbone, fpn, rpn, box_head, mask_head, keypoint_head)


def build_retinanet(
    config: ModelConfig,
    num_classes: int,
    backbone: Backbone,
    conventions: Conventions = OWN,
) -> Detector:
    """Build a RetinaNet; see `build_detector`."""
    norm = head_norm(config)
    fpn = RetinaFPN(backbone.channels[1:], config.width, norm, conventions.p6_source)
    head = RetinaHead(used(config.retina), norm, config.width, num_classes, conventions)
    return RetinaNet(backbone, fpn, head)
