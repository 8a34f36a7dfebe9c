"""The heads: box head, cascade, keypoint head and RetinaNet's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigdet.config.rpn import check_anchors
from bigdet.config.rules import fraction, not_negative, only_for, positive, require

BoxLoss = Literal["l1", "smooth_l1", "giou"]
Nms = Literal["hard", "linear", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class RoiConfig:
    """Regions of interest: which of them train the box head, and which are reported."""

    rois_per_image: int = 512
    """Regions sampled per image for the box loss."""
    positive_fraction: float = 0.25
    """At most this fraction of them is positive."""
    positive_iou: float = 0.5
    """A region is positive if its IoU with an object is at least this. A cascade has three of its
    own."""
    crowd_coverage: float | None = None
    """Regions with more than this fraction of their area in a crowd are not used as background
    (Detectron has the option, 0.7, and trains without it). None: crowds have no effect."""
    sampling_ratio: int = 2
    """Points per side at which RoIAlign samples each cell of a region (Detectron, torchvision). 0:
    as many as the cell has pixels of the features, rounded up, as in detectron2 and mmdetection,
    whose weights were trained that way; slower."""
    class_agnostic: bool | None = None
    """One box per region for all classes, instead of one per class. None: true if
    ``model.detector`` is a cascade, else false, for all phases."""
    box_loss: BoxLoss = "l1"
    """``l1`` and ``smooth_l1`` of the deltas, or ``giou`` of the boxes."""
    box_beta: float = field(default=1.0, metadata=only_for("box_loss", "smooth_l1"))
    """For ``smooth_l1``: where it changes from square to linear. Detectron: 1, torchvision: 1/9."""
    box_loss_weight: float = 1.0
    """Factor of the box loss; with ``giou`` 10 is usual."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    nms: Nms = "hard"
    """What happens to detections of one class that overlap a better one. ``hard``: dropped.
    Soft-NMS (Bodla et al. 2017) lowers their scores: ``linear`` times 1 - overlap, ``gaussian``
    times exp(-overlap^2 / ``nms_sigma``), and drops those that fall to ``score_threshold``, which
    should be low, 0.001 for example."""
    nms_iou: float = field(default=0.5, metadata=only_for("nms", "hard", "linear"))
    """Detections of one class that overlap a better one by more than this are dropped; with
    ``linear`` their scores are lowered from this on."""
    nms_sigma: float = field(default=0.5, metadata=only_for("nms", "gaussian"))
    """How slowly scores fall with the overlap."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


def check_roi(roi: RoiConfig) -> None:
    """Check the options of the box head."""
    key = "model.roi"
    positive(key, roi, "rois_per_image", "detections_per_image", "box_beta", "box_loss_weight")
    positive(key, roi, "nms_sigma")
    not_negative(key, roi, "sampling_ratio")
    fraction(key, roi, "positive_fraction", "positive_iou", "crowd_coverage")
    fraction(key, roi, "score_threshold", "nms_iou")


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """How the stages of a cascade are trained."""

    gradients: Literal["detectron2", "mmdet"] = "detectron2"
    """``detectron2``: all stages count the same, a third of their gradients goes into the pooled
    features, and a stage trains on all regions of the one before. ``mmdet``: the losses of the
    stages count 1, 0.5 and 0.25, and every stage samples anew among them and the objects."""


@dataclass(frozen=True, kw_only=True)
class KeypointConfig:
    """The keypoint head."""

    num_keypoints: int = 17
    """Keypoints of an object, as many as the categories of the data have (COCO's persons: 17)."""
    width: int = 512
    """Channels of its eight convolutions."""
    min_visible: int = 0
    """The keypoint head learns only from micro-batches with at least this many keypoints, as a mean
    over few is noise. Detectron draws other images if there are fewer than 20; here the rest of the
    detector still learns from them. 0: no limit."""


def check_keypoint(keypoint: KeypointConfig) -> None:
    """Check the options of the keypoint head."""
    positive("model.keypoint", keypoint, "num_keypoints", "width")
    not_negative("model.keypoint", keypoint, "min_visible")


@dataclass(frozen=True, kw_only=True)
class RetinaConfig:
    """RetinaNet: its anchors, its loss, and what is reported."""

    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the smallest square anchor of each pyramid level P3 to P7, pixels."""
    scales_per_octave: int = 3
    """Anchor sizes of a level, from its smallest up to less than twice that."""
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height over width of the anchors, area kept."""
    positive_iou: float = 0.5
    """An anchor is positive for an object that it overlaps by at least this, or more than all other
    anchors do."""
    negative_iou: float = 0.4
    """An anchor whose IoU with all objects is below this is background; those in between are left
    out."""
    focal_alpha: float = 0.25
    """Weight of an anchor's own class in the focal loss; other classes weigh 1 - this."""
    focal_gamma: float = 2.0
    """How strongly well-classified anchors are down-weighted. 0: cross entropy."""
    box_beta: float = 0.0
    """Where the smooth L1 loss of boxes changes from square to linear. 0: L1 (torchvision,
    mmdetection); detectron2 has 0.1."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    candidates_per_level: int = 1000
    """Detections per level and image before NMS."""
    nms: Nms = "hard"
    """What happens to detections of one class that overlap a better one: see ``model.roi.nms``."""
    nms_iou: float = field(default=0.5, metadata=only_for("nms", "hard", "linear"))
    """Detections of one class that overlap a better one by more than this are dropped; with
    ``linear`` their scores are lowered from this on."""
    nms_sigma: float = field(default=0.5, metadata=only_for("nms", "gaussian"))
    """How slowly scores fall with the overlap."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


def check_retina(retina: RetinaConfig) -> None:
    """Check the options of RetinaNet."""
    key = "model.retina"
    check_anchors(key, retina, "P3 to P7")
    positive(key, retina, "scales_per_octave", "candidates_per_level", "detections_per_image")
    positive(key, retina, "nms_sigma")
    not_negative(key, retina, "focal_gamma", "box_beta")
    fraction(key, retina, "positive_iou", "negative_iou", "focal_alpha", "score_threshold")
    fraction(key, retina, "nms_iou")
    is_fine = retina.negative_iou <= retina.positive_iou
    expected = f"at most positive_iou, {retina.positive_iou}"
    require(is_fine, f"{key}.negative_iou", retina.negative_iou, expected)
