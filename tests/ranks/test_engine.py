"""All engines and ZeRO stages on 1 and 2 ranks against plain PyTorch in one process."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdet import distributed
from bigdet.engine import checkpoint
from bigdet.engine.base import Engine
from bigdet.models import norms
from tests.ranks import engine_matrix
from tests.ranks.toy import (
    CLOSE,
    ENGINES,
    OFFLOADS,
    OPTIMIZERS,
    STEPS,
    Toy,
    Whole,
    assert_same_state,
    ema_decay_at,
    lanes_of_rank,
    lr_at,
    make_batch,
    make_engine,
    run_steps,
    save_together,
    train_plainly,
    weights,
    whole_of,
    whole_state,
)
from tests.spawn import run_ranks

SAVED_AT = 3
CLIP_NORMS = (None, 0.5)  # the gradient norms below lie on both sides of it
TROUBLES = ("nan loss", "infinite loss without a gradient", "nan gradient of a finite loss")
TOO_HIGH = 2.0**50
"""A loss scale that makes any gradient overflow in fp16."""


# ---- What the ranks run: all cells in one process group, as importing deepspeed takes seconds.


def run_cells(folder: Path) -> dict[str, Any]:
    warnings.simplefilter("error")
    make_engine("zero2", "adamw").close()  # DeepSpeed imports more of itself with the first engine
    gc.freeze()  # what is imported by now need not be searched each time an engine is closed
    world_size = distributed.world_size()
    chosen = [cell for cell in engine_matrix.pairwise_cells() if cell[3] == world_size]
    save_all(folder)
    results = {
        "matrix": engine_matrix.run_cells(chosen),
        "clipped": clip_all(),
        "begun": begin_all(),
        "skipped": skip_all(),
        "late": read_late_all(),
        "resumed": resume_all(folder, (1, 2)[:world_size]),
        "unused": decay_unused(),
        "fp16": train_in_fp16(),
        "offloaded": offload_all(),
        "misfits": load_misfits(),
        "evaluated": evaluate_between_steps(),
    }
    gc.unfreeze()
    return results


def begin_all() -> dict[Any, Any]:
    """The same steps with modules that are built without memory, with moving averages too."""
    results = {}
    cells = [(name, kind) for name in ENGINES for kind in ("none", *OFFLOADS.get(name, ()))]
    for name, offload in cells:
        engine = make_engine(name, "adamw", offload=offload, with_ema=True, on_meta=True)
        begun = whole_state(engine)
        torch.testing.assert_close(begun.model, Toy().state_dict(), rtol=0, atol=0)
        averaged = {key: begun.model[key] for key in begun.ema}
        torch.testing.assert_close(begun.ema, averaged, rtol=0, atol=0)
        losses, norms = run_steps(engine, "adamw", range(1, STEPS + 1))
        results[name, offload] = losses, norms, weights(name, engine)
        engine.close()
    return results


def clip_all() -> dict[Any, Any]:
    results = {}
    for optimizer, name, clip_norm in itertools.product(OPTIMIZERS, ENGINES, CLIP_NORMS):
        engine = make_engine(name, optimizer, clip_norm)
        losses, norms = run_steps(engine, optimizer, range(1, STEPS + 1))
        results[optimizer, name, clip_norm] = losses, norms, weights(name, engine)
        inner = weakref.ref(held_by(engine))
        engine.close()
        del engine
        gc.collect()
        assert inner() is None, f"memory of a closed engine is held: {name}"
    return results


def held_by(engine: Any) -> Any:
    """What holds optimizer state or gradients."""
    inner = getattr(engine, "_engine", None)
    if inner is None:
        return engine._optimizer
    return inner.optimizer if engine._stage else inner


def skip_all() -> dict[Any, Any]:
    """Per cell, whether each troubled step was skipped and changed nothing."""
    results = {}
    for optimizer, name in itertools.product(OPTIMIZERS, ENGINES):
        engine = make_engine(name, optimizer)
        run_steps(engine, optimizer, range(1, SAVED_AT + 1))
        before = whole_state(engine)
        for trouble in TROUBLES:
            result = engine.train_step(lanes_of_rank(99, trouble=trouble))
            assert_same_state(whole_state(engine), before)
            results[optimizer, name, trouble] = result.is_finite, result.grad_norm
            assert not result.is_overflow
        run_steps(engine, optimizer, range(SAVED_AT + 1, STEPS + 1))
        results[optimizer, name] = weights(name, engine)
        engine.close()
    return results


def read_late_all() -> dict[str, Any]:
    """Steps whose results nobody reads until the end, two of them bad, and the good ones alone."""
    results = {}
    for name in ENGINES:
        engine = make_engine(name, "adamw", clip_norm=0.5, norm="live", with_ema=True)
        launched = []
        for step in (0, 1, 2, 0, 3):
            engine.set_lr(lr_at(step, OPTIMIZERS["adamw"].lr))
            trouble = {} if step else {"trouble": TROUBLES[2]}
            launched.append(engine.launch_step(lanes_of_rank(step, **trouble)))
            norms.update_running_statistics(engine.module, counts=launched[-1].counts)
            engine.update_ema(ema_decay_at(step))
        steps = [(each.counts.item(), each.read()) for each in launched]
        late = whole_state(engine)
        engine.close()
        engine = make_engine(name, "adamw", clip_norm=0.5, norm="live", with_ema=True)
        _, grad_norms = run_steps(engine, "adamw", (1, 2, 3))
        assert_same_state(late, whole_state(engine))
        engine.close()
        results[name] = [(counts, seen.is_finite) for counts, seen in steps]
        assert [seen.grad_norm for counts, seen in steps if counts] == grad_norms
    return results


def checkpoint_of(folder: Path, optimizer: str, name: str, world_size: int) -> Path:
    return folder / f"{optimizer}-{name}-{world_size}" / f"train-{SAVED_AT}"


def save_all(folder: Path) -> None:
    """Train each engine up to step 3 and write its checkpoint, as all ranks do."""
    for optimizer, name in itertools.product(OPTIMIZERS, ENGINES):
        engine = make_engine(name, optimizer)
        run_steps(engine, optimizer, range(1, SAVED_AT + 1))
        path = checkpoint_of(folder, optimizer, name, distributed.world_size())
        save_together(engine, path, step=SAVED_AT)
        engine.close()


def resume_all(folder: Path, saved_ranks: tuple[int, ...]) -> dict[Any, Any]:
    """Weights at the end of runs that go on from the checkpoints of each engine at step 3."""
    results = {}
    names, own_size = list(ENGINES), distributed.world_size()
    for optimizer, name in itertools.product(OPTIMIZERS, names):
        engine = make_engine(name, optimizer)
        run_steps(engine, optimizer, [77])  # whatever it had before
        for other, size in itertools.product(names, saved_ranks):
            is_next = names.index(other) == (names.index(name) + 1) % len(names)
            if not is_next and optimizer == "sgd" and other != name:
                continue
            saved = checkpoint.load(checkpoint_of(folder, optimizer, other, size))
            assert saved.run == {"step": SAVED_AT}
            engine.load_state(saved.engine)
            assert_same_state(whole_state(engine), whole_of(saved.engine))
            if is_next or size == own_size:
                run_steps(engine, optimizer, range(SAVED_AT + 1, STEPS + 1))
                results[optimizer, other, name, size] = weights(name, engine)
        engine.close()
    return results


def save_and_resume(folder: Path, saved_ranks: tuple[int, ...]) -> dict[Any, Any]:
    warnings.simplefilter("error")
    make_engine("zero2", "adamw").close()
    gc.freeze()
    save_all(folder)
    return resume_all(folder, saved_ranks)


def decay_unused() -> dict[str, tuple[list[float], set[float]]]:
    """A weight of 2 that no loss depends on after three steps, and all counters of steps."""
    results = {}
    for name in ENGINES:
        engine = make_engine(name, "adamw", has_unused=True)
        run_steps(engine, "adamw", (1, 2, 3))
        state = whole_state(engine)
        counters = {value.item() for value in state.of_kind("step").values()}
        results[name] = state.model["unused.weight"].flatten().tolist(), counters
        engine.close()
    return results


def train_in_fp16() -> dict[str, Any]:
    results = {}
    for name in ENGINES:
        engine = make_engine(name, "sgd", precision="fp16")
        losses, norms = run_steps(engine, "sgd", range(1, SAVED_AT + 1))
        before = whole_state(engine)
        engine._scale.value = TOO_HIGH
        overflow = engine.train_step(lanes_of_rank(99))
        after = whole_state(engine)
        torch.testing.assert_close(after.tensors, before.tensors, rtol=0, atol=0)
        bad = engine.train_step(lanes_of_rank(99, trouble=TROUBLES[0]))
        engine.load_state(before)
        assert_same_state(whole_state(engine), before)
        more_losses, more_norms = run_steps(engine, "sgd", range(SAVED_AT + 1, STEPS + 1))
        results[name] = {
            "trained": (losses + more_losses, norms + more_norms, weights(name, engine)),
            "overflow": (overflow.is_finite, overflow.is_overflow, overflow.loss_scale),
            "scale after it": after.loss_scale,
            "bad": (bad.is_finite, bad.is_overflow, bad.loss_scale),
        }
        engine.close()
    return results


def offload_all() -> dict[Any, Any]:
    results = {}
    for name, kinds in OFFLOADS.items():
        for kind in kinds:
            engine = make_engine(name, "adamw", offload=kind)
            run_steps(engine, "adamw", range(1, SAVED_AT + 1))
            state = whole_state(engine)
            run_steps(engine, "adamw", [88])
            engine.load_state(state)
            assert_same_state(whole_state(engine), state)
            run_steps(engine, "adamw", range(SAVED_AT + 1, STEPS + 1))
            results[name, kind] = weights(name, engine)
            engine.close()
    return results


def evaluate_between_steps() -> dict[str, Any]:
    """Outputs of the bare module after step 3, and weights at the end."""
    results = {}
    for name in ENGINES:
        engine = make_engine(name, "sgd")
        run_steps(engine, "sgd", range(1, SAVED_AT + 1))
        engine.module.eval()
        with torch.no_grad():
            seen = [engine.module(make_batch(1, [k]))["square"].item() for k in range(2)]
        engine.module.train()
        run_steps(engine, "sgd", range(SAVED_AT + 1, STEPS + 1))
        results[name] = seen, weights(name, engine)
        engine.close()
    return results


def load_misfits() -> list[str]:
    messages = []
    for name in ENGINES:
        engine = make_engine(name, "sgd")
        run_steps(engine, "sgd", [1])
        state = whole_state(engine)
        model = {key: spec for key, spec in state.catalog["model"].items() if key != "mean"}
        other = dataclasses.replace(state, catalog={**state.catalog, "model": model})
        messages.append(message_of(engine, other))
        engine.close()
        engine = make_engine(name, "adamw")
        messages.append(message_of(engine, state))
        engine.close()
    return messages


def message_of(engine: Engine, unfit: Whole) -> str:
    with pytest.raises(distributed.SharedError, match="does not fit") as caught:
        engine.load_state(unfit)
    return str(caught.value)


# ---- The tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each rank saw."""
    return {
        size: run_ranks(run_cells, size, folder, folder, timeout_seconds=600) for size in (1, 2)
    }


def assert_close(got: dict[str, Tensor] | None, expected: dict[str, Tensor], **close: Any) -> None:
    """Compare weights; a rank that has none after a sharded engine has nothing to compare."""
    if got is not None:
        torch.testing.assert_close(got, expected, **close)


def test_every_pair_of_settings_equals_plain_pytorch(cells: Any) -> None:
    chosen = engine_matrix.pairwise_cells()
    assert {cell[3] for cell in chosen} == {1, 2}
    for cell in chosen:
        for rank in cells[cell[3]]:
            engine_matrix.check_cell(cell, rank["matrix"][cell])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipped_steps_equal_plain_pytorch(
    cells: Any, world_size: int, clip_norm: float | None, optimizer: str
) -> None:
    losses, norms, expected = train_plainly(optimizer, clip_norm)
    assert min(norms) < 0.5 < max(norms), "clipping is not tested"
    for name, rank in itertools.product(ENGINES, cells[world_size]):
        got_losses, got_norms, got = rank["clipped"][optimizer, name, clip_norm]
        torch.testing.assert_close(got_losses, losses, **CLOSE)
        torch.testing.assert_close(got_norms, norms, **CLOSE)
        assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_modules_built_without_memory_take_the_same_steps(cells: Any, world_size: int) -> None:
    losses, norms, expected = train_plainly("adamw")
    for rank in cells[world_size]:
        assert len(rank["begun"]) == len(ENGINES) + sum(map(len, OFFLOADS.values()))
        for (name, offload), (got_losses, got_norms, got) in rank["begun"].items():
            torch.testing.assert_close((got_losses, got_norms), (losses, norms), **CLOSE)
            assert_close(got, expected, **CLOSE)
            if offload == "none":
                uninterrupted = rank["clipped"]["adamw", name, None][2]
                assert_close(got, uninterrupted, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_trouble_on_one_rank_skips_the_step_on_all_and_changes_nothing(
    cells: Any, world_size: int
) -> None:
    for optimizer, name, rank in itertools.product(OPTIMIZERS, ENGINES, cells[world_size]):
        for trouble in TROUBLES:
            assert rank["skipped"][optimizer, name, trouble] == (False, torch.inf)
        uninterrupted = rank["clipped"][optimizer, name, None][2]
        assert_close(rank["skipped"][optimizer, name], uninterrupted, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_weight_without_a_gradient_is_decayed_and_counts_its_steps(
    cells: Any, world_size: int
) -> None:
    # Only the decay of AdamW: each step multiplies by 1 - rate x 0.05, at rates of 0.01 x 2/3, 1
    # and 1/3. All counters are equal: ZeRO keeps one for a whole group.
    expected = 2 * (1 - 0.0005 * 2 / 3) * (1 - 0.0005) * (1 - 0.0005 / 3)
    for name, rank in itertools.product(ENGINES, cells[world_size]):
        values, counters = rank["unused"][name]
        assert values == pytest.approx([expected] * 6, rel=1e-6), name
        assert counters == {3.0}, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_that_are_read_late_change_nothing_and_bad_steps_neither(
    cells: Any, world_size: int
) -> None:
    # That weights, averages, running statistics and optimizer state are bitwise those of the good
    # steps alone is asserted in the ranks.
    expected = [(good, good) for good in (False, True, True, False, True)]
    for name, rank in itertools.product(ENGINES, cells[world_size]):
        assert rank["late"][name] == expected, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(
    cells: Any, world_size: int
) -> None:
    for optimizer, name, rank in itertools.product(OPTIMIZERS, ENGINES, cells[world_size]):
        uninterrupted = rank["clipped"][optimizer, name, None][2]
        resumed = rank["resumed"][optimizer, name, name, world_size]
        assert_close(resumed, uninterrupted, rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_of_every_engine_continues_in_every_other(cells: Any, world_size: int) -> None:
    # The state itself arrives bitwise (asserted in the ranks); the steps after it sum gradients in
    # another order.
    _, _, expected = train_plainly("adamw")
    for name, other, rank in itertools.product(ENGINES, ENGINES, cells[world_size]):
        assert_close(rank["resumed"]["adamw", name, other, world_size], expected, **CLOSE)


def test_state_moves_to_another_number_of_ranks(cells: Any, folder: Path) -> None:
    on_four = run_ranks(save_and_resume, 4, folder, folder, (1, 2), timeout_seconds=600)
    on_one = run_ranks(resume_all, 1, folder, folder, (2, 4), timeout_seconds=600)
    expected = {optimizer: train_plainly(optimizer)[2] for optimizer in OPTIMIZERS}
    moved = 0
    for rank in (*on_four, *on_one, *(rank["resumed"] for rank in cells[2])):
        for (optimizer, _, _, _), got in rank.items():
            assert_close(got, expected[optimizer], **CLOSE)
            moved += got is not None
    assert moved > 100


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp16_steps_with_a_loss_scale_that_finds_itself(cells: Any, world_size: int) -> None:
    losses, norms, expected = train_plainly("sgd")
    for name, rank in itertools.product(ENGINES, cells[world_size]):
        seen = rank["fp16"][name]
        got_losses, got_norms, got = seen["trained"]
        assert got_losses != losses, "fp16 was not used"
        torch.testing.assert_close(got_losses, losses, rtol=1e-3, atol=0)  # 11 bits
        torch.testing.assert_close(got_norms, norms, rtol=2e-3, atol=0)
        assert_close(got, expected, rtol=2e-3, atol=2e-4)
        assert seen["overflow"] == (False, True, TOO_HIGH)
        assert seen["bad"] == (False, False, TOO_HIGH / 2), "a NaN loss is no overflow"
        halved = {"value": TOO_HIGH / 2, "good_steps": 0}
        assert seen["scale after it"] == halved


@pytest.mark.parametrize("world_size", [1, 2])
def test_offloaded_state_takes_the_same_steps(cells: Any, world_size: int) -> None:
    _, _, expected = train_plainly("adamw")
    for rank in cells[world_size]:
        assert set(rank["offloaded"]) == {(n, kind) for n in OFFLOADS for kind in OFFLOADS[n]}
        for got in rank["offloaded"].values():
            assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_between_steps_sees_the_weights_and_changes_nothing(
    cells: Any, world_size: int
) -> None:
    for name, rank in itertools.product(ENGINES, cells[world_size]):
        seen, got = rank["evaluated"][name]
        torch.testing.assert_close(seen, cells[1][0]["evaluated"]["zero0"][0], **CLOSE)
        assert_close(got, rank["clipped"]["sgd", name, None][2], rtol=0, atol=0)


def test_state_of_another_model_or_optimizer_is_refused_on_all_ranks(cells: Any) -> None:
    messages = cells[2][0]["misfits"]
    for without_mean, of_sgd in zip(messages[::2], messages[1::2], strict=True):
        assert "1 missing (mean)" in without_mean
        assert "missing (convolution.weight/exp_avg" in of_sgd
    assert len(messages) == 2 * len(ENGINES)
    assert cells[2][1]["misfits"] == messages


def test_engines_say_nothing_and_compile_nothing(cells: Any, folder: Path) -> None:
    outputs = list(folder.glob("ranks-*/rank-*.out"))
    assert outputs
    assert [path.read_text() for path in outputs] == [""] * len(outputs)
