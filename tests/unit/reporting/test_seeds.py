"""Several seeds as one analysis, with numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bigdet.reporting.analysis_figures import analysis_figures
from bigdet.reporting.runs import group_runs, read_runs
from bigdet.reporting.seeds import deviations, mean_analysis
from tests.fake_runs import analysis, write_run


def test_numbers_are_means_and_counts_of_seeds_are_put_together():
    first, second = analysis(0.2, objects=10), analysis(0.4, objects=10)
    second["by_size"]["large"]["AP"] = 0.5  # null in the first
    second["confusion"]["pairs"] = [["cat", "cat", 4], ["dog", "cat", 1]]
    second["calibration"] |= {
        "count": [0] * 9 + [1],
        "score": [None] * 9 + [0.91],
        "precision": [None] * 9 + [0.0],
    }
    mean = mean_analysis([first, second])
    assert mean["by_iou"]["0.50"] == pytest.approx(0.3)
    assert mean["by_size"]["large"]["AP"] == 0.5
    assert mean["per_class"]["cat"] == {
        "objects": 10,
        "detections": 20,
        "AP": pytest.approx(0.3),
        "AP50": pytest.approx(0.3),
        "AP75": None,
        "AR": pytest.approx(0.3),
    }
    pairs = {(true, found): count for true, found, count in mean["confusion"]["pairs"]}
    assert pairs == {
        ("cat", "cat"): 10,
        ("cat", "dog"): 2,
        ("cat", None): 2,
        (None, "dog"): 1,
        ("dog", "cat"): 1,
    }
    # 7 detections of score 0.95, all right, and one of 0.91, wrong
    calibration = mean["calibration"]
    assert calibration["count"] == [0] * 8 + [3, 8]
    assert calibration["score"][9] == pytest.approx((7 * 0.95 + 0.91) / 8)
    assert calibration["precision"][7:] == [None, 0.5, 0.875]
    spread = deviations([first, second])
    assert spread is not None
    assert spread["by_iou"]["0.50"] == pytest.approx(0.1 * math.sqrt(2))
    assert spread["by_size"]["large"]["AP"] is None  # of a single number
    assert deviations([first]) is None


def test_figures_show_the_mean_and_whiskers_that_end_at_zero(tmp_path: Path):
    folders = [
        write_run(tmp_path / "a-s0", [0.1], "seed=0"),
        write_run(tmp_path / "a-s1", [0.9], "seed=1"),
        write_run(tmp_path / "b", [0.2], "phases.finetune.lr=0.01"),
    ]
    figures = analysis_figures(group_runs(read_runs(folders)))["bbox"]
    several, single = figures[0].choices[0].traces
    assert several["y"][0] == pytest.approx(50)
    assert several["error_y"]["array"][0] == pytest.approx(40 * math.sqrt(2))  # 56.6
    assert several["error_y"]["arrayminus"][0] == pytest.approx(50)
    assert single["y"][0] == pytest.approx(20)
    assert single["error_y"] == {}
    errors = figures[2].choices[0].traces[0]  # 5 points in each seed
    assert errors["x"] == pytest.approx([5.0] * 6)
    assert errors["error_x"]["array"] == pytest.approx([0.0] * 6)


def test_a_run_made_again_is_no_further_seed(tmp_path: Path):
    folders = [
        write_run(tmp_path / "a-s0", [0.1], "seed=0"),
        write_run(tmp_path / "again", [0.1], "seed=0"),
        write_run(tmp_path / "a-s1", [0.2], "seed=1"),
    ]
    groups = group_runs(read_runs(folders))
    assert {name: [run.name for run in runs] for name, runs in groups.items()} == {
        "a": ["a-s0", "a-s1"],
        "again": ["again"],
    }
