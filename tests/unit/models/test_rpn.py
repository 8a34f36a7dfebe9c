from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bigdet.config.model_schema import RpnConfig
from bigdet.models.assign import pad_objects
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
    # C begins at (20, 20): nothing of it lies in an image of 5 x 15.
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
