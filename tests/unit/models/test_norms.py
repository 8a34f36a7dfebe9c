import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bigdet.models.norms import (
    BatchNorm2d,
    batch_norms,
    conv_norm,
    count_lane,
    discard_statistics,
    make_norm,
    set_norm_mode,
    update_running_statistics,
    valid_rows,
)


def constant_columns(*values):
    """One channel, one image, one row: the values."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def ours_and_torchs(num_channels):
    ours, theirs = BatchNorm2d(num_channels).double(), nn.BatchNorm2d(num_channels).double()
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2.0)
        theirs.bias.normal_()
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(0.5, 2.0)
    ours.load_state_dict(theirs.state_dict())  # its num_batches_tracked is dropped
    return ours, theirs


def gradients(norm, x, *, parameters=True):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos())
    return [y.detach(), x.grad, *([norm.weight.grad, norm.bias.grad] if parameters else [])]


def test_live_batch_norm_equals_torchs_in_outputs_and_gradients():
    torch.manual_seed(0)
    ours, theirs = ours_and_torchs(5)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    for mine, reference in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["affine", "fixed"])
def test_batch_norm_with_running_statistics_equals_torchs_in_evaluation(mode):
    torch.manual_seed(0)
    ours, theirs = ours_and_torchs(5)
    set_norm_mode(ours, mode)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    trained = mode == "affine"
    expected = gradients(theirs.eval(), x, parameters=trained)
    for mine, reference in zip(gradients(ours, x, parameters=trained), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    assert (ours.weight.grad is None) == (mode == "fixed")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_live_batch_norm_uses_running_statistics_in_evaluation():
    ours, theirs = ours_and_torchs(5)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_running_statistics_move_once_by_the_mean_over_the_micro_batches():
    norm = BatchNorm2d(1).double()
    norm(constant_columns(1.0, 3.0))  # mean 2, unbiased variance 1 + 1 = 2
    count_lane(norm)
    norm(constant_columns(2.0, 8.0))  # mean 5, unbiased variance 9 + 9 = 18
    count_lane(norm)
    assert norm.running_mean.item() == 0.0  # not before the step is over
    update_running_statistics(norm)
    # Means over the lanes: 3.5 and 10; running 0.9 x (0, 1) + 0.1 x (3.5, 10).
    assert norm.running_mean.item() == pytest.approx(0.35, rel=1e-12)
    assert norm.running_var.item() == pytest.approx(1.9, rel=1e-12)
    norm(constant_columns(0.0, 2.0))  # mean 1, variance 2: a new step forgets the old lanes
    count_lane(norm)
    update_running_statistics(norm)
    assert norm.running_mean.item() == pytest.approx(0.9 * 0.35 + 0.1, rel=1e-12)
    assert norm.running_var.item() == pytest.approx(0.9 * 1.9 + 0.2, rel=1e-12)


def test_running_statistics_stay_as_long_as_no_lane_is_counted():
    norm = BatchNorm2d(1).double()
    norm(constant_columns(1.0, 3.0))
    update_running_statistics(norm)
    assert norm.running_mean.item() == 0.0
    assert norm.running_var.item() == 1.0


@pytest.mark.parametrize("mode", ["live", "sync"])
def test_rows_that_are_not_valid_do_not_count(mode):
    torch.manual_seed(0)
    ours, theirs = ours_and_torchs(3)
    set_norm_mode(ours, mode)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    rows = torch.tensor([True, False, True, True, False, True])
    grad = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    grad[~rows] = 0  # what is masked out of a loss
    mine, valid = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
    with valid_rows(ours, rows):
        y = ours(mine)
    y.backward(grad)
    theirs.momentum = 1.0
    expected = theirs(valid)
    expected.backward(grad[rows])
    torch.testing.assert_close(y[rows], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad[rows], valid.grad, rtol=1e-10, atol=1e-12)
    assert not mine.grad[~rows].any()
    assert y.isfinite().all()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)
    torch.testing.assert_close(ours.batch_mean, theirs.running_mean)
    torch.testing.assert_close(ours.batch_var, theirs.running_var)


def test_a_lane_without_valid_rows_is_left_out_of_the_running_statistics():
    norm = BatchNorm2d(1).double()
    values = torch.tensor([1.0, 3.0, 50.0], dtype=torch.float64).view(3, 1, 1, 1)
    for rows in ([False, False, False], [True, True, False], [False, False, False]):
        with valid_rows(norm, torch.tensor(rows)):
            y = norm(values)
        count_lane(norm)
        if not any(rows):  # statistics of nothing: mean 0, deviation 1
            torch.testing.assert_close(y, values, rtol=1e-4, atol=0)
    update_running_statistics(norm)
    assert norm.running_mean.item() == pytest.approx(0.2, rel=1e-12)  # 0.1 x mean 2
    assert norm.running_var.item() == pytest.approx(0.9 + 0.2, rel=1e-12)  # unbiased 2
    with valid_rows(norm, torch.tensor([False, False, False])):
        norm(values)
    count_lane(norm)
    update_running_statistics(norm)
    assert norm.running_mean.item() == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_repeated_by_checkpointing_is_counted_once(use_reentrant):
    norm = BatchNorm2d(1).double()
    x = constant_columns(1.0, 3.0).requires_grad_()
    y = constant_columns(2.0, 8.0).requires_grad_()
    for values in (x, y):
        out = checkpoint(norm, values, use_reentrant=use_reentrant)
        count_lane(norm)
        out.square().sum().backward()
    update_running_statistics(norm)
    assert norm.running_mean.item() == pytest.approx(0.35, rel=1e-12)
    assert norm.running_var.item() == pytest.approx(1.9, rel=1e-12)


def test_statistics_of_a_skipped_step_are_forgotten_even_if_not_finite():
    norm = BatchNorm2d(1).double()
    norm(constant_columns(math.inf, 3.0))
    count_lane(norm)
    discard_statistics(norm)
    update_running_statistics(norm)
    assert norm.running_mean.item() == 0.0
    norm(constant_columns(1.0, 3.0))
    count_lane(norm)
    update_running_statistics(norm)
    assert norm.running_mean.item() == pytest.approx(0.2, rel=1e-12)


def test_fixed_and_affine_layers_keep_their_running_statistics():
    for mode in ("affine", "fixed"):
        norm = BatchNorm2d(1).double()
        set_norm_mode(norm, mode)
        norm(constant_columns(1.0, 3.0))
        count_lane(norm)
        update_running_statistics(norm)
        assert norm.running_mean.item() == 0.0


@pytest.mark.parametrize("mode", ["live", "rows", "affine", "fixed"])
def test_bf16_inputs_are_normalized_in_fp32_and_stay_bf16(mode):
    torch.manual_seed(0)
    norm, reference = BatchNorm2d(4), nn.BatchNorm2d(4).double()
    rows = torch.ones(2, dtype=torch.bool) if mode == "rows" else None
    mode = "live" if mode == "rows" else mode
    set_norm_mode(norm, mode)
    reference.train(mode == "live")
    reference.momentum = 1.0
    # A mean of 100 deviations: sums in bf16 would lose the variance.
    x = (torch.randn(2, 4, 32, 32) + 100).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), valid_rows(norm, rows):
        y = norm(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    expected = reference(x.detach().double())
    # bf16 keeps 8 bits, so the result is exact to half of 2^-8 of its size.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-10)
    if mode == "live":
        assert norm.batch_mean.dtype == torch.float32
        torch.testing.assert_close(
            norm.batch_mean.double(), reference.running_mean, rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            norm.batch_var.double(), reference.running_var, rtol=1e-4, atol=0
        )


def test_a_fixed_layer_keeps_nothing_of_the_size_of_its_input_for_backward():
    sizes = []
    norm = BatchNorm2d(4)
    set_norm_mode(norm, "fixed")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        norm(x)
    assert max(sizes) <= 4


@pytest.mark.parametrize("mode", ["affine", "fixed"])
def test_an_empty_batch_passes(mode):
    norm = BatchNorm2d(4)
    set_norm_mode(norm, mode)
    x = torch.zeros(0, 4, 7, 7, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == (0, 4, 7, 7)


def test_memory_format_is_kept():
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    for mode in ("live", "affine", "fixed"):
        norm = BatchNorm2d(4)
        set_norm_mode(norm, mode)
        assert norm(x).is_contiguous(memory_format=torch.channels_last)
    norm = BatchNorm2d(4)
    with valid_rows(norm, torch.tensor([True, False])):
        assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_state_has_the_names_of_torchs_without_its_counter():
    names = set(nn.BatchNorm2d(4).state_dict()) - {"num_batches_tracked"}
    assert set(BatchNorm2d(4).state_dict()) == names


def test_set_norm_mode_reaches_every_layer_and_its_gradients():
    model = nn.Sequential(conv_norm(3, 8, 3, "bn"), nn.Sequential(BatchNorm2d(8)))
    for mode in ("fixed", "affine", "sync", "live"):
        set_norm_mode(model, mode)
        assert [layer.mode for layer in batch_norms(model)] == [mode, mode]
        for layer in batch_norms(model):
            assert layer.weight.requires_grad == layer.bias.requires_grad == (mode != "fixed")
        assert model[0].conv.weight.requires_grad


def test_all_layers_are_updated_but_those_that_are_fixed():
    live, fixed = BatchNorm2d(1).double(), BatchNorm2d(1).double()
    fixed.mode = "fixed"
    model = nn.ModuleList([fixed, live])
    for layer in model:
        layer(constant_columns(1.0, 3.0))
    count_lane(model)
    update_running_statistics(model)
    assert live.running_mean.item() == pytest.approx(0.2, rel=1e-12)
    assert fixed.running_mean.item() == 0.0


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (20, 4), (7, 1)])
def test_group_norm_has_32_groups_or_what_divides_the_channels(channels, groups):
    norm = make_norm("gn", channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-5)


def test_conv_norm_has_a_bias_exactly_where_no_norm_follows():
    assert [name for name, _ in conv_norm(3, 8, 3, "none", relu=True).named_parameters()] == [
        "conv.weight",
        "conv.bias",
    ]
    for norm in ("bn", "gn"):
        assert [name for name, _ in conv_norm(3, 8, 1, norm).named_parameters()] == [
            "conv.weight",
            "norm.weight",
            "norm.bias",
        ]


def test_conv_norm_keeps_the_size_and_starts_with_msra_weights():
    torch.manual_seed(0)
    layer = conv_norm(64, 128, 3, "none")
    assert layer(torch.zeros(1, 64, 5, 7)).shape == (1, 128, 5, 7)
    # Deviation sqrt(2 / fan-out), fan-out = 128 x 9; 73,728 draws give it to 0.3%.
    assert layer.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert not layer.conv.bias.any()
