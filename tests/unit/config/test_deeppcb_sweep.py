"""The experiment on DeepPCB compares what its head says that it compares."""

from __future__ import annotations

import functools

import pytest

from bigdet.config.run import RunConfig
from bigdet.config.sweep import PlannedRun, load_sweep
from bigdet.sweep import check_forks
from tests.shipped import CONFIGS


@functools.cache
def runs_of(name: str) -> dict[str, PlannedRun]:
    """The runs of seed 0 by group."""
    _, runs = load_sweep(CONFIGS / "sweeps" / f"{name}.yaml")
    check_forks(runs)
    return {run.group: run for run in runs if run.config.seed == 0}


def lengths(config: RunConfig) -> list[int]:
    """Steps of each phase."""
    return [phase.steps or 0 for phase in config.phases.values()]


def test_budgets_are_a_quarter_a_half_one_and_two():
    runs = runs_of("deeppcb")
    trunks = [name.removesuffix("_x2") for name in runs if name.endswith("_x2")]
    assert [name.partition("_")[0] for name in trunks] == ["direct", "scratch"]
    for name in trunks:
        one = lengths(runs[name].config)
        for suffix, factor in (("x2", 2), ("half", 0.5), ("quarter", 0.25)):
            other = runs[f"{name}_{suffix}"]
            assert lengths(other.config) == [int(length * factor) for length in one]
            assert other.fork_of == (None if suffix == "x2" else f"{name}_x2-s0")


def test_pretraining_has_equal_steps_at_every_batch():
    runs = runs_of("deeppcb")
    for name, batch in (
        ("direct_batch_2", 2),
        ("direct_batch_4", 4),
        ("direct_batch_8", 8),
        ("direct_fixed", 16),
    ):
        phase = runs[name].config.phases["pretrain"]
        assert (phase.images_per_step, phase.images_per_gpu) == (batch, batch // 2)
        assert lengths(runs[name].config) == lengths(runs["direct_fixed"].config)


@pytest.mark.parametrize(
    "regime",
    ["scratch_live", "scratch_sync", "scratch_gn", "direct_fixed", "direct_affine", "direct_sync"],
)
def test_the_rates_are_of_the_grid(regime: str):
    grid, one = runs_of("deeppcb_rates"), runs_of("deeppcb")[regime].config
    tried = [grid[f"{regime}_{name}"].config for name in ("low", "mid", "high")]
    for phase in one.phases:
        rates = [run.phases[phase].lr for run in tried]
        assert rates[1:] == pytest.approx([2.5 * rates[0], 2.5 * rates[1]])
        assert one.phases[phase].lr in rates
    assert [lengths(run) for run in tried] == [lengths(one)] * 3
    assert one.data.workers == 0  # all CPU time is that of the ranks
