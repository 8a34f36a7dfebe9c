"""Learning rate by step, parameter groups, optimizers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from bigdet.config.phase import PhaseConfig
from bigdet.models.backbones import build_backbone
from bigdet.models.norms import BatchNorm2d
from bigdet.training.optim import (
    build_optimizer,
    describe_lr,
    drop_steps,
    has_same_past,
    lr_factor,
    parameter_groups,
    scaled_lr,
)


def make_phase(**options: Any) -> PhaseConfig:
    return PhaseConfig(**{"steps": 30, "images_per_gpu": 2, "lr": 5.0, **options})


def test_warm_up_and_drops_equal_detectron2() -> None:
    # d2 tests/test_scheduler.py: lr 5, factor 0.001, 5 steps of warm-up, drops at 10, 15, 20.
    phase = make_phase(warmup_steps=5, warmup_factor=0.001, drops=[10, 15, 20])
    rates = [phase.lr * lr_factor(phase, step) for step in range(1, 31)]
    assert rates[:5] == pytest.approx([0.005, 1.004, 2.003, 3.002, 4.001])
    assert rates[5:10] == pytest.approx([5.0] * 5)
    assert rates[10:15] == pytest.approx([0.5] * 5)
    assert rates[15:20] == pytest.approx([0.05] * 5)
    assert rates[20:] == pytest.approx([0.005] * 10)


def test_constant_schedule_has_a_warm_up_and_no_drops() -> None:
    phase = make_phase(schedule="constant", warmup_steps=2, warmup_factor=0.5, drops=[3])
    assert [lr_factor(phase, step) for step in (1, 2, 3, 4, 30)] == [0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert lr_factor(make_phase(warmup_steps=0), 1) == 1.0


def test_drops_are_by_default_after_8_and_11_of_12_passes() -> None:
    assert drop_steps(make_phase(steps=12)) == [8, 11]
    assert drop_steps(make_phase(steps=88_000)) == [58_667, 80_667]
    phase = make_phase(steps=12, warmup_steps=0, decay_factor=0.02)
    factors = [lr_factor(phase, step) for step in (8, 9, 11, 12)]
    assert factors == pytest.approx([1.0, 0.02, 0.02, 0.0004])


def test_drops_in_the_warm_up_multiply_with_it() -> None:
    phase = make_phase(warmup_steps=4, warmup_factor=0.0, drops=[2])
    # 3 finished steps: 3/4 of the warm-up, one drop.
    assert lr_factor(phase, 4) == pytest.approx(0.075)


def test_drops_may_be_counted_from_the_end() -> None:
    # Paper 1: the last 60k and the last 20k steps, here of 540k (6x).
    phase = make_phase(steps=540_000, drops=[-60_000, -20_000])
    assert drop_steps(phase) == [480_000, 520_000]


def test_cosine_goes_from_the_full_rate_after_the_warm_up_to_nearly_0() -> None:
    phase = make_phase(steps=12, schedule="cosine", warmup_steps=2, warmup_factor=0.5)
    # 10 steps after the warm-up: (1 + cos(pi k / 10)) / 2 for k = 0, 5, 9
    assert lr_factor(phase, 1) == 0.5
    assert lr_factor(phase, 2) == 0.75
    assert lr_factor(phase, 3) == 1.0
    assert lr_factor(phase, 8) == pytest.approx(0.5)
    assert lr_factor(phase, 12) == pytest.approx(0.0244717, rel=1e-5)


def test_schedules_are_compared_up_to_a_step() -> None:
    phase = make_phase(warmup_steps=5, drops=[20])
    assert has_same_past(phase, make_phase(steps=90, warmup_steps=5, drops=[20, 25]), 25)
    assert not has_same_past(phase, make_phase(steps=90, warmup_steps=5, drops=[20, 25]), 26)
    assert not has_same_past(phase, make_phase(warmup_steps=6, drops=[20]), 3)


def test_linear_scaling_rule_follows_the_images_per_step() -> None:
    # Paper 2: 0.02 at 16 images gives 0.08 at 64.
    phase = make_phase(lr=0.02, reference_images_per_step=16)
    assert scaled_lr(phase, 64) == pytest.approx(0.08)
    assert scaled_lr(make_phase(lr=0.02), 64) == 0.02
    assert describe_lr(phase, 64) == "lr 0.02 at 16 images per step -> 0.08 at 64"
    assert describe_lr(phase, 8) == "lr 0.02 at 16 images per step -> 0.01 at 8"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.batch_norm = BatchNorm2d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 2)


def test_norms_and_position_tables_are_not_decayed_and_biases_are() -> None:
    module = Layers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, plain = parameter_groups(module, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert sorted(names[id(parameter)] for parameter in decayed["params"]) == [
        "convolution.bias", "convolution.weight", "linear.bias", "linear.weight",
    ]  # fmt: skip
    assert sorted(names[id(parameter)] for parameter in plain["params"]) == [
        "batch_norm.bias", "batch_norm.weight", "group_norm.bias", "group_norm.weight",
        "layer_norm.bias", "layer_norm.weight", "relative_position_bias_table",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("swinv2_t", {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"}),
        ("convnext_t", {"gamma"}),
        ("vit_s", {"pos_embed"}),
    ],
)
def test_scales_and_positions_of_transformers_are_not_decayed(
    backbone: str, expected: set[str]
) -> None:
    with torch.device("meta"):
        module = build_backbone(backbone, "none", 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    _, plain = parameter_groups(module, 0.05)
    assert isinstance(plain["params"], list)
    found = {names[id(parameter)] for parameter in plain["params"]}
    is_norm = re.compile(r"norm\d?\.|stem\.1\.|downsample\.0\.|pyramid\.0\.1\.")
    endings = {name for name in found if not is_norm.search(name)}
    assert all(name.endswith(tuple(expected)) for name in endings)
    assert all(any(name.endswith(ending) for name in endings) for ending in expected)


def test_empty_groups_are_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2), 0.1)
    assert group["weight_decay"] == 0.1
    assert parameter_groups(nn.ReLU(), 0.1) == []


def test_optimizer_has_the_settings_of_the_phase() -> None:
    sgd = build_optimizer(Layers(), make_phase(momentum=0.8, weight_decay=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert [(g["momentum"], g["weight_decay"]) for g in sgd.param_groups] == [(0.8, 0.3), (0.8, 0)]
    adamw = build_optimizer(Layers(), make_phase(optimizer="adamw", betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)


def test_norms_are_decayed_and_biases_go_their_own_way_where_asked_for() -> None:
    module = Layers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def groups(**options) -> list[tuple[float, float, set[str]]]:
        return [
            (group["weight_decay"], group["lr_factor"], {names[id(p)] for p in group["params"]})
            for group in parameter_groups(module, 0.1, **options)
        ]

    weights = {"convolution.weight", "linear.weight"}
    biases = {"convolution.bias", "linear.bias"}
    norms = {f"{kind}_norm.{name}" for kind in ("batch", "group") for name in ("weight", "bias")}
    never = {"layer_norm.weight", "layer_norm.bias", "relative_position_bias_table"}
    assert groups(decay_norms=True) == [(0.1, 1.0, weights | biases | norms), (0.0, 1.0, never)]
    assert groups(decay_biases=False) == [(0.1, 1.0, weights), (0.0, 1.0, biases | norms | never)]
    # Detectron: biases at twice the rate, without decay; GN without decay, at the rate of all.
    detectron = groups(decay_biases=False, bias_lr_factor=2.0)
    assert detectron == [(0.1, 1.0, weights), (0.0, 1.0, norms | never), (0.0, 2.0, biases)]


def test_a_step_moves_biases_at_their_own_rate() -> None:
    # SGD without momentum, gradients 1, rate 0.1: weights by 0.1 x (1 + decay x 1), biases by 0.2.
    module = nn.Linear(2, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    phase = make_phase(momentum=0.0, weight_decay=0.5, decay_biases=False, bias_lr_factor=2.0)
    optimizer = build_optimizer(module, phase)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_factor"]  # as the engines do
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight, torch.full((2, 2), 0.85))
    torch.testing.assert_close(module.bias, torch.full((2,), 0.8))
