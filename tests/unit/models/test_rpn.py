from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.anchors import grid_anchors
from bigdet.models.assign import pad_objects
from bigdet.models.build import build_detector
from bigdet.models.conventions import Conventions
from bigdet.models.heads.rpn import AnchorPredictions, RegionProposals
from tests.unit.models.scenes import make_scene

EVERYTHING = 100_000
CONFIG = RpnConfig(anchor_sizes=[16, 32], train_proposals=50, test_proposals=20)


def predictions_of(
    anchors: list[list[float]], logits: list[list[float]], counts: list[int]
) -> AnchorPredictions:
    """Predictions that leave every anchor where it is."""
    scores = torch.tensor(logits)
    deltas = torch.zeros(*scores.shape, 4)
    return AnchorPredictions(scores, deltas, torch.tensor(anchors), counts)


def rpn_of(config: RpnConfig = CONFIG, conventions: Conventions | None = None) -> RegionProposals:
    torch.manual_seed(0)
    return RegionProposals(config, 8, conventions or Conventions())


A, B, C = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 40.0, 30.0]
SIZES = torch.tensor([[64, 64]])


def test_proposals_come_best_first_without_near_duplicates() -> None:
    # A and B overlap by 0.818; B is better.
    proposals = rpn_of().propose(predictions_of([A, B, C], [[0.0, 1.0, -1.0]], [3]), SIZES)
    assert proposals.is_valid.tolist() == [[True, True, False]]
    assert proposals.boxes[0, :2].tolist() == [B, C]


def test_duplicates_of_other_levels_stay() -> None:
    proposals = rpn_of().propose(predictions_of([A, B], [[0.0, 1.0]], [1, 1]), SIZES)
    assert proposals.boxes[0].tolist() == [B, A]


def test_proposals_are_cut_at_their_image_and_empty_ones_dropped() -> None:
    predictions = predictions_of([A, C], [[0.0, 1.0], [0.0, 1.0]], [2])
    proposals = rpn_of().propose(predictions, torch.tensor([[64, 64], [5, 15]]))
    # C begins at (20, 20): nothing of it is inside an image of 5 x 15.
    assert proposals.boxes[0].tolist() == [C, A]
    assert proposals.is_valid[1].tolist() == [True, False]
    assert proposals.boxes[1, 0].tolist() == [0.0, 0.0, 10.0, 5.0]


def test_each_level_gives_its_best_and_the_image_keeps_the_best_of_all() -> None:
    apart = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(6)]
    config = replace(CONFIG, train_proposals=2, test_proposals=1)
    rpn = rpn_of(config)
    predictions = predictions_of(apart, [[3.0, 5.0, 4.0, 0.0, 1.0, 2.0]], [3, 3])
    proposals = rpn.propose(predictions, torch.tensor([[64, 640]]))
    assert proposals.boxes[0].tolist() == [apart[1], apart[2]]
    proposals = rpn.eval().propose(predictions, torch.tensor([[64, 640]]))
    assert proposals.boxes[0].tolist() == [apart[1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_costs_one_anchor(bad: float) -> None:
    predictions = predictions_of([A, C, [40.0, 0.0, 50.0, 9.0]], [[bad, 1.0, 0.0]], [3])
    predictions.deltas[0, 2, 0] = math.nan
    proposals = rpn_of().propose(predictions, SIZES)
    assert proposals.is_valid.tolist() == [[True, False, False]]
    assert proposals.boxes[0, 0].tolist() == C
    assert proposals.boxes.isfinite().all()


def scene_losses(rpn: RegionProposals, weights: list[float], objects: list) -> dict:
    """Losses of random features for two images of 32 x 32."""
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 8, 32 // s, 32 // s, generator=generator) for s in (4, 8)]
    batch = make_scene(objects, [(32, 32)] * 2, (32, 32))
    predictions = rpn(features, [4, 8], (32, 32))
    return rpn.losses(predictions, pad_objects(batch.targets, torch.float32), torch.tensor(weights))


OBJECTS = [[(2, 2, 20, 22), (10, 4, 31, 30)], [(5, 5, 21, 20)]]


def test_an_image_of_weight_zero_counts_nothing() -> None:
    rpn = rpn_of(
        replace(CONFIG, anchors_per_image=EVERYTHING), Conventions(rpn_normalizer="sampled")
    )
    both = scene_losses(rpn, [1.0, 1.0], OBJECTS)
    first = scene_losses(rpn, [1.0, 0.0], OBJECTS)
    other_second = scene_losses(rpn, [1.0, 0.0], [OBJECTS[0], [(0, 0, 30, 30)]])
    assert first["rpn_box"] == other_second["rpn_box"] > 0
    assert first["rpn_objectness"] == other_second["rpn_objectness"] != both["rpn_objectness"]
    none = scene_losses(rpn, [0.0, 0.0], OBJECTS)
    assert none == {"rpn_objectness": 0, "rpn_box": 0}


def test_images_without_objects_have_no_box_loss_and_finite_gradients_everywhere() -> None:
    rpn = rpn_of()
    losses = scene_losses(rpn, [1.0, 1.0], [[], []])
    assert losses["rpn_box"] == 0
    assert losses["rpn_objectness"] > 0
    sum(losses.values()).backward()
    for parameter in rpn.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_losses_are_divided_by_the_slots_or_by_what_was_sampled() -> None:
    # 3 x (64 + 16) anchors in an image without objects: 240 sampled into 480 slots. Logits are
    # nearly 0 at the start: the sum is 240 log 2.
    config = replace(CONFIG, anchors_per_image=480)
    slots = scene_losses(rpn_of(config), [1.0, 1.0], [[], []])
    sampled = scene_losses(
        rpn_of(config, Conventions(rpn_normalizer="sampled")), [1.0, 1.0], [[], []]
    )
    torch.testing.assert_close(slots["rpn_objectness"] * 2, sampled["rpn_objectness"])
    assert abs(sampled["rpn_objectness"].item() - math.log(2)) < 0.05


def test_every_convolution_starts_with_a_deviation_of_one_hundredth() -> None:
    rpn = RegionProposals(CONFIG, 128, Conventions())
    for layer in rpn.modules():
        if isinstance(layer, nn.Conv2d):
            assert abs(layer.weight.std().item() / 0.01 - 1) < 0.2
            assert layer.bias is not None
            assert not layer.bias.any()


def test_numbers_of_proposals_follow_from_the_detector() -> None:
    # detectron2 and mmdetection: 2000 of each level before NMS, 1000 of an image after it; cascades
    # 2000. Numbers that a config has are its own.
    for detector, expected in (
        ("faster_rcnn", (2000, 1000, 1000, 1000)),
        ("mask_rcnn", (2000, 1000, 1000, 1000)),
        ("keypoint_rcnn", (2000, 1000, 1000, 1000)),
        ("cascade_rcnn", (2000, 2000, 1000, 1000)),
        ("cascade_mask_rcnn", (2000, 2000, 1000, 1000)),
    ):
        with torch.device("meta"):
            model = ModelConfig(detector=detector, backbone="resnet10", width=8, fc_width=8)
            config = build_detector(model, 2).rpn.config
        found = (config.train_candidates, config.train_proposals)
        assert (*found, config.test_candidates, config.test_proposals) == expected, detector
    for rpn, expected in (
        (RpnConfig(train_proposals=300), (300, 300)),
        (RpnConfig(train_candidates=500), (500, 1000)),
        (RpnConfig(train_candidates=12_000, train_proposals=2000), (12_000, 2000)),
    ):
        config = RegionProposals(rpn, 8, Conventions()).config
        assert (config.train_candidates, config.train_proposals) == expected


def test_more_candidates_than_proposals_are_compared_in_nms() -> None:
    # Levels of three boxes, the two best of each alike: of two candidates a level NMS leaves one.
    near = [[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 0.0, 30.0, 10.0]]
    predictions = predictions_of(near, [[3.0, 2.0, 1.0]], [3])
    for candidates, expected in ((2, [near[0]]), (3, [near[0], near[2]])):
        config = replace(CONFIG, train_candidates=candidates, train_proposals=2)
        proposals = rpn_of(config).propose(predictions, SIZES)
        assert proposals.boxes[proposals.is_valid].tolist() == expected


def labels_of(config: RpnConfig, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Which of all anchors are sampled: 1 as positive, 0 as negative, -1 not."""
    rpn = rpn_of(replace(config, anchors_per_image=EVERYTHING))
    batch = make_scene(OBJECTS, sizes, (64, 64))
    cells = rpn.get_buffer("cells")
    anchors = grid_anchors([(16, 16), (8, 8)], [(4, 4), (8, 8)], cells)
    objects = pad_objects(batch.targets, torch.float32)
    sample, _ = rpn._sample(anchors, objects, batch.image_sizes)
    labels = torch.full((2, len(anchors)), -1)
    for image in range(2):
        taken = sample.is_valid[image]
        labels[image, sample.index[image, taken]] = sample.is_positive[image, taken].long()
    return labels


@pytest.mark.parametrize("border", [None, 0, 6])
@pytest.mark.parametrize("lowest", [0.0, 0.3])
def test_anchors_are_labeled_as_mmdetections_assigner_does(
    border: int | None, lowest: float
) -> None:
    # Brute force: anchors that cross the border are taken away first, then the rest is compared.
    config = replace(CONFIG, border=border, low_quality_iou=lowest)
    sizes = [(32, 32), (40, 24)]
    labels = labels_of(config, sizes)
    cells = rpn_of(config).get_buffer("cells")
    anchors = grid_anchors([(16, 16), (8, 8)], [(4, 4), (8, 8)], cells)
    for image, (height, width) in enumerate(sizes):
        inside = [
            number
            for number, (x0, y0, x1, y1) in enumerate(anchors.tolist())
            if border is None
            or (x0 >= -border and y0 >= -border and x1 <= width + border and y1 <= height + border)
        ]
        iou = box_iou(torch.tensor(OBJECTS[image]).float(), anchors[inside])
        expected = torch.full((len(anchors),), -1)
        for column, number in enumerate(inside):
            best = iou[:, column].max()
            is_best = any(
                row[column] == row.max() and row.max() >= lowest and row.max() > 0 for row in iou
            )
            if best >= 0.7 or is_best:
                expected[number] = 1
            elif best < 0.3:
                expected[number] = 0
        assert torch.equal(labels[image], expected)
        assert (expected == 0).any()
    assert (labels == 1).any()
