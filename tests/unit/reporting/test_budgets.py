"""Groups of equal time, and CPU time in place of GPU time, with numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigdet.reporting import budgets, compare, facts
from bigdet.reporting.figures import cost_figures, curve_figures
from bigdet.reporting.runs import group_runs, read_runs
from bigdet.reporting.table import outcome_table
from tests.fake_runs import write_run

OTHER = "phases.finetune.lr=0.01"
LONG = "phases.finetune.lr=0.02"


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory):
    """Two groups at 0.5 and 0.55 CPU-hours, and two runs, one of them unfinished, at 1 and 0.5."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(
            root / "scratch-s0", [0.1, 0.2, 0.25, 0.28, 0.30], "seed=0", cpu_seconds_per_step=36
        ),
        write_run(
            root / "scratch-s1", [0.1, 0.2, 0.25, 0.28, 0.32], "seed=1", cpu_seconds_per_step=36
        ),
        write_run(root / "direct", [0.1, 0.2, 0.3, 0.4, 0.45], OTHER, cpu_seconds_per_step=39.6),
        write_run(root / "long", [0.1, 0.2, 0.3, 0.4, 0.5], LONG, cpu_seconds_per_step=72),
        write_run(
            root / "begun", [0.1, 0.2, 0.3], "phases.finetune.lr=0.03", cpu_seconds_per_step=60
        ),
    ]
    return group_runs(read_runs(folders))


def test_the_best_of_equal_time_leads_by_more_than_the_noise(groups):
    found = [each for each in budgets.equal_budgets(groups) if each.measure == "bbox/AP"]
    # 50 steps of 36 s and of 39.6 s are 0.5 and 0.55 h; 1 h is far from both, and begun is not
    # finished.
    assert [(each.time, each.best) for each in found] == [("CPU-hours", "direct")]
    assert found[0].hours == (pytest.approx(0.5), pytest.approx(0.55))
    table = budgets.budget_table(groups)
    # Noise: deviation sqrt(2) points, so 2 sqrt(2) sqrt(1/1 + 1/2) = 3.46.
    assert table.rows[0] == [
        "0.5 to 0.55 CPU-hours",
        "box AP",
        "direct",
        "45.0",
        "scratch",
        "31.0",
        "+14.0",
        "+-3.5",
        "more than noise",
    ]
    assert budgets.budget_sentences(groups)[0] == (
        "At 0.5 to 0.55 CPU-hours, direct has the highest box AP: 45.0, 14.0 more than scratch "
        "(more than noise)."
    )


def test_one_seed_of_equal_time_says_nothing_about_noise(tmp_path: Path):
    folders = [write_run(tmp_path / "a", [0.1] * 5), write_run(tmp_path / "b", [0.2] * 5, OTHER)]
    groups = group_runs(read_runs(folders))
    assert budgets.budget_table(groups).rows[0] == [
        "0.5 GPU-hours",
        "box AP",
        "b",
        "20.0",
        "a",
        "10.0",
        "+10.0",
        "not known: one seed",
    ]
    assert budgets.budget_sentences(groups)[0] == (
        "At 0.5 GPU-hours, b has the highest box AP: 20.0, 10.0 more than a."
    )


def test_cpu_hours_are_what_counts_on_a_cpu(groups):
    last = compare.ap_curve(groups["scratch"], "bbox/AP")[-1]
    assert last.costs == {"CPU-hours": 0.5, "images": 200, "instances": 600, "pixels": 200_000}
    labels = [choice.label for choice in curve_figures(groups)[0].choices]
    assert labels == ["steps", "CPU-hours", "images", "instances", "pixels"]
    assert "CPU-hours" in compare.equal_ap_table(groups).header
    # direct shows scratch's 31.0 after 40 steps of 39.6 s: 1584 of 1800 s
    assert "direct reaches scratch's 31.0 box AP at 0.88 of its CPU-hours." in (
        compare.equal_ap_sentences(groups)
    )


def test_tables_of_costs_have_cpu_time(groups):
    table = outcome_table({name: [run.outcome for run in runs] for name, runs in groups.items()})
    place = table.header.index("CPU-hours")
    # of direct 50 steps of 39.6 s; half of it evaluating
    assert table.rows[1][place] == "0.55"
    assert table.rows[1][table.header.index("evaluation CPU-hours")] == "0.275"
    assert not any("GPU" in name for name in table.header)
    assert table.rows[1][table.header.index("data wait")] == "25%"
    costs = facts.cost_table(groups)
    # finetune of direct: 20 steps of 39.6 s are 13.2 minutes
    row = next(row for row in costs.rows if row[:2] == ["direct", "finetune"])
    assert row[costs.header.index("training CPU-minutes")] == "13.2"
    assert row[costs.header.index("evaluation CPU-minutes")] == "6.6"
    (figure,) = cost_figures(groups)
    training, evaluation = figure.choices[0].traces
    assert training["x"] == pytest.approx([0.5, 0.5, 0.55, 1.0, 0.5])
    assert evaluation["x"] == pytest.approx([0.25, 0.25, 0.275, 0.5, 0.25])


def test_runs_with_and_without_cpu_time_each_have_their_own(tmp_path: Path):
    folders = [
        write_run(tmp_path / "gpu", [0.1] * 5),
        write_run(tmp_path / "cpu", [0.2] * 5, OTHER, cpu_seconds_per_step=18),
    ]
    groups = group_runs(read_runs(folders))
    table = outcome_table({name: [run.outcome for run in runs] for name, runs in groups.items()})
    columns = [table.header.index(name) for name in ("CPU-minutes", "GPU-minutes")]
    assert [[row[column] for column in columns] for row in table.rows] == [["", "30"], ["15", ""]]
    assert budgets.equal_budgets(groups) == []  # times of different kinds are not alike
    costs = facts.cost_table(groups)
    # Of finetune 20 steps: 36 s on the GPU, a quarter of it waiting, and 3.6 s of evaluations;
    # 18 s on the CPU, and half as much of evaluations.
    own = {
        "gpu": {"compute GPU-minutes": "9", "data wait GPU-minutes": "3",
                "evaluation GPU-minutes": "1.2"},
        "cpu": {"training CPU-minutes": "6", "evaluation CPU-minutes": "3"},
    }  # fmt: skip
    for name, expected in own.items():
        row = next(row for row in costs.rows if row[:2] == [name, "finetune"])
        cells = dict(zip(costs.header, row, strict=True))
        assert {k: cell for k, cell in cells.items() if "-minutes" in k and cell} == expected
    figures = {figure.title: figure.choices[0].traces for figure in cost_figures(groups)}
    assert {title: [(each["name"], each["y"]) for each in traces]
            for title, traces in figures.items()} == {
        "Where the CPU time went": [("training", ["cpu"]), ("evaluation", ["cpu"])],
        "Where the GPU time went": [("compute", ["gpu"]), ("data wait", ["gpu"]),
                                    ("evaluation", ["gpu"])],
    }  # fmt: skip


def test_a_measure_that_only_an_earlier_phase_has_is_compared_nowhere(tmp_path: Path):
    folders = [write_run(tmp_path / "a", [0.1] * 5), write_run(tmp_path / "b", [0.2] * 5, OTHER)]
    for folder in folders:
        file = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if line["phase"] == "finetune":  # as of a detector without masks
                line.pop("segm/AP", None)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = group_runs(read_runs(folders))
    assert compare.measures_of(groups) == ["bbox/AP", "segm/AP"]
    assert [each.measure for each in budgets.equal_budgets(groups)] == ["bbox/AP"]
    assert [each.goal for each in compare.equal_ap(groups)] == [
        "b's 20.0 box AP",
        "a's 10.0 box AP",
    ]


def test_a_time_that_is_near_none_does_not_part_those_that_are_near_each_other():
    hours = {"far": 0.8, "a": 0.98, "b": 1.03, "c": 1.1, "twice": 2.0, "also": 2.2}
    assert budgets.alike(hours) == [["a", "b", "c"], ["twice", "also"]]
