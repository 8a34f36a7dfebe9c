"""Under ZeRO-3 weights are gathered when they are needed, and not all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from tests.ranks.toy import ENGINES
from tests.spawn import run_ranks

LAYERS, WIDTH = 12, 64


class Deep(nn.Module):
    """Linear layers one after the other; notes how many of all weights are there at each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.gathered: list[int] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
            self._note()
            x.register_hook(lambda _: self._note())
        return {"mean": x.mean()}

    def _note(self) -> None:
        self.gathered.append(sum(parameter.numel() for parameter in self.parameters()))


def most_gathered() -> list[int]:
    """Train a few steps; in each, the most weights that were gathered at one time."""
    from bigdet.engine import deepspeed_engine  # takes seconds

    deepspeed_engine.WHOLE_ELEMENTS = 10
    module, found = Deep(), []
    engine = deepspeed_engine.DeepSpeedEngine(
        module,
        lambda module: SGD(module.parameters(), lr=0.1),
        EngineConfig(**ENGINES["zero3"], precision="fp32"),
        1,
        torch.device("cpu"),
    )
    for _ in range(3):
        module.gathered.clear()
        engine.train_step([torch.ones(1, WIDTH)])
        found.append(max(module.gathered))
        assert len(module.gathered) == 2 * LAYERS
    return found


def test_few_of_the_weights_are_gathered_at_a_time(tmp_path: Path) -> None:
    one = WIDTH * WIDTH
    for found in run_ranks(most_gathered, 2, tmp_path):
        # The first step knows no order yet. Then: the layer, and others, ahead or kept for soon.
        assert found[0] <= 2 * one
        assert one < max(found[1:]) <= 4 * one


class Mixed(nn.Module):
    """A large layer, a normalization, and a weight that is used without a call of its layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())
        self.lender = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"square": F.linear(x, self.lender.weight).square().mean()}


def train_mixed() -> dict[str, Any]:
    """Two steps, one that is skipped, an evaluation, and one more step, by stages 2 and 3."""
    from bigdet.engine import deepspeed_engine

    deepspeed_engine.WHOLE_ELEMENTS = WIDTH
    found = {}
    for name in ("zero2", "zero3"):
        module = Mixed()
        engine = deepspeed_engine.DeepSpeedEngine(
            module,
            lambda module: SGD(module.parameters(), lr=0.1),
            EngineConfig(**ENGINES[name], precision="fp32"),
            1,
            torch.device("cpu"),
        )
        losses = []
        for number in (1.0, 2.0, torch.nan, 3.0):
            generator = torch.Generator().manual_seed(distributed.rank())
            inputs = number * torch.randn(4, WIDTH, generator=generator)
            result = engine.train_step([inputs])
            assert result.is_finite == (number == number)
            with torch.no_grad():
                losses += [
                    result.losses["square"].item(),
                    module(torch.ones(4, WIDTH))["square"].item(),
                ]
        hooked = [part for part, layer in module.named_modules() if layer._forward_pre_hooks]
        found[name] = hooked, losses
        engine.close()
    return found


def test_only_layers_with_something_to_gather_have_hooks_and_steps_stay_the_same(
    tmp_path: Path,
) -> None:
    for found in run_ranks(train_mixed, 2, tmp_path):
        assert found["zero2"][0] == []
        assert found["zero3"][0] == ["", "body.0", "lender"]
        assert found["zero3"][1] == pytest.approx(found["zero2"][1], rel=1e-6, nan_ok=True)
