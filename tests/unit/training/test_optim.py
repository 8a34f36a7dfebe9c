"""Learning rate by step, parameter groups, optimizers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from bigdet.config.ema import EmaConfig
from bigdet.config.phase import PhaseConfig
from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.build import build_backbone
from bigdet.models.backbones.swin import Swin
from bigdet.models.backbones.vit import ViT
from bigdet.models.layer_ids import layer_ids
from bigdet.models.norms import BatchNorm2d
from bigdet.training.optim import (
    build_optimizer,
    describe_ema,
    describe_lr,
    drop_steps,
    ema_decay,
    has_same_past,
    layer_factors,
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


def test_the_decay_of_averages_warms_up() -> None:
    # (1 + n) / (10 + n): 2/11, 3/12, ..., 0.99 = 891/900 at the 890th step.
    short, constant = EmaConfig(decay=0.99), EmaConfig(decay=0.99, warm_up=False)
    assert [ema_decay(short, n) for n in (1, 2, 890, 900)] == [2 / 11, 3 / 12, 891 / 900, 0.99]
    assert [ema_decay(constant, n) for n in (1, 2, 900)] == [0.99, 0.99, 0.99]


def test_layer_decay_and_averages_are_said_in_the_log() -> None:
    decayed = make_phase(lr=0.02, layer_decay=0.7)
    end = "not scaled with the images per step, times 0.7 per layer of the backbone"
    assert describe_lr(decayed, 8).endswith(end)
    assert describe_ema(None) == ""
    both = "average of the weights (EMA 0.9999) and the newest weights evaluated"
    assert both in describe_ema(EmaConfig(evaluate="both"))


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
        "convolution.bias",
        "convolution.weight",
        "linear.bias",
        "linear.weight",
    ]
    assert sorted(names[id(parameter)] for parameter in plain["params"]) == [
        "batch_norm.bias",
        "batch_norm.weight",
        "group_norm.bias",
        "group_norm.weight",
        "layer_norm.bias",
        "layer_norm.weight",
        "relative_position_bias_table",
    ]


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
    decayed = build_optimizer(Parts(OwnNet()), make_phase(layer_decay=0.5))
    assert {group["lr_factor"] for group in decayed.param_groups} == {
        0.5**n for n in (4, 3, 2, 1, 0)
    }
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


class Parts(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 4)


class OwnNet(Backbone):
    """A user's own, which says nothing of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.body = nn.ModuleList(
            [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))]
        )
        self.neck = nn.Linear(1, 1)

    @property
    def stages(self) -> list[list[nn.Module]]:
        return [list(self.stem), [self.body[0]], [self.body[1]], [], []]


def test_layer_decay_of_a_vit_of_four_blocks() -> None:
    factors = layer_factors(Parts(ViT(width=8, depth=4, num_heads=1, drop_path=0.0)), 0.7)
    layers = {".".join(name.split(".")[:3]): factor for name, factor in factors.items()}
    assert layers == pytest.approx(
        {
            "backbone.patch_embed.proj": 0.16807,  # 0.7 ** 5
            "backbone.patch_embed.pos_embed": 0.16807,
            "backbone.blocks.0": 0.2401,
            "backbone.blocks.1": 0.343,
            "backbone.blocks.2": 0.49,
            "backbone.blocks.3": 0.7,
            "backbone.pyramid.0": 1.0,  # new, as neck and heads are
            "backbone.pyramid.1": 1.0,
        }
    )


def test_layer_decay_of_a_swin_of_six_blocks() -> None:
    swin = Swin(embed_dim=4, depths=[2, 2, 1, 1], num_heads=[1, 1, 1, 1], drop_path=0.0)
    factors = layer_factors(Parts(swin), 0.5)
    layers = {".".join(name.split(".")[1:5]): factor for name, factor in factors.items()}
    found = {
        block: {f for name, f in layers.items() if re.match(block, name)}
        for block in [
            "patch_embed",
            *(r"layers.0.blocks.0", r"layers.0.blocks.1"),
            *(r"layers.1.(downsample|blocks.0)", r"layers.1.blocks.1"),
            *(r"layers.2.(downsample|blocks)", r"layers.3.(downsample|blocks)"),
            "norm[0-3]",
        ]
    }
    assert list(found.values()) == [{0.5**n} for n in (7, 6, 5, 4, 3, 2, 1, 0)]
    assert all(any(re.match(block, name) for block in found) for name in layers)


def test_layers_of_published_backbones_are_counted() -> None:
    depths = {"vit_b": 12, "swin_s": 24, "swinv2_t": 12, "convnext_s": 36, "resnet50": 16}
    with torch.device("meta"):
        numbers = {name: layer_ids(build_backbone(name, "bn", 0.0)) for name in depths}
    assert {name: last - 1 for name, (_, last) in numbers.items()} == depths
    resnet, _ = numbers["resnet50"]
    # The stem, then blocks 3, 4, 6, 3.
    assert [resnet[f"layer{n}.0.conv1.weight"] for n in (1, 2, 3, 4)] == [1, 4, 8, 14]
    assert resnet["conv1.weight"] == resnet["bn1.bias"] == 0
    convnext, _ = numbers["convnext_s"]
    assert convnext["layers.2.downsample.1.weight"] == convnext["layers.2.blocks.0.gamma"] == 7


def test_layers_of_an_own_backbone_are_the_modules_of_its_stages() -> None:
    ids, last = layer_ids(OwnNet())
    numbers = {name.removesuffix(".weight"): n for name, n in ids.items() if "weight" in name}
    assert numbers == {
        "stem.0": 0, "stem.1": 0, "body.0": 1, "body.1.0": 2, "body.1.2": 3, "neck": 4,
    }  # fmt: skip
    assert last == 4


def test_layer_decay_makes_few_groups_and_leaves_decay_as_it_is() -> None:
    module = Parts(ViT(width=8, depth=4, num_heads=1, drop_path=0.0))
    decayed = {
        id(p)
        for group in parameter_groups(module, 0.1)
        for p in group["params"]
        if group["weight_decay"]
    }
    groups = parameter_groups(module, 0.1, layer_decay=0.7)
    assert len(groups) == 12  # (4 + 2) x 2, all of them in use
    factors = {group["lr_factor"] for group in groups}
    assert len(factors) == 6
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.1)
        assert {id(p) in decayed for p in group["params"]} == {group["weight_decay"] > 0}
    in_groups = [p for group in groups for p in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in module.parameters()}
    assert len(in_groups) == len(list(module.parameters()))
    module.backbone.patch_embed.requires_grad_(False)
    assert len(parameter_groups(module, 0.1, layer_decay=0.7)) == 10


def test_biases_without_decay_are_those_of_swin_v2_too() -> None:
    with torch.device("meta"):
        module = build_backbone("swinv2_t", "none", 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, _ = parameter_groups(module, 0.05, decay_biases=False)
    assert not [names[id(p)] for p in decayed["params"] if names[id(p)].endswith("bias")]
