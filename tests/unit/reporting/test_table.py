"""The table of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bigdet.reporting.table import (
    TIMES,
    Outcome,
    amount,
    decimals_of,
    outcome_table,
    read_metrics,
    read_outcome,
    spread,
    unit_of,
)
from bigdet.run_dir import RunDir

DONE = Outcome(
    ap={"bbox/AP": 0.4, "segm/AP": 0.35},
    images=1_440_000,
    pixels=1_500_000_000_000,
    gpu_seconds=7200.0,
    data_seconds=720.0,
    evaluation_seconds=1800.0,
    imported_images=0,
    is_finished=True,
)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_seeds_are_one_line_with_mean_and_standard_deviation():
    other = replace(DONE, ap={"bbox/AP": 0.42, "segm/AP": 0.35}, gpu_seconds=3600.0)
    header, _, line, absent = rows(
        outcome_table({"direct": [DONE, other], "scratch": [None]}).markdown()
    )
    assert header == [
        "run", "seeds", "box AP", "mask AP", "images (million)", "pixels (10^12)", "GPU-hours",
        "data wait", "evaluation GPU-hours", "state",
    ]  # fmt: skip
    # 40 and 42: mean 41, deviation sqrt(2); 720 of 5400 seconds waited for data
    assert line == ["direct", "2", "41.0 +- 1.4", "35.0 +- 0.0", "1.44", "1.5", "1.5", "13%", "0.5",
                    "finished"]  # fmt: skip
    assert absent == ["scratch", "0", *[""] * 7, "0 of 1 finished"]


def test_what_was_imported_and_what_is_not_finished_shows():
    run = replace(DONE, imported_images=128_000_000, is_finished=False)
    header, _, line = rows(outcome_table({"imagenet": [run]}).markdown())
    assert header[-2] == "imported images (million)"
    assert line[-2:] == ["128", "0 of 1 finished"]


def test_the_last_evaluation_counts(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    assert read_outcome(run_dir) is None
    counters = {
        "seen/images": 8,
        "seen/pixels": 80,
        "seen/gpu_seconds": 2.0,
        "cost/data_gpu_seconds": 1.0,
        "cost/evaluation_gpu_seconds": 3.0,
    }
    values = [{"bbox/AP": 0.1, "segm/AP": None}, {"loss/total": 1.0}, {"bbox/AP": 0.2}]
    place = {"phase": "train", "step": 4}
    lines = [json.dumps(place | line | counters) for line in values]
    run_dir.metrics.write_text("\n".join(lines) + '\n{"phase": "tr')  # being written
    assert read_outcome(run_dir) == Outcome({"bbox/AP": 0.2}, 8, 80, 2.0, 1.0, 3.0, 0, False)


def test_one_value_has_no_spread():
    assert spread([0.4]) == "40.0"
    assert spread([]) == ""


def test_low_aps_have_more_decimals():
    low = replace(DONE, ap={"bbox/AP": 0.0003})
    high = replace(DONE, ap={"bbox/AP": 0.0062})
    table = rows(outcome_table({"low": [low, low], "high": [high]}).markdown())
    assert [line[2] for line in table[2:]] == ["0.03 +- 0.00", "0.62"]
    assert rows(outcome_table({"low": [low]}).markdown())[2][2] == "0.030"
    assert [decimals_of([ap, 0.0]) for ap in (0.05, 0.049, 0.005, 0.0049)] == [1, 2, 2, 3]


def test_runs_made_before_costs_were_counted_have_empty_cells(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    lines = [{"phase": "a", "step": 1, "seen/images": 8}, {"phase": "a", "step": 1, "bbox/AP": 0.2}]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_outcome(run_dir)
    assert found == Outcome({"bbox/AP": 0.2}, 8, None, None, None, None, 0, False)
    header, _, line = rows(outcome_table({"old": [found]}).markdown())
    assert header == ["run", "seeds", "box AP", "images", "state"]
    assert line == ["old", "1", "20.0", "8", "0 of 1 finished"]


def test_costs_are_in_the_unit_of_the_largest_with_three_digits():
    small = replace(DONE, images=900_000, gpu_seconds=90.0, evaluation_seconds=0.03)
    tiny = replace(DONE, images=12, gpu_seconds=30.0, evaluation_seconds=12.0)
    header, _, *lines = rows(outcome_table({"small": [small], "tiny": [tiny]}).markdown())
    assert [header[4], header[6], header[8]] == ["images", "GPU-minutes", "evaluation GPU-minutes"]
    assert [[line[4], line[6], line[8]] for line in lines] == [
        ["900,000", "1.5", "<0.001"],
        ["12", "0.5", "0.2"],
    ]
    assert unit_of([59.0, None], TIMES) == (1.0, "seconds")
    assert [amount(value, 1.0) for value in (0, 999.4, 999.6, 12_345.0)] == [
        "0",
        "999",
        "1,000",
        "12,345",
    ]


@pytest.mark.parametrize("text", ["nonsense\n", '{"step": 1}\n', "[1, 2]\n"])
def test_a_damaged_file_names_the_line(tmp_path: Path, text: str):
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text('{"phase": "a", "step": 1}\n' + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        read_metrics(run_dir)
