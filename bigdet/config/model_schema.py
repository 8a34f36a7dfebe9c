"""Options of the model: detector, backbone, heads and their losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.families import BACKBONES, DETECTORS
from bigdet.config.own import FORM

BoxHead = Literal["2fc", "4conv1fc"]
BoxLoss = Literal["l1", "smooth_l1", "giou"]
Norm = Literal["bn", "gn", "none"]
NormScope = Literal["backbone", "all"]
CHOICES = "choices"
"""In the metadata of an option that is a text: what it may be."""


@dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposals."""

    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the square anchor of each pyramid level P2 to P6, pixels. Without an FPN (vgg16): of
    all anchors of a point, in any number; Detectron has 64, 128, 256, 512."""
    anchor_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height over width of the anchors, area kept."""
    anchors_per_image: int = 256
    """Sampled anchors per image in the loss, at most half of them positive."""
    train_proposals: int | None = None
    """Proposals per image after NMS in training. None: 1000, or 2000 if the detector is a cascade
    (detectron2, mmdetection; Detectron's 2000 are of a batch of two images)."""
    test_proposals: int = 1000
    """Proposals per image after NMS at test time."""
    train_candidates: int | None = None
    """Proposals per level before NMS in training. None: ``train_proposals`` where that is set, else
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
    """Where the box loss turns from square to linear (smooth L1); 0 is L1. Detectron: 1/9."""
    nms_iou: float = 0.7
    """Proposals of one level that overlap a better one by more than this are dropped."""


@dataclass(frozen=True, kw_only=True)
class RoiConfig:
    """Regions of interest: which are trained on and which are reported."""

    rois_per_image: int = 512
    """Sampled regions per image in the box loss."""
    positive_fraction: float = 0.25
    """At most this fraction of them are on objects."""
    positive_iou: float = 0.5
    """A region on an object overlaps it by at least this. A cascade has its own three."""
    crowd_coverage: float | None = None
    """Regions with more than this fraction of their area in a crowd are not background examples
    (Detectron has the option, 0.7, and trains without it). None: crowds have no effect."""
    sampling_ratio: int = 2
    """Points a side at which RoIAlign samples each cell of a region (Detectron, torchvision). 0: as
    many as the cell has pixels of the features, rounded up, as in detectron2 and mmdetection, whose
    weights were trained so; slower."""
    class_agnostic: bool | None = None
    """One box per region for all classes, instead of one per class. None: true if
    ``model.detector`` is a cascade, else false, for all phases."""
    box_loss: BoxLoss = "l1"
    """``l1`` and ``smooth_l1`` of the deltas, or ``giou`` of the boxes."""
    box_beta: float = 1.0
    """For ``smooth_l1``: where it turns from square to linear. Detectron: 1, torchvision: 1/9."""
    box_loss_weight: float = 1.0
    """Factor of the box loss; with ``giou`` 10 is usual."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    nms_iou: float = 0.5
    """Detections of one class that overlap a better one by more than this are dropped."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


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
    """An anchor that overlaps no object by this is background; those in between do not count."""
    focal_alpha: float = 0.25
    """Weight of an anchor's own class in the focal loss; other classes weigh 1 - this."""
    focal_gamma: float = 2.0
    """How strongly well-classified anchors are down-weighted; 0 is cross entropy."""
    box_beta: float = 0.0
    """Where the smooth L1 loss of boxes turns from square to linear. 0: L1 (torchvision,
    mmdetection); detectron2 has 0.1."""
    score_threshold: float = 0.05
    """Detections with a lower score are not reported."""
    candidates_per_level: int = 1000
    """Detections per level and image before NMS."""
    nms_iou: float = 0.5
    """Detections of one class that overlap a better one by more than this are dropped."""
    detections_per_image: int = 100
    """At most this many detections are reported per image."""


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """How the stages of a cascade are trained."""

    gradients: Literal["detectron2", "mmdet"] = "detectron2"
    """``detectron2``: all stages count alike, a third of their gradients goes into the pooled
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
    over few is noise. Detectron draws other images where it finds fewer than 20; here the rest of
    the detector still learns from them. 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector."""

    detector: str = field(default=MISSING, metadata={CHOICES: (*DETECTORS, FORM)})
    """Which detector: one of these, or a function of your own."""
    backbone: str = field(default=MISSING, metadata={CHOICES: (*BACKBONES, FORM)})
    """Which backbone: one of these, or a function of your own."""
    box_head: BoxHead = "2fc"
    """Two fully connected layers, or four 3x3 convolutions and one."""
    norm: Norm = "bn"
    """Normalization of convolutional backbones and, by scope, of FPN and heads."""
    norm_scope: NormScope | None = None
    """Where ``norm`` goes: ``backbone`` or ``all`` (never the RPN head). None: ``backbone`` with
    bn, ``all`` with gn."""
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
    """Compile backbone, FPN and RPN (or RetinaNet's) head with torch.compile in training. It pays
    if the canvas has few sizes: resizes ``direct`` and ``jitter``, and ``pad_to: two_shapes``. The
    first steps take minutes."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth in a Swin, ConvNeXt or ViT backbone, in [0, 1)."""
    rpn: RpnConfig = field(default_factory=RpnConfig)
    """Region proposals."""
    roi: RoiConfig = field(default_factory=RoiConfig)
    """Regions of interest."""
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    """Stages of a cascade."""
    keypoint: KeypointConfig = field(default_factory=KeypointConfig)
    """The head of ``keypoint_rcnn``."""
    retina: RetinaConfig = field(default_factory=RetinaConfig)
    """RetinaNet."""
