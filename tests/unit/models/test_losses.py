from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from bigdet.models import losses as losses_module
from bigdet.models.losses import (
    at_least_fp32,
    binary_losses,
    class_losses,
    delta_losses,
    focal_loss_sum,
    giou_losses,
    masked_mean,
)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 0.5, 1.0])
def test_delta_losses_are_square_below_beta_and_linear_above(beta: float) -> None:
    # fvcore's test of smooth L1: 1, 2, 3 against 1.1, 2, 4.5: .5 x .1^2 / beta, 0, 1.5 - .5 beta.
    deltas = torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.1, 2.0, 4.5, 0.0]], dtype=torch.float64)
    square = 0.5 * 0.1**2 / beta if beta else 0.1
    expected = torch.tensor([square + 1.5 - 0.5 * beta], dtype=torch.float64)
    losses = delta_losses(deltas, targets, torch.tensor([True]), beta)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_targets_that_are_no_numbers_spoil_nothing_where_the_mask_is_not_set(beta: float) -> None:
    deltas = torch.ones(2, 4, requires_grad=True)
    targets = torch.tensor([[0.0] * 4, [math.nan, math.inf, -math.inf, math.nan]])
    mask = torch.tensor([True, False])
    masked_mean(delta_losses(deltas, targets, mask, beta), mask, 1).backward()
    assert deltas.grad is not None
    assert deltas.grad.tolist() == [[1.0] * 4, [0.0] * 4]


def test_masked_mean_divides_by_the_count_it_is_given() -> None:
    values, mask = torch.tensor([1.0, 5.0, 100.0]), torch.tensor([True, True, False])
    assert masked_mean(values, mask, 4).item() == 1.5
    assert masked_mean(values, mask, torch.tensor(2)).item() == 3.0


def test_masked_mean_of_nothing_is_zero_with_zero_gradients() -> None:
    values = torch.tensor([1.0, math.nan], requires_grad=True)
    mean = masked_mean(values, torch.tensor([False, False]), torch.tensor(0))
    mean.backward()
    assert mean.item() == 0
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0]


def test_binary_losses_of_a_zero_logit_are_log_two() -> None:
    losses = binary_losses(torch.zeros(2), torch.tensor([True, False]))
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))


def test_class_losses_of_equal_logits_are_the_log_of_the_classes() -> None:
    losses = class_losses(torch.zeros(3, 5), torch.tensor([0, 2, 4]))
    torch.testing.assert_close(losses, torch.full((3,), math.log(5)))


def test_losses_of_bfloat16_predictions_are_single_precision() -> None:
    logits = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert at_least_fp32(logits).dtype == torch.float32
    assert at_least_fp32(logits.double()).dtype == torch.float64
    mask = torch.tensor([True, True])
    assert delta_losses(logits, torch.zeros(2, 4), mask, 0.0).dtype == torch.float32
    assert class_losses(logits, torch.tensor([0, 1])).dtype == torch.float32
    assert binary_losses(logits, logits).dtype == torch.float32


def test_giou_losses_are_worked_out_by_hand() -> None:
    # Shared 1, together 7, hull 9: GIoU 1 / 7 - 2 / 9. Apart by 1 in a hull of 3: -1 / 3. Equal: 1.
    boxes = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 1, 1], [3.0, 4, 5, 9]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 1, 3, 3], [2.0, 0, 3, 1], [3.0, 4, 5, 9]], dtype=torch.float64)
    expected = torch.tensor([1 + 5 / 63, 4 / 3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(giou_losses(boxes, targets), expected, rtol=0, atol=1e-6)


def test_giou_losses_and_gradients_are_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 200, 2, generator=generator) * 40
    sides = torch.rand(2, 200, 2, generator=generator) * 30
    sides[:, ::9] = 0
    boxes, targets = torch.cat([corners, corners + sides], dim=2).requires_grad_().unbind()
    found, expected = giou_losses(boxes, targets), generalized_box_iou_loss(boxes, targets)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), boxes)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), boxes)[0])


@pytest.mark.parametrize(
    ("logit", "of_yes", "of_no"),
    # Alpha 0.25, gamma 2: of yes 0.25 x (1 - p)^2 x -log(p), of no 0.75 x p^2 x -log(1 - p).
    [(-2.0, 0.412520, 0.001353), (0.0, 0.043322, 0.129965), (2.0, 0.000451, 1.237559)],
)
def test_focal_losses_have_the_published_values(logit: float, of_yes: float, of_no: float) -> None:
    # Two classes with the same logit: of a positive row one answer is yes, else both are no.
    logits, label, one = torch.full((1, 2), logit), torch.tensor([1]), torch.ones(1)
    yes = focal_loss_sum(logits, label, torch.tensor([True]), one, 0.25, 2.0)
    no = focal_loss_sum(logits, label, torch.tensor([False]), one, 0.25, 2.0)
    torch.testing.assert_close(yes, torch.tensor(of_yes + of_no), atol=2e-6, rtol=0)
    torch.testing.assert_close(no, torch.tensor(2 * of_no), atol=2e-6, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_loss_equals_torchvisions_in_value_and_gradient_whatever_the_chunks(
    gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 5, (3, 7), generator=generator)
    is_positive = torch.rand(3, 7, generator=generator) < 0.3
    weights = torch.rand(3, 7, generator=generator, dtype=torch.float64).round(decimals=1)
    weights[0, :3] = 0
    one_hot = torch.nn.functional.one_hot(labels, 5) * is_positive[..., None]
    theirs = logits.clone().requires_grad_()
    expected = sigmoid_focal_loss(theirs, one_hot.double(), 0.25, gamma)
    expected = (expected * weights[..., None]).sum()
    (3 * expected).backward()
    for chunk in (2**22, 20):
        monkeypatch.setattr(losses_module, "CPU_CHUNK", chunk)
        ours = logits.clone().requires_grad_()
        total = focal_loss_sum(ours, labels, is_positive, weights, 0.25, gamma)
        (3 * total).backward()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_focal_loss_leaves_rows_of_weight_0_out_whatever_they_hold() -> None:
    logits = torch.tensor([[1.0, math.nan], [0.0, 0.0]], requires_grad=True)
    label, positive = torch.zeros(2, dtype=torch.int64), torch.tensor([False, True])
    total = focal_loss_sum(logits, label, positive, torch.tensor([0.0, 1.0]), 0.25, 2.0)
    total.backward()
    torch.testing.assert_close(total.detach(), torch.tensor(0.043322 + 0.129965), rtol=1e-5, atol=0)
    assert logits.grad[0].tolist() == [0.0, 0.0]


def test_focal_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    label, positive = torch.zeros(50, dtype=torch.int64), torch.arange(50) < 10
    ours = logits.clone().requires_grad_()
    total = focal_loss_sum(ours, label, positive, torch.ones(50), 0.25, 2.0)
    expected = focal_loss_sum(logits.float(), label, positive, torch.ones(50), 0.25, 2.0)
    assert torch.equal(total, expected)
    total.backward()
    assert ours.grad.dtype == torch.bfloat16
