from __future__ import annotations

import math

import pytest
import torch

from bigdet.models.heads.box import Regions
from bigdet.models.heads.mask import (
    MaskHead,
    OwnClass,
    select_positives,
)
from bigdet.models.heads.positives import Positives, pad_to_bucket
from bigdet.structures import Masks
from tests.unit.models.scenes import ellipse, pack_masks

K = 3


@pytest.mark.parametrize(("count", "slots"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64)])
def test_slots_come_in_buckets_and_there_is_at_least_one(count: int, slots: int) -> None:
    assert pad_to_bucket(count, torch.device("cuda")) == slots


def test_buckets_are_smaller_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [pad_to_bucket(count, cpu) for count in (0, 1, 8, 9)] == [8, 8, 8, 16]


def masks_of_two() -> Masks:
    """An ellipse, and an object without a mask."""
    return pack_masks([ellipse(20, 30), torch.zeros(0, 0)], [(5, 7), (0, 0)])


def regions_of(positive: list[list[bool]], rows: list[list[int]]) -> Regions:
    is_positive = torch.tensor(positive)
    batch, slots = is_positive.shape
    boxes = torch.arange(batch * slots).view(batch, slots, 1) + torch.tensor([0.0, 0.0, 9.0, 9.0])
    return Regions(
        boxes=boxes,
        labels=torch.where(is_positive, 1, K),
        is_valid=torch.ones_like(is_positive),
        is_positive=is_positive,
        object_boxes=boxes,
        object_rows=torch.tensor(rows),
    )


def test_positives_of_all_images_come_first() -> None:
    regions = regions_of([[False, True, False]] * 2, [[0, 0, 0]] * 2)
    chosen = select_positives(regions, masks_of_two(), K)
    assert chosen.is_valid.tolist() == [True, True, False, False, False, False]
    assert chosen.images[:2].tolist() == [0, 1]
    assert chosen.boxes[:2].tolist() == [[1.0, 1.0, 10.0, 10.0], [4.0, 4.0, 13.0, 13.0]]
    assert chosen.labels.max() < K


def test_a_positive_on_an_object_without_a_mask_is_left_out() -> None:
    chosen = select_positives(regions_of([[True, True]], [[1, 0]]), masks_of_two(), K)
    assert chosen.is_valid.tolist() == [True, False]
    assert chosen.object_rows[0] == 0


def mask_regions(is_valid: list[bool]) -> Positives:
    number = len(is_valid)
    return Positives(
        boxes=torch.tensor([[5.0, 7.0, 35.0, 27.0]]).expand(number, 4),
        images=torch.zeros(number, dtype=torch.int64),
        labels=torch.ones(number, dtype=torch.int64),
        object_rows=torch.zeros(number, dtype=torch.int64),
        is_valid=torch.tensor(is_valid),
    )


def test_loss_of_silent_predictions_is_log_two() -> None:
    head = MaskHead("none", 8, K)
    logits = torch.zeros(2, 28, 28)
    logits[1] = 77.0  # an empty slot
    loss = head.losses(logits, mask_regions([True, False]), masks_of_two())["mask"]
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))


def test_loss_of_the_right_mask_is_nearly_zero() -> None:
    logits = torch.full((1, 28, 28), -20.0)
    # 28 points over the ellipse that fills the box: inside the unit circle.
    points = (torch.arange(28) + 0.5) / 14 - 1
    logits[0][points[:, None] ** 2 + points**2 <= 1] = 20.0
    loss = MaskHead("none", 8, K).losses(logits, mask_regions([True]), masks_of_two())["mask"]
    # Points whose center the two grids round differently: at most 2 percent, each costs 20.
    assert loss < 0.4


def test_without_any_object_the_loss_is_zero_and_every_parameter_has_a_gradient() -> None:
    head = MaskHead("none", 8, K)
    masks = pack_masks([], [])
    regions = regions_of([[False] * 40], [[0] * 40])
    chosen = select_positives(regions, masks, K)
    assert chosen.boxes.shape == (8, 4)
    logits = head(torch.randn(8, 8, 14, 14), chosen.labels)
    loss = head.losses(logits, chosen, masks)["mask"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_logits_have_twice_the_pooled_size() -> None:
    logits = MaskHead("gn", 32, K)(torch.randn(2, 32, 14, 14), torch.tensor([0, 2]))
    assert logits.shape == (2, 28, 28)


def test_logits_of_the_own_class_are_those_of_the_whole_convolution() -> None:
    torch.manual_seed(0)
    layer, labels = OwnClass(8, K), torch.tensor([2, 0, 2, 1])
    features = torch.randn(4, 8, 5, 6)
    everything = torch.nn.functional.conv2d(features, layer.weight, layer.bias)
    torch.testing.assert_close(layer(features, labels), everything[torch.arange(4), labels])


def test_all_weights_begin_as_msra_with_biases_of_zero() -> None:
    torch.manual_seed(0)
    head = MaskHead("none", 64, 80)
    # Variance 2 / fan-out; torch counts that of a transposed convolution in its inputs.
    fan_outs = {"convs.0.conv": 64 * 9, "convs.3.conv": 64 * 9, "deconv": 64 * 4, "predictor": 80}
    for name, fan_out in fan_outs.items():
        layer = head.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name
        assert not layer.bias.any(), name
