"""Under ZeRO-3 weights are gathered when they are needed, and not all at once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

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
