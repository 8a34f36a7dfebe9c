"""The same weights in bigdet and in torchvision give the same numbers.

In float64: with random weights, ties in fp32 flip the choice of the best anchors. All of the other
side, from the backbone on, is torchvision's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.ops import roi_align

from bigdet.benchmarks.torchvision_twin import torchvision_twin
from bigdet.config.heads import KeypointConfig, RetinaConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.conventions import TORCHVISION
from bigdet.models.detector import Detector
from bigdet.structures import Batch
from bigdet.weights.torchvision_layout import to_torchvision
from tests.unit.models.scenes import make_scene

NUM_CLASSES = 3
NUM_KEYPOINTS = 5
EVERYTHING = 1_000_000  # slots for all candidates: nothing is left to chance
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
RPN = RpnConfig(
    box_beta=1 / 9,
    anchor_sizes=[16, 32, 64, 96, 128],
    anchors_per_image=EVERYTHING,
    low_quality_iou=0.0,  # torchvision's own rule
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
RETINA = RetinaConfig(
    anchor_sizes=[12, 24, 48, 64, 96], candidates_per_level=50, detections_per_image=1000
)
LOSS_NAMES = {
    "classification": "retina_class",
    "bbox_regression": "retina_box",
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "box_class",
    "loss_box_reg": "box_delta",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
}


def own_detector(
    detector: str, backbone: str, box_head: str, width: int, p6_source: str = "c5"
) -> Detector:
    torch.manual_seed(1)
    conventions = replace(TORCHVISION, p6_source=p6_source)
    config = model_config(detector, backbone, box_head, width)
    ours = build_detector(config, NUM_CLASSES, conventions).double()
    named = {"rpn", "box_head", "retina_head"}
    heads = [part for name, part in ours.named_children() if name in named]
    for layer in [layer for head in heads for layer in head.modules()]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # weights with something to say
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    if detector == "retinanet":
        nn.init.normal_(ours.retina_head.classifier.weight, std=0.02)
        nn.init.constant_(ours.retina_head.classifier.bias, -2.0)
        nn.init.normal_(ours.retina_head.regressor.weight, std=0.01)
        return ours
    nn.init.normal_(ours.rpn.deltas.weight, std=0.01)
    nn.init.normal_(ours.box_head.classifier.weight, std=0.02)  # several classes per region
    nn.init.zeros_(ours.box_head.classifier.bias)
    nn.init.normal_(ours.box_head.regressor.weight, std=0.1)
    return ours


def model_config(detector: str, backbone: str, box_head: str, width: int) -> ModelConfig:
    if detector == "retinanet":
        return ModelConfig(detector=detector, backbone=backbone, width=width, retina=RETINA)
    if backbone == "vgg16":
        rpn = replace(RPN, anchor_sizes=[24, 48, 96], train_candidates=200)
        return ModelConfig(
            detector=detector, backbone=backbone, norm="none", fc_width=64, rpn=rpn, roi=ROI
        )
    return ModelConfig(
        detector=detector,
        backbone=backbone,
        box_head=box_head,
        width=width,
        fc_width=64,
        rpn=RPN,
        roi=ROI,
        keypoint=KeypointConfig(num_keypoints=NUM_KEYPOINTS, width=24),
    )


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
    # Keypoints in and around the boxes, some of them hidden or not labeled.
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


RCNNS = [
    ("mask_rcnn", "resnet10", "2fc", 32),
    ("mask_rcnn", "resnet10", "4conv1fc", 16),
    ("mask_rcnn", "resnet50", "2fc", 64),
    ("faster_rcnn", "resnet18", "2fc", 32),
    ("keypoint_rcnn", "resnet10", "2fc", 32),
    ("faster_rcnn", "vgg16", "2fc", 512),
]
RETINANETS = [("retinanet", "resnet10", "2fc", 32), ("retinanet", "resnet10", "2fc", 32, "p5")]


@pytest.mark.parametrize("model", RCNNS + RETINANETS)
def test_losses_and_gradients_equal_torchvisions(
    model: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", center_targets)
    ours = own_detector(*model)
    theirs = torchvision_twin(ours)
    batch = scene()
    images, targets = as_torchvision(batch)
    if "retinanet" in model:  # which has no background class
        targets = [target | {"labels": target["labels"] - 1} for target in targets]

    losses = ours(batch)
    expected = theirs(images, targets)
    assert len(expected) == {"faster_rcnn": 4, "retinanet": 2}.get(model[0], 5)
    assert len(losses) == len(expected)
    for name, value in expected.items():
        assert value > 1e-4
        # torchvision rounds the objectness loss to fp32 on its way.
        torch.testing.assert_close(losses[LOSS_NAMES[name]], value.double(), rtol=1e-6, atol=0)

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    found = to_torchvision(ours, {name: p.grad for name, p in ours.named_parameters()})
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("model", RCNNS[:-1])  # one map is no other way than several
def test_predictions_equal_torchvisions_at_every_stage(model: tuple) -> None:
    ours = own_detector(*model).eval()
    theirs = torchvision_twin(ours).eval()
    batch = scene()
    # Untrained running statistics would let the features, and with them all scores, overflow.
    ours.backbone.train()
    theirs.backbone.train()
    images, _ = theirs.transform.train()(as_torchvision(batch)[0])
    canvas = (128, 160)
    with torch.no_grad():
        features = ours._features(batch)
        their_features = theirs.backbone(images.tensors)
        if isinstance(their_features, Tensor):
            their_features = {"0": their_features}
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
        if model[0] == "mask_rcnn":
            torch.testing.assert_close(one.masks, other["masks"][:, 0].float(), **CLOSE)
        if model[0] == "keypoint_rcnn":
            points = other["keypoints"][..., :2].float()
            torch.testing.assert_close(one.keypoints[..., :2], points, rtol=1e-6, atol=1e-5)
            scores = other["keypoints_scores"].float()
            torch.testing.assert_close(one.keypoints[..., 2], scores, **CLOSE)


@pytest.mark.parametrize("model", RETINANETS)
def test_detections_of_a_retinanet_equal_torchvisions(model: tuple) -> None:
    ours = own_detector(*model).eval()
    theirs = torchvision_twin(ours).eval()
    batch = scene()
    ours.backbone.train()
    theirs.backbone.train()
    theirs.transform.train()  # leaves the size as it is
    with torch.no_grad():
        found = ours(batch)
        expected_found = theirs(as_torchvision(batch)[0])
    for one, other in zip(found, expected_found, strict=True):
        assert len(other["boxes"]) > 10
        assert len(other["labels"].unique()) > 1
        # torchvision also reports boxes outside the image, of which nothing is left.
        is_real = (other["boxes"][:, 2:] > other["boxes"][:, :2]).all(dim=1)
        boxes, scores, labels = (other[key][is_real] for key in ("boxes", "scores", "labels"))
        torch.testing.assert_close(one.boxes, boxes.float(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(one.scores, scores.float(), **CLOSE)
        torch.testing.assert_close(one.labels, labels)
