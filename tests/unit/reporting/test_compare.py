"""Groups of runs against each other, with numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bigdet.reporting import compare
from bigdet.reporting.figures import MAX_POINTS, curve_figures, thinned
from bigdet.reporting.runs import group_runs, read_runs
from tests.fake_runs import write_run

SLOW = "phases.finetune.lr=0.01"


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory):
    """Two seeds that end at 30 and 32 percent, and one other run that ends at 20."""
    tmp_path = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(tmp_path / "fast-s0", [0.1, 0.2, 0.25, 0.28, 0.30], "seed=0"),
        write_run(tmp_path / "fast-s1", [0.1, 0.2, 0.25, 0.28, 0.32], "seed=1"),
        write_run(tmp_path / "slow", [0.05, 0.1, 0.15, 0.18, 0.2], SLOW, gpu_seconds_per_step=72),
    ]
    return group_runs(read_runs(folders))


def test_runs_that_differ_in_their_seed_are_one_group(groups):
    assert {name: [run.name for run in runs] for name, runs in groups.items()} == {
        "fast": ["fast-s0", "fast-s1"], "slow": ["slow"],
    }  # fmt: skip


def test_a_curve_is_the_mean_over_seeds_with_costs(groups):
    last = compare.ap_curve(groups["fast"], "bbox")[-1]
    assert (last.phase, last.step, last.total_step) == ("finetune", 20, 50)
    assert last.mean == pytest.approx(0.31)
    assert last.deviation == pytest.approx(0.01 * math.sqrt(2))
    # 50 steps of 36 s, 4 images, 12 instances and 4000 pixels
    assert last.costs == {"GPU-hours": 0.5, "images": 200, "instances": 600, "pixels": 200_000}


def test_evaluations_that_a_seed_lacks_are_left_out(tmp_path: Path):
    folders = [
        write_run(tmp_path / "a-s0", [0.1] * 5),
        write_run(tmp_path / "a-s1", [0.3] * 2, "seed=1"),
    ]
    (runs,) = group_runs(read_runs(folders)).values()
    assert [(point.total_step, point.mean) for point in compare.ap_curve(runs, "bbox")] == [
        (10, pytest.approx(0.2)), (20, pytest.approx(0.2)),
    ]  # fmt: skip


def test_differences_are_held_against_the_noise_of_seeds(groups):
    table = compare.difference_table(groups)
    assert table.header[:4] == ["run", "kind", "AP", "minus fast"]
    # deviation sqrt(2) points in the only group of two, so 2 sqrt(2) sqrt(1 + 1/2) = 3.46
    assert table.rows[0] == ["slow", "box", "20.0", "-11.0", "+-3.5", "more than noise"]
    # masks have half the AP and half the deviation
    assert table.rows[1] == ["slow", "mask", "10.0", "-5.5", "+-1.7", "more than noise"]


def test_one_seed_tells_nothing_of_noise(tmp_path: Path):
    folders = [write_run(tmp_path / "a", [0.1] * 5), write_run(tmp_path / "b", [0.2] * 5, SLOW)]
    rows = compare.difference_table(group_runs(read_runs(folders))).rows
    assert rows[0] == ["b", "box", "20.0", "+10.0", "not known: one seed", ""]


def test_pooled_deviation_weighs_groups_by_their_freedom():
    # variances 2 (one degree) and 1 (two degrees): (2 + 2) / 3
    assert compare.pooled_deviation([[1, 3], [1, 2, 3], [9]]) == pytest.approx(math.sqrt(4 / 3))
    assert compare.pooled_deviation([[1], [2]]) is None


def test_cost_at_equal_ap(groups):
    table = compare.equal_ap_table(groups)
    # fast has 20 percent after 20 steps of 36 s; slow after 50 steps of 72 s: 720 / 3600
    assert table.rows == [
        ["fast", "slow's 20.0", "pretrain 20", "0.20", "0.40", "0.40", "0.40", "0.40"],
        ["slow", "fast's 31.0", "not reached", "", "", "", "", ""],
    ]
    assert compare.equal_ap_sentences(groups) == [
        "fast reaches slow's 20.0 box AP at 0.20 of its GPU-hours."
    ]


def test_costs_of_each_phase(groups):
    rows = compare.cost_table(groups).rows
    assert [row[:2] for row in rows[:2]] == [["fast-s0", "pretrain"], ["fast-s0", "finetune"]]
    # 20 steps of 36 s: 720 s, a quarter of them waiting; 72 s of evaluation
    assert rows[1][2:] == ["20", "80", "240", "8e-05", "0.15", "0.05", "0.02", ""]


def test_options_that_differ_between_groups_and_within(groups):
    table = compare.option_table(groups)
    assert table.header == ["option", "fast", "slow"]
    assert table.rows == [["seed", "0, 1", "0"], ["phases.finetune.lr", "0.0005", "0.01"]]


def test_curves_of_the_report_are_those_numbers(groups):
    figure = curve_figures(groups)[0]
    assert [choice.label for choice in figure.choices] == [
        "steps", "GPU-hours", "images", "instances", "pixels",
    ]  # fmt: skip
    hours = figure.choices[1].traces
    assert [trace["role"] for trace in hours] == ["band", "line", "line"]
    assert hours[1]["x"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert hours[1]["y"] == pytest.approx([10, 20, 25, 28, 31])
    assert hours[0]["y"][4] == pytest.approx(31 + math.sqrt(2))
    assert hours[2]["x"][-1] == pytest.approx(1.0)


def test_long_curves_become_means_of_neighbors():
    points = [(step, float(step), "") for step in range(1, 2 * MAX_POINTS + 1)]
    assert thinned(points)[:2] == [(2, 1.5, ""), (4, 3.5, "")]
    assert thinned(points[:3]) == points[:3]
