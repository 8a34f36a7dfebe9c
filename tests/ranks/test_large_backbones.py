"""Layer decay, averages and activation checkpointing together, under sharded engines."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.models.backbone_base import Backbone
from bigdet.training.optim import parameter_groups
from tests.ranks import large_backbones
from tests.ranks.toy import ENGINES, whole_state
from tests.spawn import run_ranks

LR = 0.5
NAMES = ("zero0", "zero1", "zero3", "fsdp")
TINY_VIT = "tests.ranks.large_backbones:tiny_vit"


def test_a_vit_killed_under_one_sharded_engine_goes_on_under_another(tmp_path: Path) -> None:
    report = large_backbones.compare(TINY_VIT, 64, tmp_path)
    alone = report.pop("alone")
    assert alone["groups"] == (4 + 2) * 2
    for sharded in report.values():
        assert alone["bytes"] / 2 <= sharded["bytes"] < 0.52 * alone["bytes"]


class Layers(Backbone):
    """Four layers without bias that all see the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    @property
    def stages(self) -> list[list[nn.Module]]:
        return [[self.layers[0]], [self.layers[1]], [self.layers[2], self.layers[3]], [], []]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


class Sum(nn.Module):
    """Its loss is the sum of all outputs, so that the gradient of every weight is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Layers()
        self.head = nn.Linear(4, 4, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def units(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.backbone.layers]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.backbone(x).sum(), "head": self.head(x).sum()}


def step_once() -> dict[str, dict[str, Tensor]]:
    """Weights after a step of each engine; rank 0 has an input of ones, rank 1 of twos."""
    from bigdet.engine.build import build_engine  # takes seconds

    results = {}
    for name in NAMES:
        module = Sum()
        engine = build_engine(
            module,
            lambda module: SGD(parameter_groups(module, 0.0, layer_decay=0.5), lr=99.0),
            EngineConfig(**ENGINES[name], precision="fp32"),
            1,
            torch.device("cpu"),
            module.units,
        )
        engine.set_lr(LR)
        engine.train_step([torch.full((1, 4), 1.0 + distributed.rank())])
        results[name] = whole_state(engine).model
        engine.close()
    return results


def test_the_rate_of_each_layer_reaches_the_optimizer_of_every_engine(tmp_path: Path) -> None:
    main, _ = run_ranks(step_once, 2, tmp_path)
    assert set(main) == set(NAMES)
    for weights in main.values():
        # SGD from 0 by rate x mean gradient, 0.5 x 1.5; halved for each layer before the head.
        moved = {name: set(value.flatten().tolist()) for name, value in weights.items()}
        assert moved == {
            "backbone.layers.0.weight": {-0.046875},
            "backbone.layers.1.weight": {-0.09375},
            "backbone.layers.2.weight": {-0.1875},
            "backbone.layers.3.weight": {-0.375},
            "head.weight": {-0.75},
        }
