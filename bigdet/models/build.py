"""From the config to a detector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bigdet.config.derived import (
    has_cascade,
    has_fpn,
    has_keypoints,
    has_masks,
)
from bigdet.config.model_schema import ModelConfig
from bigdet.models.backbones import Backbone, build_backbone
from bigdet.models.conventions import Conventions
from bigdet.models.detector import Detector
from bigdet.models.heads.box import BoxHead
from bigdet.models.heads.cascade import CascadeHead
from bigdet.models.heads.keypoint import KeypointHead
from bigdet.models.heads.mask import MaskHead
from bigdet.models.heads.retina import RetinaHead
from bigdet.models.heads.rpn import RegionProposals
from bigdet.models.necks.fpn import FPN, RetinaFPN
from bigdet.models.norms import Kind
from bigdet.models.rcnn import RCNN
from bigdet.models.resnet import ResNet
from bigdet.models.retinanet import RetinaNet


def head_norm(config: ModelConfig) -> Kind:
    """Give the normalization of FPN and heads: the model's, where its scope is ``all``."""
    scope = config.norm_scope or ("all" if config.norm == "gn" else "backbone")
    return config.norm if scope == "all" else "none"


def build_detector(
    config: ModelConfig, num_classes: int, conventions: Conventions | None = None
) -> Detector:
    """Build a detector with random weights, from torch's generator, in training mode.

    Args:
        config: the model section.
        num_classes: K, without background.
        conventions: None for bigdet's own.
    """
    build = DETECTORS[config.detector]
    detector = build(config, num_classes, conventions or Conventions())
    detector.config = config
    detector.num_classes = num_classes
    return detector.to(memory_format=torch.channels_last)


def _backbone(config: ModelConfig) -> Backbone:
    backbone = build_backbone(config.backbone, config.norm, config.drop_path)
    if config.stride_in_1x1:
        assert isinstance(backbone, ResNet), "check_config refuses others"
        backbone.put_stride_in_1x1()
    return backbone


def _rcnn(config: ModelConfig, num_classes: int, conventions: Conventions) -> Detector:
    norm = head_norm(config)
    backbone = _backbone(config)
    mask_head = keypoint_head = None
    fpn, width = None, backbone.channels[-1]
    if has_fpn(config):
        fpn, width = FPN(backbone.channels, config.width, norm), config.width
    rpn = RegionProposals(config.rpn, width, conventions, has_fpn(config), config.detector)
    box_head: BoxHead | CascadeHead
    make_head = partial(BoxHead, config, norm, width, num_classes, conventions)
    box_head = CascadeHead(make_head, config.cascade) if has_cascade(config) else make_head()
    if has_masks(config):
        mask_head = MaskHead(norm, width, num_classes)
    if has_keypoints(config):
        keypoint_head = KeypointHead(norm, width, config.keypoint, num_classes)
    return RCNN(backbone, fpn, rpn, box_head, mask_head, keypoint_head)


def _retinanet(config: ModelConfig, num_classes: int, conventions: Conventions) -> Detector:
    norm = head_norm(config)
    backbone = _backbone(config)
    fpn = RetinaFPN(backbone.channels[1:], config.width, norm, conventions.p6_source)
    head = RetinaHead(config.retina, norm, config.width, num_classes, conventions)
    return RetinaNet(backbone, fpn, head)


DETECTORS: dict[str, Callable[[ModelConfig, int, Conventions], Detector]] = {
    "faster_rcnn": _rcnn,
    "mask_rcnn": _rcnn,
    "cascade_rcnn": _rcnn,
    "cascade_mask_rcnn": _rcnn,
    "keypoint_rcnn": _rcnn,
    "retinanet": _retinanet,
}
"""How each detector is built: config, classes and conventions to the detector."""
