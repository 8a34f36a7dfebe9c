"""The same weights in bigdet and in torchvision give the same numbers.

In float64: with random weights, ties in fp32 flip the choice of the best anchors. The backbone and
pyramid are bigdet's own in both; everything behind them is torchvision's on one side.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align

from bigdet.config.schema import KeypointConfig, ModelConfig, RoiConfig, RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.conventions import TORCHVISION
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector
from bigdet.structures import Batch
from tests.unit.models.scenes import make_scene

NUM_CLASSES = 3
NUM_KEYPOINTS = 5
EVERYTHING = 1_000_000  # slots for all candidates: nothing is left to chance
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
RPN = RpnConfig(
    box_beta=1 / 9,
    anchor_sizes=[16, 32, 64, 96, 128],
    anchors_per_image=EVERYTHING,
    train_proposals=150,
    test_proposals=100,
)
# Untrained proposals overlap objects little: a low bar makes some of them positive.
ROI = RoiConfig(
    rois_per_image=EVERYTHING,
    positive_iou=0.3,
    box_loss="smooth_l1",
    box_beta=1 / 9,
    detections_per_image=60,
)
LOSS_NAMES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "box_class",
    "loss_box_reg": "box_delta",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
}


class Pyramid(nn.Module):
    """bigdet's backbone and FPN in the form that torchvision's detectors take."""

    def __init__(self, detector: Detector, width: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(detector.backbone)
        self.fpn = copy.deepcopy(detector.fpn)
        self.out_channels = width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(
            zip(["0", "1", "2", "3", "pool"], self.fpn(self.backbone(images)), strict=True)
        )


def own_detector(name: str, backbone: str, box_head: str, width: int) -> Detector:
    torch.manual_seed(1)
    config = ModelConfig(
        detector=name,
        backbone=backbone,
        box_head=box_head,
        width=width,
        fc_width=64,
        rpn=RPN,
        roi=ROI,
        keypoint=KeypointConfig(num_keypoints=NUM_KEYPOINTS, width=24),
    )
    detector = build_detector(config, NUM_CLASSES, TORCHVISION).double()
    heads = [detector.rpn, detector.box_head]
    for layer in [layer for head in heads for layer in head.modules()]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # weights with something to say
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    nn.init.normal_(detector.rpn.deltas.weight, std=0.01)
    nn.init.normal_(detector.box_head.classifier.weight, std=0.02)  # several classes per region
    nn.init.zeros_(detector.box_head.classifier.bias)
    nn.init.normal_(detector.box_head.regressor.weight, std=0.1)
    return detector


def channels_first(weight: Tensor, channels: int, side: int) -> Tensor:
    """Columns of a fully connected layer from height, width, channels to channels first."""
    grid = weight.view(len(weight), side, side, channels)
    return grid.permute(0, 3, 1, 2).flatten(1)


def to_torchvision(detector: Detector, read: str) -> dict[str, Tensor]:
    """Weights (or gradients, ``read="grad"``) by torchvision's names; background rows are 0."""
    width = detector.rpn.conv.conv.out_channels
    found = {}

    def take(theirs: str, ours: nn.Module, change=lambda value: value) -> None:
        found[f"{theirs}.weight"] = change(getattr(ours.weight, read))
        found[f"{theirs}.bias"] = change(getattr(ours.bias, read))

    def background(rows: int):
        return lambda value: torch.cat([torch.zeros_like(value[:rows]), value])

    box, fcs = "roi_heads.box_head", detector.box_head.fcs
    take("rpn.head.conv.0.0", detector.rpn.conv.conv)
    take("rpn.head.cls_logits", detector.rpn.objectness)
    take("rpn.head.bbox_pred", detector.rpn.deltas)
    if len(detector.box_head.convs):
        for i, layer in enumerate(detector.box_head.convs):
            take(f"{box}.{i}.0", layer.conv)
        names = [f"{box}.5"]
    else:
        names = [f"{box}.fc6", f"{box}.fc7"]
    for name, layer in zip(names, fcs, strict=True):
        take(name, layer)
    found[f"{names[0]}.weight"] = channels_first(found[f"{names[0]}.weight"], width, 7)
    take(
        "roi_heads.box_predictor.cls_score",
        detector.box_head.classifier,
        lambda value: value.roll(1, dims=0),
    )
    take("roi_heads.box_predictor.bbox_pred", detector.box_head.regressor, background(4))
    if detector.mask_head is not None:
        for i, layer in enumerate(detector.mask_head.convs):
            take(f"roi_heads.mask_head.{i}.0", layer.conv)
        take("roi_heads.mask_predictor.conv5_mask", detector.mask_head.deconv)
        take(
            "roi_heads.mask_predictor.mask_fcn_logits",
            detector.mask_head.predictor,
            background(1),
        )
    if detector.keypoint_head is not None:
        for i, layer in enumerate(detector.keypoint_head.convs):
            take(f"roi_heads.keypoint_head.{2 * i}", layer.conv)
        take("roi_heads.keypoint_predictor.kps_score_lowres", detector.keypoint_head.deconv)
    return found


def torchvision_detector(detector: Detector, box_head: str, width: int) -> FasterRCNN:
    from torchvision.models.detection.faster_rcnn import (
        FastRCNNConvFCHead,
        FastRCNNPredictor,
        TwoMLPHead,
    )
    from torchvision.models.detection.keypoint_rcnn import (
        KeypointRCNNHeads,
        KeypointRCNNPredictor,
    )
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    head = TwoMLPHead(width * 49, 64)
    if box_head == "4conv1fc":
        head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [64])
    options = {
        # As bigdet's buffers have them: rounded to fp32.
        "image_mean": (torch.tensor(PIXEL_MEAN).double() / 255).tolist(),
        "image_std": (torch.tensor(PIXEL_DEVIATION).double() / 255).tolist(),
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in RPN.anchor_sizes), ((0.5, 1.0, 2.0),) * 5
        ),
        "rpn_pre_nms_top_n_train": RPN.train_proposals,
        "rpn_post_nms_top_n_train": RPN.train_proposals,
        "rpn_pre_nms_top_n_test": RPN.test_proposals,
        "rpn_post_nms_top_n_test": RPN.test_proposals,
        "rpn_batch_size_per_image": EVERYTHING,
        "box_batch_size_per_image": EVERYTHING,
        "box_fg_iou_thresh": ROI.positive_iou,
        "box_bg_iou_thresh": ROI.positive_iou,
        "box_detections_per_img": ROI.detections_per_image,
        "box_head": head,
        "box_predictor": FastRCNNPredictor(64, NUM_CLASSES + 1),
        "_skip_resize": True,  # in training
    }
    if detector.keypoint_head is not None:
        options |= {
            "keypoint_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
            "keypoint_head": KeypointRCNNHeads(width, [24] * 8),
            "keypoint_predictor": KeypointRCNNPredictor(24, NUM_KEYPOINTS),
        }
        other = KeypointRCNN(Pyramid(detector, width), **options)
    elif detector.mask_head is None:
        other = FasterRCNN(Pyramid(detector, width), **options)
    else:
        options |= {
            "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
            "mask_head": MaskRCNNHeads(width, [width] * 4, 1),
            "mask_predictor": MaskRCNNPredictor(width, width, NUM_CLASSES + 1),
        }
        other = MaskRCNN(Pyramid(detector, width), **options)
    other = other.double()
    missing, unexpected = other.load_state_dict(to_torchvision(detector, "data"), strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    return other


def scene() -> Batch:
    """Two images of different sizes on one canvas, with 5 and 3 objects."""
    first = [
        (5, 8, 60, 70),
        (50, 30, 140, 110),
        (90, 5, 150, 45),
        (20, 80, 44, 120),
        (70, 60, 90, 78),
    ]
    second = [(10, 12, 100, 80), (60, 20, 118, 60), (30, 50, 50, 90)]
    batch = make_scene([first, second], [(128, 160), (96, 128)], (128, 160), NUM_CLASSES)
    # Off the pixel grid: half-covered grid points of a mask would be decided by rounding.
    generator = torch.Generator().manual_seed(2)
    moved = batch.targets.boxes + torch.rand(8, 4, generator=generator)
    # Keypoints in and around the boxes, some of them hidden or not labelled.
    parts = torch.rand(8, NUM_KEYPOINTS, 2, generator=generator) * 1.4 - 0.2
    points = moved[:, None, :2] + parts * (moved[:, 2:] - moved[:, :2])[:, None]
    seen = torch.randint(0, 3, (8, NUM_KEYPOINTS, 1), generator=generator)
    keypoints = torch.cat([points, seen.float()], dim=2)
    keypoints[0, 0, :2] = moved[0, 2:]  # the corner belongs to the box
    keypoints[0, 0, 2] = 2
    return replace(batch, targets=replace(batch.targets, boxes=moved, keypoints=keypoints))


def as_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = [], []
    offsets, masks = batch.targets.offsets.tolist(), batch.targets.masks
    for i, (height, width) in enumerate(batch.image_sizes.tolist()):
        rows = range(offsets[i], offsets[i + 1])
        bitmaps = torch.zeros(len(rows), height, width, dtype=torch.uint8)
        for bitmap, row in zip(bitmaps, rows, strict=True):
            (x, y), (h, w) = masks.origins[row].tolist(), masks.sizes[row].tolist()
            crop = masks.bits[masks.offsets[row] : masks.offsets[row + 1]].view(h, w)
            bitmap[y : y + h, x : x + w] = crop
        images.append(batch.images[i, :, :height, :width].double() / 255)
        targets.append(
            {
                "boxes": batch.targets.boxes[offsets[i] : offsets[i + 1]].double(),
                "labels": batch.targets.labels[offsets[i] : offsets[i + 1]] + 1,
                "masks": bitmaps,
                "keypoints": batch.targets.keypoints[offsets[i] : offsets[i + 1]],
            }
        )
    return images, targets


def center_targets(bitmaps: Tensor, boxes: Tensor, rows: Tensor, size: int) -> Tensor:
    """bigdet's mask targets (centers of the bins, one half decides) by torchvision's roi_align."""
    rois = torch.cat([rows[:, None].to(boxes), boxes], dim=1)
    bitmaps = bitmaps[:, None].to(rois)
    soft = roi_align(bitmaps, rois, (size, size), 1.0, sampling_ratio=1, aligned=True)[:, 0]
    return (soft >= 0.5).to(soft)


MODELS = pytest.mark.parametrize(
    ("name", "backbone", "box_head", "width"),
    [
        ("mask_rcnn", "resnet10", "2fc", 32),
        ("mask_rcnn", "resnet10", "4conv1fc", 16),
        ("mask_rcnn", "resnet50", "2fc", 64),
        ("faster_rcnn", "resnet18", "2fc", 32),
        ("keypoint_rcnn", "resnet10", "2fc", 32),
    ],
)


@MODELS
def test_losses_and_gradients_equal_torchvisions(
    name: str, backbone: str, box_head: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", center_targets)
    ours = own_detector(name, backbone, box_head, width)
    theirs = torchvision_detector(ours, box_head, width)
    batch = scene()
    images, targets = as_torchvision(batch)

    losses = ours(batch)
    expected = theirs(images, targets)
    assert len(expected) == (4 if name == "faster_rcnn" else 5)
    for key, value in expected.items():
        assert value > 1e-4
        # torchvision rounds the objectness loss to fp32 on its way.
        torch.testing.assert_close(losses[LOSS_NAMES[key]], value.double(), rtol=1e-6, atol=0)

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    found = to_torchvision(ours, "grad")
    pyramid = {"backbone": ours.backbone, "fpn": ours.fpn}
    for part, module in pyramid.items():
        found |= {f"backbone.{part}.{key}": p.grad for key, p in module.named_parameters()}
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, **CLOSE, msg=key)


@MODELS
def test_predictions_equal_torchvisions_at_every_stage(
    name: str, backbone: str, box_head: str, width: int
) -> None:
    ours = own_detector(name, backbone, box_head, width).eval()
    theirs = torchvision_detector(ours, box_head, width).eval()
    batch = scene()
    # Untrained running statistics would let the features, and with them all scores, overflow.
    ours.backbone.train()
    theirs.backbone.train()
    images, _ = theirs.transform.train()(as_torchvision(batch)[0])
    canvas = (128, 160)
    with torch.no_grad():
        features = ours._features(batch)
        their_features = theirs.backbone(images.tensors)
        for one, other in zip(features, their_features.values(), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)

        predictions = ours.rpn(features, ours.strides, canvas)
        logits, deltas = theirs.rpn.head(list(their_features.values()))
        flat_logits = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in logits], dim=1)
        flat_deltas = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in deltas], dim=1)
        torch.testing.assert_close(predictions.logits, flat_logits, **CLOSE)
        torch.testing.assert_close(predictions.deltas.flatten(1), flat_deltas, **CLOSE)
        anchors = theirs.rpn.anchor_generator(images, list(their_features.values()))
        torch.testing.assert_close(predictions.anchors, anchors[0], **CLOSE)

        proposals = ours.rpn.propose(predictions, batch.image_sizes)
        expected_proposals, _ = theirs.rpn(images, their_features)
        for i, expected in enumerate(expected_proposals):
            assert len(expected) > 20
            torch.testing.assert_close(proposals.boxes[i, proposals.is_valid[i]], expected, **CLOSE)

        found = ours(batch)
        expected_found, _ = theirs.roi_heads(their_features, expected_proposals, images.image_sizes)
    for one, other in zip(found, expected_found, strict=True):
        assert len(other["boxes"]) > 10
        assert len(other["labels"].unique()) > 1
        # Detections are handed out in fp32: 1e-6 of the canvas, relative.
        torch.testing.assert_close(one.boxes, other["boxes"].float(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(one.scores, other["scores"].float(), **CLOSE)
        torch.testing.assert_close(one.labels, other["labels"] - 1)
        if name == "mask_rcnn":
            torch.testing.assert_close(one.masks, other["masks"][:, 0].float(), **CLOSE)
        if name == "keypoint_rcnn":
            points = other["keypoints"][..., :2].float()
            torch.testing.assert_close(one.keypoints[..., :2], points, rtol=1e-6, atol=1e-5)
            scores = other["keypoints_scores"].float()
            torch.testing.assert_close(one.keypoints[..., 2], scores, **CLOSE)
