"""DeepSpeed at stages 0, 1 and 2 on 1 and 2 ranks against plain PyTorch in one process."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdet.config.schema import EngineConfig, PhaseConfig
from bigdet.engine.base import EngineState
from bigdet.training.optim import build_optimizer
from tests.spawn import run_ranks

LANES = 4
STEPS = 5
OPTIMIZERS = {
    "sgd": PhaseConfig(steps=100, images_per_gpu=2, lr=0.1, optimizer="sgd", weight_decay=0.05),
    "adamw": PhaseConfig(steps=100, images_per_gpu=2, lr=0.01, optimizer="adamw", weight_decay=0.05),
}


class Toy(nn.Module):
    """Convolution, normalization with a buffer, linear layer; two losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.GroupNorm(1, 5)
        self.frozen = nn.Linear(5, 5)
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]))
        self.frozen.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        shifted = batch["images"] - self.mean.view(1, 3, 1, 1)
        features = self.norm(self.convolution(shifted)).relu().mean((2, 3))
        outputs = self.linear(self.frozen(features))
        loss = (outputs - batch["targets"]).square().mean()
        # Infinite where asked for, through a branch that no gradient takes.
        trap = torch.where(batch["trap"] > 0, torch.log(1 - batch["trap"]), 0.0)
        return {"square": loss * batch["scale"], "size": 0.1 * outputs.abs().mean() + trap}


def make_batch(step: int, lane: int, scale: float = 1.0, trap: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return {
        "images": images.contiguous(memory_format=torch.channels_last),
        "targets": torch.randn(2, 3, generator=generator),
        "scale": torch.tensor(scale),
        "trap": torch.tensor(trap),
    }


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def lr_at(step: int, base: float) -> float:
    return base * (1 + step % 3) / 3


def train_plainly(optimizer: str, clip_norm: float | None) -> tuple[list[float], list[float], Any]:
    module = Toy()
    phase = OPTIMIZERS[optimizer]
    torch_optimizer = build_optimizer(module, phase)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        for group in torch_optimizer.param_groups:
            group["lr"] = lr_at(step, phase.lr)
        totals = torch.stack([sum(module(make_batch(step, k)).values()) for k in range(LANES)])
        totals.mean().backward()
        limit = float("inf") if clip_norm is None else clip_norm
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), limit).item())
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append(totals.mean().item())
    return losses, norms, weights(module)


def make_engine(optimizer: str, stage: int, clip_norm: float | None = None, **settings: Any) -> Any:
    from bigdet import distributed
    from bigdet.engine.deepspeed_engine import DeepSpeedEngine

    config = EngineConfig(
        zero_stage=stage, precision=settings.pop("precision", "fp32"), clip_norm=clip_norm
    )
    make_optimizer = partial(build_optimizer, phase=OPTIMIZERS[optimizer])
    num_micro_batches = LANES // distributed.world_size()
    return DeepSpeedEngine(Toy(), make_optimizer, config, num_micro_batches)


def lanes_of_rank(step: int, **changed: Any) -> list[dict[str, Tensor]]:
    """This rank's lanes; ``changed`` goes to the very last lane, which is the last rank's."""
    from bigdet import distributed

    share = LANES // distributed.world_size()
    lanes = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    return [make_batch(step, k, **(changed if k == LANES - 1 else {})) for k in lanes]


def run_steps(engine: Any, optimizer: str, steps: range) -> tuple[list[float], list[float]]:
    from bigdet import distributed

    losses, norms = [], []
    for step in steps:
        engine.set_lr(lr_at(step, OPTIMIZERS[optimizer].lr))
        result = engine.train_step(lanes_of_rank(step))
        assert result.is_finite
        losses.append(distributed.mean_over_ranks(result.losses["total"]).item())
        norms.append(result.grad_norm)
    return losses, norms


# ---- what the ranks run: several cells per process group, as importing deepspeed takes seconds


def train_all_cells() -> dict[Any, Any]:
    results = {}
    for optimizer, stage, clip_norm in itertools.product(OPTIMIZERS, (0, 1, 2), (None, 0.5)):
        engine = make_engine(optimizer, stage, clip_norm)
        losses, norms = run_steps(engine, optimizer, range(1, STEPS + 1))
        results[optimizer, stage, clip_norm] = losses, norms, weights(engine.module)
        engine.close()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("trained")
    return {size: run_ranks(train_all_cells, size, folder) for size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_equal_plain_pytorch(
    trained: Any, world_size: int, clip_norm: float | None, optimizer: str
) -> None:
    losses, norms, expected = train_plainly(optimizer, clip_norm)
    for stage, rank in itertools.product((0, 1, 2), range(world_size)):
        got_losses, got_norms, got = trained[world_size][rank][optimizer, stage, clip_norm]
        print(optimizer, clip_norm, world_size, stage, max(abs(a-b)/a for a,b in zip(losses, got_losses)),
          max(((got[n]-expected[n]).abs()/(expected[n].abs()+1e-8)).max().item() for n in expected),  max(((got[n]-expected[n]).abs()).max().item() for n in expected))
        torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(got_norms, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
