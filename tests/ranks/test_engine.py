"""DeepSpeed at stages 0, 1 and 2 on 1 and 2 ranks against plain PyTorch in one process."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from bigdet import distributed
from bigdet.config.schema import EngineConfig, PhaseConfig, Precision
from bigdet.engine import checkpoint
from bigdet.engine.base import EngineState
from bigdet.training.optim import build_optimizer
from tests.spawn import run_ranks

if TYPE_CHECKING:
    from bigdet.engine.deepspeed_engine import DeepSpeedEngine

LANES = 4
STEPS = 5
SAVED_AT = 3
STAGES = (0, 1, 2)
CLIP_NORMS = (None, 0.5)  # the gradient norms below lie on both sides of it
TROUBLES = ("nan loss", "infinite loss without a gradient", "nan gradient of a finite loss")
# Means over 2 to 4 lanes are summed in another order than in one process: each sum of n fp32
# numbers is off by up to n x 6e-8 of its terms, times cancellation; 5 steps add up.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
OPTIMIZERS = {
    "sgd": PhaseConfig(steps=100, images_per_gpu=2, lr=0.1, optimizer="sgd", weight_decay=0.05),
    "adamw": PhaseConfig(
        steps=100, images_per_gpu=2, lr=0.01, optimizer="adamw", weight_decay=0.05
    ),
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

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        shifted = batch["images"] - self.mean.view(1, 3, 1, 1)
        features = self.norm(self.convolution(shifted)).relu().mean((2, 3))
        outputs = self.linear(self.frozen(features))
        square = (outputs - batch["targets"]).square().mean()
        size = 0.1 * outputs.abs().mean()
        trouble = batch.get("trouble")
        if trouble == "nan loss":
            square = square * torch.nan
        elif trouble == "infinite loss without a gradient":
            size = size + torch.tensor(torch.inf)
        elif trouble == "nan gradient of a finite loss":
            size = size + (outputs * 0).square().sum().sqrt()  # d sqrt(0) is inf, times 0
        return {"square": square, "size": size}


def make_batch(step: int, lane: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return {
        "images": images.contiguous(memory_format=torch.channels_last),
        "targets": torch.randn(2, 3, generator=generator),
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


def make_engine(
    optimizer: str, stage: int, clip_norm: float | None = None, precision: Precision = "fp32"
) -> DeepSpeedEngine:
    from bigdet.engine.deepspeed_engine import DeepSpeedEngine  # takes seconds: in the ranks only

    config = EngineConfig(zero_stage=stage, precision=precision, clip_norm=clip_norm)
    make_optimizer = partial(build_optimizer, phase=OPTIMIZERS[optimizer])
    num_micro_batches = LANES // distributed.world_size()
    device = distributed.device()
    return DeepSpeedEngine(Toy(), make_optimizer, config, num_micro_batches, device)


def lanes_of_rank(step: int, **changed: str) -> list[dict[str, Any]]:
    """This rank's lanes; ``changed`` goes into the very last lane, which is the last rank's."""
    share = LANES // distributed.world_size()
    lanes = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    return [make_batch(step, k) | (changed if k == LANES - 1 else {}) for k in lanes]


def run_steps(
    engine: DeepSpeedEngine, optimizer: str, steps: Iterable[int]
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        engine.set_lr(lr_at(step, OPTIMIZERS[optimizer].lr))
        result = engine.train_step(lanes_of_rank(step))
        assert result.is_finite
        losses.append(distributed.mean_over_ranks(result.losses["total"]).item())
        norms.append(result.grad_norm)
    return losses, norms


# ---- What the ranks run: all cells in one process group, as importing deepspeed takes seconds.


def run_cells(folder: Path) -> dict[str, Any]:
    warnings.simplefilter("error")
    make_engine("adamw", 2).close()  # DeepSpeed imports more of itself with the first engine
    gc.freeze()  # what is imported by now need not be searched each time an engine is closed
    results = {
        "trained": train_all(),
        "skipped": skip_all(),
        "resumed": resume_all(folder),
        "bf16": train_in_bf16(),
        "misfits": load_misfits(),
    }
    gc.unfreeze()
    return results


def train_all() -> dict[Any, Any]:
    results = {}
    for optimizer, stage, clip_norm in itertools.product(OPTIMIZERS, STAGES, CLIP_NORMS):
        engine = make_engine(optimizer, stage, clip_norm)
        losses, norms = run_steps(engine, optimizer, range(1, STEPS + 1))
        results[optimizer, stage, clip_norm] = losses, norms, weights(engine.module)
        inner = weakref.ref(engine._engine.optimizer if stage else engine._engine)
        engine.close()
        assert inner() is None, "memory of a closed engine is held"
    return results


def skip_all() -> dict[Any, Any]:
    """Per cell, whether each troubled step was skipped and changed nothing."""
    results = {}
    for optimizer, stage in itertools.product(OPTIMIZERS, STAGES):
        engine = make_engine(optimizer, stage)
        run_steps(engine, optimizer, range(1, SAVED_AT + 1))
        for trouble in TROUBLES:
            before, weights_before = engine.state(), weights(engine.module)
            result = engine.train_step(lanes_of_rank(99, trouble=trouble))
            torch.testing.assert_close(weights(engine.module), weights_before, rtol=0, atol=0)
            torch.testing.assert_close(vars(engine.state()), vars(before), rtol=0, atol=0)
            results[optimizer, stage, trouble] = result.is_finite, result.grad_norm
        run_steps(engine, optimizer, range(SAVED_AT + 1, STEPS + 1))
        results[optimizer, stage] = weights(engine.module)
        engine.close()
    return results


def resume_all(folder: Path) -> dict[Any, Any]:
    """Weights at the end of runs that were saved at step 3 and loaded by another engine."""
    results = {}
    for optimizer, stage in itertools.product(OPTIMIZERS, STAGES):
        engine = make_engine(optimizer, stage)
        run_steps(engine, optimizer, range(1, SAVED_AT + 1))
        state = engine.state()
        engine.close()
        results[optimizer, stage] = finish(state, optimizer, stage)
        name = f"{optimizer}-{distributed.world_size()}-{stage}"
        checkpoint.save(folder / name, state, {"format": "test"}, {"step": SAVED_AT})
    return results


def finish(state: EngineState, optimizer: str, stage: int) -> dict[str, Tensor]:
    """Go on from a state to the last step with a new engine, which first gives it back."""
    engine = make_engine(optimizer, stage)
    with torch.no_grad():  # a rank may start from anything: the state comes from rank 0
        engine.module.linear.weight.add_(distributed.rank())
    engine.load_state(state if distributed.is_main() else EngineState())
    torch.testing.assert_close(vars(engine.state()), vars(state), rtol=0, atol=0)
    run_steps(engine, optimizer, range(SAVED_AT + 1, STEPS + 1))
    result = weights(engine.module)
    engine.close()
    return result


def finish_from(folder: Path, stage: int, saved_stage: int, saved_ranks: int) -> dict[str, Any]:
    results = {}
    for optimizer in OPTIMIZERS:
        saved = checkpoint.load(folder / f"{optimizer}-{saved_ranks}-{saved_stage}")
        assert saved.run == {"step": SAVED_AT}
        results[optimizer] = finish(saved.engine, optimizer, stage)
    return results


def train_in_bf16() -> dict[int, Any]:
    results = {}
    for stage in STAGES:
        engine = make_engine("sgd", stage, precision="bf16")
        losses, _ = run_steps(engine, "sgd", range(1, STEPS + 1))
        skipped = engine.train_step(lanes_of_rank(99, trouble=TROUBLES[0]))
        results[stage] = losses, skipped.is_finite, weights(engine.module)
        engine.close()
    return results


def load_misfits() -> list[str]:
    engine = make_engine("sgd", 2)
    run_steps(engine, "sgd", [1])
    state = engine.state()
    engine.close()
    other = EngineState({name: v for name, v in state.model.items() if name != "mean"})
    messages = []
    for optimizer, unfit in (("adamw", state), ("sgd", other)):
        engine = make_engine(optimizer, 2)
        with pytest.raises(ValueError, match="does not fit") as caught:
            engine.load_state(unfit)
        messages.append(str(caught.value))
        engine.close()
    return messages


# ---- The tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each rank saw."""
    return {size: run_ranks(run_cells, size, folder, folder) for size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_equal_plain_pytorch(
    cells: Any, world_size: int, clip_norm: float | None, optimizer: str
) -> None:
    losses, norms, expected = train_plainly(optimizer, clip_norm)
    assert min(norms) < 0.5 < max(norms), "clipping is not tested"
    for stage, rank in itertools.product(STAGES, range(world_size)):
        trained = cells[world_size][rank]["trained"]
        got_losses, got_norms, got = trained[optimizer, stage, clip_norm]
        torch.testing.assert_close(got_losses, losses, **CLOSE)
        torch.testing.assert_close(got_norms, norms, **CLOSE)
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_trouble_on_one_rank_skips_the_step_on_all_and_changes_nothing(
    cells: Any, world_size: int
) -> None:
    for optimizer, stage, rank in itertools.product(OPTIMIZERS, STAGES, range(world_size)):
        skipped = cells[world_size][rank]["skipped"]
        for trouble in TROUBLES:
            assert skipped[optimizer, stage, trouble] == (False, torch.inf)
        uninterrupted = cells[world_size][rank]["trained"][optimizer, stage, None][2]
        torch.testing.assert_close(skipped[optimizer, stage], uninterrupted, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(
    cells: Any, world_size: int
) -> None:
    for optimizer, stage, rank in itertools.product(OPTIMIZERS, STAGES, range(world_size)):
        resumed = cells[world_size][rank]["resumed"][optimizer, stage]
        uninterrupted = cells[world_size][rank]["trained"][optimizer, stage, None][2]
        torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stage", "world_size", "saved_stage", "saved_ranks"), [(0, 1, 2, 2), (2, 2, 0, 1)]
)
def test_state_moves_to_another_stage_and_number_of_ranks(
    cells: Any, folder: Path, stage: int, world_size: int, saved_stage: int, saved_ranks: int
) -> None:
    # The state itself arrives bitwise (asserted in the ranks); the steps after it sum gradients in
    # another order.
    got = run_ranks(finish_from, world_size, folder, folder, stage, saved_stage, saved_ranks)
    for optimizer in OPTIMIZERS:
        torch.testing.assert_close(got[-1][optimizer], train_plainly(optimizer, None)[2], **CLOSE)


def test_bf16_keeps_fp32_weights_and_stays_near_fp32_at_every_stage(cells: Any) -> None:
    losses, _, _ = train_plainly("sgd", None)
    for rank, stage in itertools.product(range(2), STAGES):
        got_losses, is_finite, got = cells[2][rank]["bf16"][stage]
        assert not is_finite
        assert {value.dtype for value in got.values()} == {torch.float32}
        assert got_losses != losses, "bf16 was not used"
        # bf16 has 8 bits: each product is off by up to 0.4%.
        torch.testing.assert_close(got_losses, losses, rtol=0.02, atol=0)
        first = cells[2][0]["bf16"][0]
        torch.testing.assert_close(got_losses, first[0], **CLOSE)
        torch.testing.assert_close(got, first[2], rtol=1e-3, atol=1e-4)


def test_state_of_another_model_or_optimizer_is_refused_on_all_ranks(cells: Any) -> None:
    of_sgd, without_mean = cells[2][0]["misfits"]
    assert "missing (convolution.weight/exp_avg" in of_sgd
    assert "1 missing (mean)" in without_mean
    assert cells[2][1]["misfits"] == [of_sgd, without_mean]


def test_deepspeed_says_nothing_and_compiles_nothing(cells: Any, folder: Path) -> None:
    outputs = list(folder.glob("ranks-*/rank-*.out"))
    assert outputs
    assert [path.read_text() for path in outputs] == [""] * len(outputs)
