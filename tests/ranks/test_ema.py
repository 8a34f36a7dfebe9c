"""Moving averages in all engines and ZeRO stages on 1 and 2 ranks."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from bigdet import distributed
from bigdet.engine import checkpoint
from bigdet.models import norms
from tests.ranks.toy import (
    CLOSE,
    ENGINES,
    OFFLOADS,
    STEPS,
    Toy,
    Whole,
    assert_same_state,
    ema_decay_at,
    lanes_of_rank,
    make_batch,
    make_engine,
    run_steps,
    save_together,
    train_plainly,
    whole_of,
    whole_state,
)
from tests.spawn import run_ranks

SAVED_AT = 3
OPTIMIZER = "adamw"
NORM = "live"  # whose running statistics are averaged too
CELLS = [(name, "none") for name in ENGINES] + [(n, kind) for n in OFFLOADS for kind in OFFLOADS[n]]
# Of every two engines each goes on from the other: half of them on as many ranks, half on others.
PAIRS = [pair for number, pair in enumerate(itertools.product(ENGINES, ENGINES)) if number % 2 == 0]
OTHER_PAIRS = [pair for pair in itertools.product(ENGINES, ENGINES) if pair not in PAIRS]
TRAINED = {
    "convolution.weight": 135, "norm.weight": 5, "norm.bias": 5, "linear.weight": 15,
    "linear.bias": 3,
}  # fmt: skip
BUFFERS = {"mean": 3, "norm.running_mean": 5, "norm.running_var": 5}


# ---- What the ranks run.


def start(name: str, offload: str = "none") -> Any:
    return make_engine(name, OPTIMIZER, norm=NORM, offload=offload, with_ema=True)


def run_all(folder: Path) -> dict[str, Any]:
    size = distributed.world_size()
    return {
        "trained": {cell: train(*cell, folder) for cell in CELLS},
        "resumed": resume_all(folder, size, PAIRS),
        "moved": resume_all(folder, 1, OTHER_PAIRS) if size == 2 else None,
        "skipped": skip_and_misfit(),
        "not looked at": {name: train_without_looking(name) for name in ENGINES},
    }


def train(name: str, offload: str, folder: Path) -> dict[str, Any]:
    """Averages after every step, what an evaluation of them sees, and the weights at the end."""
    engine = start(name, offload)
    states = [whole_state(engine)]
    seen = []
    for step in range(1, STEPS + 1):
        run_steps(engine, OPTIMIZER, [step])
        states.append(whole_state(engine))
        with engine.averaged():
            engine.module.eval()
            with torch.no_grad():
                seen.append([engine.module(make_batch(9, [k]))["square"].item() for k in (0, 1)])
            engine.module.train()
        if step == SAVED_AT and offload == "none":
            size = distributed.world_size()
            save_together(engine, folder / f"{name}-{size}" / f"train-{step}", step=step)
    num_bytes = sum(value.nbytes for value in engine._ema.values)
    engine.close()
    return {"states": states, "seen": seen, "bytes": num_bytes}


def resume_all(folder: Path, saved_ranks: int, pairs: list[tuple[str, str]]) -> dict[Any, Any]:
    """Averages at the end of runs that an engine goes on with from what another one saved."""
    results = {}
    for name, other in pairs:
        saved = checkpoint.load(folder / f"{other}-{saved_ranks}" / f"train-{SAVED_AT}").engine
        engine = start(name)
        run_steps(engine, OPTIMIZER, [77])  # whatever it had before
        engine.load_state(saved)
        assert_same_state(whole_state(engine), whole_of(saved))
        run_steps(engine, OPTIMIZER, range(SAVED_AT + 1, STEPS + 1))
        results[name, other] = whole_state(engine).ema
        engine.close()
    return results


def train_without_looking(name: str) -> dict[str, Tensor]:
    """Weights at the end of the same steps without a single evaluation or save."""
    engine = start(name)
    run_steps(engine, OPTIMIZER, range(1, STEPS + 1))
    weights = whole_state(engine).model
    engine.close()
    return weights


def without_averages(state: Whole) -> Whole:
    catalog = {kind: specs for kind, specs in state.catalog.items() if kind != "newest"}
    return dataclasses.replace(state, catalog=catalog)


def skip_and_misfit() -> dict[str, Any]:
    results = {}
    for name in ENGINES:
        engine = start(name)
        run_steps(engine, OPTIMIZER, [1])
        before = whole_state(engine)
        result = engine.train_step(lanes_of_rank(99, trouble="nan loss"))
        norms.discard_statistics(engine.module)
        assert not result.is_finite
        assert_same_state(whole_state(engine), before)
        with pytest.raises(distributed.SharedError, match="does not fit") as caught:
            engine.load_state(without_averages(before))
        engine.close()
        results[name] = str(caught.value)
    return results


# ---- The tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {n: run_ranks(run_all, n, folder, folder, timeout_seconds=600) for n in (1, 2)}


@pytest.fixture(scope="module")
def plain() -> tuple[list[dict[str, Tensor]], list[list[float]]]:
    """timm's averages of plain PyTorch in this process, and what an evaluation of them sees."""
    averages: list[dict[str, Tensor]] = []
    seen = []
    ema = ModelEmaV3(Toy(NORM))

    def follow(module: nn.Module, step: int) -> None:
        ema.decay = ema_decay_at(step)
        ema.update(module)
        averages.append({name: value.clone() for name, value in ema.module.state_dict().items()})
        with torch.no_grad():
            seen.append([ema.module(make_batch(9, [k]))["square"].item() for k in (0, 1)])

    train_plainly(OPTIMIZER, norm=NORM, after_step=follow)
    return averages, seen


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_average_is_that_of_the_weights_worked_out_in_double(
    ranks: Any, world_size: int, cell: tuple[str, str]
) -> None:
    states = ranks[world_size][0]["trained"][cell]["states"]
    averages = {name: states[0].model[name].double() for name in (*TRAINED, *BUFFERS)}
    for step, state in enumerate(states):
        if step:
            decay = ema_decay_at(step)
            for name, value in averages.items():
                averages[name] = decay * value + (1 - decay) * state.model[name].double()
        found = {name: value.double() for name, value in state.ema.items()}
        torch.testing.assert_close(found, averages, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_of_all_engines_are_those_of_timm(ranks: Any, plain: Any, world_size: int) -> None:
    averages, seen = plain
    for cell in CELLS:
        result = ranks[world_size][0]["trained"][cell]
        for state, expected in zip(result["states"][1:], averages, strict=True):
            torch.testing.assert_close(state.ema, {n: expected[n] for n in state.ema}, **CLOSE)
        for rank in ranks[world_size]:
            torch.testing.assert_close(rank["trained"][cell]["seen"], seen, **CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluating_and_saving_averages_leaves_the_weights_bitwise_alone(
    ranks: Any, world_size: int
) -> None:
    main = ranks[world_size][0]
    for name in ENGINES:
        looked_at = main["trained"][name, "none"]["states"][-1].model
        torch.testing.assert_close(looked_at, main["not looked at"][name], rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_go_on_in_every_other_engine(ranks: Any, plain: Any, world_size: int) -> None:
    # They arrive bitwise (asserted in the ranks); later steps sum gradients in another order.
    last = plain[0][-1]
    for got in ranks[world_size][0]["resumed"].values():
        torch.testing.assert_close(got, {name: last[name] for name in got}, **CLOSE)


def test_averages_move_to_another_number_of_ranks(
    ranks: Any, plain: Any, folder: Path, tmp_path: Path
) -> None:
    last = plain[0][-1]
    (to_one,) = run_ranks(resume_all, 1, tmp_path, folder, 2, OTHER_PAIRS, timeout_seconds=600)
    for moved in (to_one, ranks[2][0]["moved"]):
        assert len(moved) == len(OTHER_PAIRS)
        for got in moved.values():
            torch.testing.assert_close(got, {name: last[name] for name in got}, **CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_without_averages_is_refused(ranks: Any, world_size: int) -> None:
    # That a skipped step changes none is asserted in the ranks.
    for rank in ranks[world_size]:
        for message in rank["skipped"].values():
            assert "weights besides their average: 8 missing (convolution.weight" in message


def test_an_average_costs_one_more_copy_of_a_ranks_share(ranks: Any) -> None:
    whole, buffers = 4 * sum(TRAINED.values()), 4 * sum(BUFFERS.values())
    for cell in CELLS:
        for size, results in ranks.items():
            held = [rank["trained"][cell]["bytes"] - buffers for rank in results]
            if cell[0] == "zero0":
                assert held == [whole] * size
                continue
            assert sum(held) >= whole
            # Shares are rounded up: FSDP2's to rows of a parameter (of 5 rows one rank has 3, of 3
            # it has 2), ZeRO's to 16 bytes for each of two groups, or to halves of a parameter.
            rows = 4 * (3 * 27 + 3 + 3 + 2 * 5 + 2)
            assert max(held) <= max(rows if size == 2 else 0, whole // size + 32), cell
