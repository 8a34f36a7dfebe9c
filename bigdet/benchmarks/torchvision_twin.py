"""torchvision's own detector with the weights and settings of one of ours.

``bigdet benchmark predict`` compares its speed with ours, so it is in the package; tests use
it too. It takes the weights that ``bigdet convert-weights to-torchvision`` writes.

Where torchvision has no option for what bigdet does (regions pooled with the half-pixel shift,
anchors that are not rounded), the twin has its own small module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet, vgg
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from bigdet.config.model import ModelConfig, has_fpn, has_keypoints, has_masks, used
from bigdet.config.rpn import RpnConfig
from bigdet.models.anchors import grid_anchors, grid_spacings
from bigdet.models.build import head_norm
from bigdet.models.conventions import Conventions
from bigdet.models.detector import Detector
from bigdet.models.heads import keypoint, mask
from bigdet.models.heads.box import BoxHead
from bigdet.models.norms import GROUPS
from bigdet.models.rcnn import RCNN
from bigdet.models.retinanet import RetinaNet as OwnRetinaNet
from bigdet.ops.pooling import pyramid_levels
from bigdet.weights.torchvision_layout import to_torchvision, twins


def torchvision_twin(detector: Detector) -> nn.Module:
    """Build torchvision's detector with our weights, in the type and mode of ours.

    Raises:
        ValueError: torchvision has no such backbone.
    """
    twins(detector)  # raises for backbones that torchvision does not have
    if isinstance(detector, OwnRetinaNet):
        other = _retinanet(detector)
    else:
        assert isinstance(detector, RCNN)
        other = _rcnn(detector)
    twin: nn.Module = other.to(detector.get_buffer("pixel_mean"))
    twin.load_state_dict(to_torchvision(detector, detector.state_dict()))
    return twin.train(detector.training)


class ExactAnchors(AnchorGenerator):  # type: ignore[misc]
    """bigdet's anchors: not rounded, spaced by the nominal stride of their level."""

    def __init__(self, cells: Tensor, strides: Sequence[int]) -> None:
        """Take the anchors of one point ``(L, R, 4)`` and the strides of the levels."""
        count = len(cells[0])
        super().__init__(((1,),) * len(cells), ((1.0,) * count,) * len(cells))
        self.cells, self.strides = cells, strides

    def forward(self, images: Any, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each image."""
        sizes = [(level.shape[2], level.shape[3]) for level in features]
        canvas_size = (images.tensors.shape[2], images.tensors.shape[3])
        spacings = grid_spacings(sizes, self.strides, canvas_size, from_canvas=False)
        cells = self.cells.to(
            features[0].device, torch.promote_types(features[0].dtype, torch.float32)
        )
        anchors = grid_anchors(sizes, spacings, cells)
        return [anchors for _ in images.image_sizes]


class AlignedPool(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign with the half-pixel shift, which torchvision's pooler has no option for."""

    def __init__(
        self, names: list[str], output_size: int, strides: Sequence[int], sampling_ratio: int
    ) -> None:
        """Pool ``(output_size, output_size)`` from levels of these names and strides."""
        super().__init__(names, output_size, sampling_ratio)
        self.strides = list(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Return ``(N, C, P, P)`` of the boxes ``(n, 4)`` of each image."""
        flat = torch.cat(boxes)
        images = torch.repeat_interleave(torch.tensor([len(one) for one in boxes]))
        rois = torch.cat([images[:, None].to(flat), flat], dim=1)
        levels = pyramid_levels(flat, self.strides)
        # Under autocast features are shorter than boxes, and so is what is pooled from them.
        finest = x[self.featmap_names[0]]
        pooled = finest.new_zeros(len(flat), finest.shape[1], *self.output_size)
        for number, (name, stride) in enumerate(zip(self.featmap_names, self.strides, strict=True)):
            rows = torch.where(levels == number)[0]
            pooled[rows] = roi_align(
                x[name], rois[rows], self.output_size, 1 / stride, self.sampling_ratio, True
            )
        return pooled


def _pixels(detector: Detector) -> dict[str, Any]:
    """Return the options that torchvision's detectors have in common."""
    mean, deviation = detector.get_buffer("pixel_mean"), detector.get_buffer("pixel_deviation")
    return {
        # As the buffers have them: rounded to fp32.
        "image_mean": (mean.double().flatten() / 255).tolist(),
        "image_std": (deviation.double().flatten() / 255).tolist(),
        "min_size": detector.eval_size[0],
        "max_size": detector.eval_size[1],
        "_skip_resize": True,  # in training
    }


def _norm_layer(kind: str) -> Any:
    return {"none": None, "bn": nn.BatchNorm2d, "gn": _group_norm}[kind]


def _group_norm(channels: int) -> nn.GroupNorm:
    """Give torch's own layer: ours may do the ReLU that follows it."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps=1e-5)


def _body(detector: Detector) -> Any:
    """Build torchvision's ResNet of the same shape."""
    own = detector.backbone
    layers = [len(getattr(own, f"layer{index}")) for index in range(1, 5)]
    conv = own.get_submodule("layer1.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    is_bottleneck = hasattr(own.get_submodule("layer1.0"), "conv3")
    return resnet.ResNet(
        resnet.Bottleneck if is_bottleneck else resnet.BasicBlock,
        layers,
        groups=conv.groups,
        width_per_group=conv.out_channels // conv.groups,
        norm_layer=_norm_layer(detector.config.norm),
    )


def _backbone(detector: Detector, fpn: nn.Module | None) -> Any:
    config = detector.config
    if fpn is None:
        features = vgg.vgg16(weights=None).features[:-1]
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        features.out_channels = detector.backbone.channels[-1]
        return features
    first = 1 if isinstance(detector, OwnRetinaNet) else 0
    channels = detector.backbone.channels[first:]
    extra = LastLevelMaxPool()
    if isinstance(detector, OwnRetinaNet):
        extra = LastLevelP6P7(detector.fpn.p6.in_channels, config.width)
        extra.use_P5 = detector.fpn.p6_source == "p5"
    return BackboneWithFPN(
        _body(detector),
        {f"layer{first + index + 1}": str(index) for index in range(len(channels))},
        channels,
        config.width,
        extra,
        _norm_layer(head_norm(config)),
    )


def _anchors(
    head: nn.Module, sizes: Any, ratios: Sequence[float], strides: Sequence[int], c: Conventions
) -> AnchorGenerator:
    if c.anchors_rounded:
        return AnchorGenerator(tuple(sizes), (tuple(ratios),) * len(sizes))
    return ExactAnchors(head.get_buffer("cells"), strides)


def _retinanet(detector: OwnRetinaNet) -> Any:
    config, head = used(detector.config.retina), detector.retina_head
    scales = [2 ** (step / config.scales_per_octave) for step in range(config.scales_per_octave)]
    sizes = [tuple(int(size * scale) for scale in scales) for size in config.anchor_sizes]
    backbone = _backbone(detector, detector.fpn)
    generator = _anchors(head, sizes, config.anchor_ratios, detector.strides, head.conventions)
    return RetinaNet(
        backbone,
        head.num_classes,
        anchor_generator=generator,
        head=RetinaNetHead(
            detector.config.width,
            len(head.get_buffer("cells")[0]),
            head.num_classes,
            _norm_layer(head_norm(detector.config)),
        ),
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_iou,
        detections_per_img=config.detections_per_image,
        fg_iou_thresh=config.positive_iou,
        bg_iou_thresh=config.negative_iou,
        topk_candidates=config.candidates_per_level,
        **_pixels(detector),
    )


def training_options(
    config: ModelConfig, rpn: RpnConfig, width: int, num_classes: int
) -> dict[str, Any]:
    """Return the box head of torchvision's R-CNNs, and their settings of training.

    ``rpn`` has the limits of its proposals; features have ``width`` channels.
    """
    roi, norm = used(config.roi), _norm_layer(head_norm(config))
    head = TwoMLPHead(width * 49, config.fc_width)
    if config.box_head == "4conv1fc":
        head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [config.fc_width], norm)
    return {
        "rpn_pre_nms_top_n_train": rpn.train_candidates,
        "rpn_post_nms_top_n_train": rpn.train_proposals,
        "rpn_batch_size_per_image": rpn.anchors_per_image,
        "rpn_nms_thresh": rpn.nms_iou,
        "box_batch_size_per_image": roi.rois_per_image,
        "box_positive_fraction": roi.positive_fraction,
        "box_fg_iou_thresh": roi.positive_iou,
        "box_bg_iou_thresh": roi.positive_iou,
        "box_head": head,
        "box_predictor": FastRCNNPredictor(config.fc_width, num_classes + 1),
    }


def mask_options(config: ModelConfig, width: int, num_classes: int) -> dict[str, Any]:
    """Return the mask head of torchvision's Mask R-CNN; arguments as of ``training_options``."""
    norm = _norm_layer(head_norm(config))
    return {
        "mask_head": MaskRCNNHeads(width, [width] * mask.NUM_CONVS, 1, norm),
        "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
    }


def _rcnn(detector: RCNN) -> Any:
    config, box_head = detector.config, detector.box_head
    assert isinstance(box_head, BoxHead)
    conventions, num_classes = box_head.conventions, box_head.num_classes
    rpn, roi, strides = detector.rpn.config, used(config.roi), detector.backbone.strides
    backbone = _backbone(detector, detector.fpn)
    width = config.width if has_fpn(config) else detector.backbone.channels[-1]
    names = [str(index) for index in range(len(strides))]
    sizes = [(size,) for size in rpn.anchor_sizes] if has_fpn(config) else [rpn.anchor_sizes]

    def pool(side: int) -> Any:
        if conventions.roi_align_aligned:
            return AlignedPool(names, side, strides, roi.sampling_ratio)
        return MultiScaleRoIAlign(names, side, roi.sampling_ratio)

    options = _pixels(detector) | training_options(config, rpn, width, num_classes)
    options |= {
        "rpn_anchor_generator": _anchors(
            detector.rpn, sizes, rpn.anchor_ratios, detector.strides, conventions
        ),
        "rpn_pre_nms_top_n_test": rpn.test_candidates,
        "rpn_post_nms_top_n_test": rpn.test_proposals,
        "box_score_thresh": roi.score_threshold,
        "box_nms_thresh": roi.nms_iou,
        "box_detections_per_img": roi.detections_per_image,
        "box_roi_pool": pool(7),
    }
    if has_keypoints(config):
        keypoints = used(config.keypoint)
        options |= {
            "keypoint_roi_pool": pool(keypoint.POOLED_SIZE),
            "keypoint_head": KeypointRCNNHeads(width, [keypoints.width] * keypoint.NUM_CONVS),
            "keypoint_predictor": KeypointRCNNPredictor(keypoints.width, keypoints.num_keypoints),
        }
        return KeypointRCNN(backbone, **options)
    if not has_masks(config):
        return FasterRCNN(backbone, **options)
    options |= mask_options(config, width, num_classes)
    return MaskRCNN(backbone, mask_roi_pool=pool(mask.POOLED_SIZE), **options)
