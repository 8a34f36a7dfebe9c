"""The RPN: its anchors, its losses, and the number of proposals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bigdet.config.families import detector_facts
from bigdet.config.rules import all_positive, fraction, not_negative, positive, require

NUM_LEVELS = 5


@dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposals."""

    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the square anchor of each pyramid level P2 to P6, pixels. Without an FPN (vgg16):
    sides of all anchors at a position, any number of them; Detectron has 64, 128, 256, 512."""
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height over width of the anchors, area kept."""
    num_convs: int = 1
    """3x3 convolutions before the predictions, without normalization. ViTDet and detectron2's
    newer baselines have 2."""
    anchors_per_image: int = 256
    """Anchors sampled per image for the loss, at most half of them positive."""
    train_proposals: int | None = None
    """Proposals per image after NMS in training. None: 1000, or 2000 if the detector is a cascade
    (detectron2, mmdetection; Detectron's 2000 are of a batch of two images)."""
    test_proposals: int = 1000
    """Proposals per image after NMS at test time."""
    train_candidates: int | None = None
    """Proposals per level before NMS in training. None: ``train_proposals`` if that is set, else
    2000."""
    test_candidates: int | None = None
    """Proposals per level before NMS at test time. None: ``test_proposals``."""
    low_quality_iou: float = 0.3
    """The anchor that overlaps an object more than all others do is positive too, if it overlaps
    it by at least this. 0.3: mmdetection and paper 2's code; 0: Detectron, detectron2, torchvision
    (always, however small the overlap)."""
    border: int | None = None
    """Anchors that reach more than this many pixels beyond their image are left out of the loss:
    0 in Detectron and in mmdetection's cascades. None: all anchors count (detectron2, torchvision,
    mmdetection's other detectors)."""
    box_beta: float = 0.0
    """Where the box loss changes from square to linear (smooth L1); 0 is L1. Detectron: 1/9."""
    nms_iou: float = 0.7
    """Proposals of one level that overlap a better one by more than this are dropped."""


def proposal_limits(rpn: RpnConfig, detector: str) -> RpnConfig:
    """Return the section with all numbers of proposals filled in."""
    after_nms = rpn.train_proposals
    if after_nms is None:
        after_nms = 2000 if detector_facts(detector).is_cascade else 1000
    return dataclasses.replace(
        rpn,
        train_proposals=after_nms,
        train_candidates=rpn.train_candidates or rpn.train_proposals or 2000,
        test_candidates=rpn.test_candidates or rpn.test_proposals,
    )


def check_rpn(rpn: RpnConfig, *, has_fpn: bool) -> None:
    """Check the options of the RPN; without an FPN one level has anchors of all sizes."""
    key = "model.rpn"
    check_anchors(key, rpn, "P2 to P6" if has_fpn else None)
    anchors = rpn.anchors_per_image
    require(anchors >= 2, f"{key}.anchors_per_image", anchors, "2 or more, half for objects")
    positive(key, rpn, "num_convs")
    positive(key, rpn, "train_proposals", "test_proposals", "train_candidates", "test_candidates")
    not_negative(key, rpn, "border", "box_beta")
    fraction(key, rpn, "low_quality_iou", "nms_iou")


def check_anchors(key: str, section: Any, levels: str | None) -> None:
    """Check the anchors of a head.

    ``levels`` are the five pyramid levels that have one size each. None: one level, any sizes.
    """
    all_positive(key, section, "anchor_sizes", "anchor_ratios")
    is_fine = levels is None or len(section.anchor_sizes) == NUM_LEVELS
    expected = f"five sizes, one for each of {levels}"
    require(is_fine, f"{key}.anchor_sizes", section.anchor_sizes, expected)
