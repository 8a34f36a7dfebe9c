"""Groups of runs against each other, with numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bigdet.reporting import compare, facts
from bigdet.reporting.figures import MAX_POINTS, curve_figures, thinned, training_figures
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
        "fast": ["fast-s0", "fast-s1"],
        "slow": ["slow"],
    }


def test_loader_threads_are_another_group_for_their_cpu_time_and_their_number_is_not(
    tmp_path: Path,
):
    folders = [
        write_run(tmp_path / "a-s0", [0.1], "seed=0", "data.workers=1"),
        write_run(tmp_path / "a-s1", [0.1], "seed=1", "data.workers=3"),
        write_run(tmp_path / "b", [0.1], "seed=2", "data.workers=1", "data.worker_kind=threads"),
    ]
    groups = group_runs(read_runs(folders))
    assert [[run.name for run in runs] for runs in groups.values()] == [["a-s0", "a-s1"], ["b"]]


def test_a_curve_is_the_mean_over_seeds_with_costs(groups):
    last = compare.ap_curve(groups["fast"], "bbox/AP")[-1]
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
    assert [(point.total_step, point.mean) for point in compare.ap_curve(runs, "bbox/AP")] == [
        (10, pytest.approx(0.2)),
        (20, pytest.approx(0.2)),
    ]


def test_differences_are_held_against_the_noise_of_seeds(groups):
    table = compare.difference_table(groups)
    assert table.header[:4] == ["run", "measure", "percent", "minus fast"]
    # deviation sqrt(2) points in the only group of two, so 2 sqrt(2) sqrt(1 + 1/2) = 3.46
    assert table.rows[0] == ["slow", "box AP", "20.0", "-11.0", "+-3.5", "more than noise"]
    # masks have half the AP and half the deviation
    assert table.rows[1] == ["slow", "mask AP", "10.0", "-5.5", "+-1.7", "more than noise"]


def test_one_seed_says_nothing_about_noise(tmp_path: Path):
    folders = [write_run(tmp_path / "a", [0.1] * 5), write_run(tmp_path / "b", [0.2] * 5, SLOW)]
    rows = compare.difference_table(group_runs(read_runs(folders))).rows
    assert rows[0] == ["b", "box AP", "20.0", "+10.0", "not known: one seed"]


def test_pooled_deviation_weighs_groups_by_their_freedom():
    # variances 2 (one degree) and 1 (two degrees): (2 + 2) / 3
    assert compare.pooled_deviation([[1, 3], [1, 2, 3], [9]]) == pytest.approx(math.sqrt(4 / 3))
    assert compare.pooled_deviation([[1], [2]]) is None


def test_cost_at_equal_ap(groups):
    table = compare.equal_ap_table(groups)
    assert table.header == [
        "run",
        "reaches",
        "at",
        "steps",
        "GPU-hours",
        "images",
        "instances",
        "pixels",
    ]
    # fast has 20 percent after 20 steps of 36 s; slow after 50 steps of 72 s: 720 / 3600
    parts = ["pretrain 20", "0.40", "0.20", "0.40", "0.40", "0.40"]
    assert table.rows == [
        ["fast", "slow's 20.0 box AP", *parts],
        ["fast", "slow's 10.0 mask AP", *parts],
        ["slow", "fast's 31.0 box AP, fast's 15.5 mask AP", "not reached", *[""] * 5],
    ]
    assert compare.equal_ap_sentences(groups) == [
        "fast reaches slow's 20.0 box AP at 0.20 of its GPU-hours.",
        "fast reaches slow's 10.0 mask AP at 0.20 of its GPU-hours.",
    ]


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory):
    """One that begins with weights that had taken an hour and 1000 images, and one from scratch."""
    tmp_path = tmp_path_factory.mktemp("imports")
    cost = {"imported/gpu_seconds": 3600.0, "imported/images": 1000}
    folders = [
        write_run(tmp_path / "imagenet", [0.1, 0.2, 0.2, 0.2, 0.2], SLOW, imported=cost),
        write_run(tmp_path / "scratch", [0.05, 0.1, 0.1, 0.15, 0.2]),
    ]
    return group_runs(read_runs(folders))


def test_cost_at_equal_ap_with_what_was_imported(imports):
    table = compare.equal_ap_table(imports)
    assert table.header == [
        "run", "reaches", "at", "steps", "GPU-hours", "GPU-hours with imports", "images",
        "images with imports", "instances", "pixels",
    ]  # fmt: skip
    # 20 of 50 steps: 0.2 h against 0.5 h, or 1.2 h; 80 images against 200, or 1080. Instances and
    # pixels of the import are not stated.
    assert table.rows[0] == [
        "imagenet", "scratch's 20.0 box AP", "pretrain 20", "0.40", "0.40", "2.40", "0.40", "5.40",
        "0.40", "0.40",
    ]  # fmt: skip
    # the other way: 0.5 h against 0.5 h, or 1.5 h; 200 images against 200, or 1200
    row = next(row for row in table.rows if row[:2] == ["scratch", "imagenet's 20.0 box AP"])
    assert row[2:] == ["finetune 20", "1.00", "1.00", "0.33", "1.00", "0.17", "1.00", "1.00"]
    assert compare.equal_ap_sentences(imports)[:2] == [
        "imagenet reaches scratch's 20.0 box AP at 0.40 of its GPU-hours (2.40 with the cost of "
        "imported weights).",
        "scratch reaches imagenet's 20.0 box AP at 1.00 of its GPU-hours (0.33 with the cost "
        "of imported weights).",
    ]


def test_curves_are_drawn_against_costs_with_what_was_imported(imports):
    choices = {choice.label: choice.traces for choice in curve_figures(imports)[0].choices}
    assert list(choices) == [
        "steps",
        "GPU-hours",
        "GPU-hours with imports",
        "images",
        "images with imports",
        "instances",
        "pixels",
    ]
    imagenet, scratch = choices["GPU-hours with imports"]
    assert imagenet["x"] == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])
    assert scratch["x"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_voc_runs_are_compared_by_ap50_too(tmp_path: Path):
    run = write_run(tmp_path / "voc", [0.1, 0.2], "evaluation.metric=voc07")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"bbox/AP": ', '"bbox/AP50": 0.6, "bbox/AP": '))
    groups = group_runs(read_runs([run]))
    assert compare.measures_of(groups) == ["bbox/AP", "bbox/AP50", "segm/AP"]
    assert [figure.key for figure in curve_figures(groups)] == ["ap-bbox", "ap-bbox50", "ap-segm"]
    assert compare.final_values(groups["voc"], "bbox/AP50") == [0.6]


def test_costs_of_each_phase(groups):
    table = facts.cost_table(groups)
    assert table.header[5:] == [
        "pixels",
        "compute GPU-minutes",
        "data wait GPU-minutes",
        "evaluation GPU-minutes",
    ]
    rows = table.rows
    assert [row[:2] for row in rows[:2]] == [["fast-s0", "pretrain"], ["fast-s0", "finetune"]]
    # 20 steps of 36 s: 720 s, a quarter of them waiting; 72 s of evaluation
    assert rows[1][2:] == ["20", "80", "240", "80,000", "9", "3", "1.2"]


def test_options_that_differ_between_groups_and_within(groups):
    table = facts.option_table(groups)
    assert table.header == ["option", "fast", "slow"]
    assert table.rows == [["seed", "0, 1", "0"], ["phases.finetune.lr", "0.0005", "0.01"]]


def test_phases_and_what_runs_ran_on(groups):
    line = facts.run_table(groups).rows[0]
    assert line[:2] == ["fast", "mask_rcnn, resnet10"]
    assert line[2].splitlines()[0] == "pretrain: 30 steps, 16 images per step, direct 96"
    words, table = facts.environment_table(groups)
    assert words == "The same in all runs: ranks 2; device CPU; torch 2.15."
    assert table.header == ["run", "starts", "last start"]
    assert table.rows[0] == ["fast-s0", "1", "2026-01-01 00:00 UTC"]


def test_training_curves_have_the_phases_on_them(groups):
    figure = next(each for each in training_figures(groups) if each.key == "lr")
    layout = figure.choices[0].layout
    assert [(one["text"], one["x"]) for one in layout["annotations"]] == [
        ("pretrain", 0),
        ("finetune", 30),
    ]
    assert [line["x0"] for line in layout["shapes"]] == [30]


def test_curves_of_the_report_are_those_numbers(groups):
    figure = curve_figures(groups)[0]
    assert [choice.label for choice in figure.choices] == [
        "steps",
        "GPU-hours",
        "images",
        "instances",
        "pixels",
    ]
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


def test_a_single_evaluation_of_several_seeds_has_a_whisker(tmp_path: Path):
    folders = [write_run(tmp_path / "a-s0", [0.1]), write_run(tmp_path / "a-s1", [0.3], "seed=1")]
    (trace,) = curve_figures(group_runs(read_runs(folders)))[0].choices[0].traces
    assert trace["y"] == pytest.approx([20])
    assert trace["error_y"]["array"] == pytest.approx([10 * math.sqrt(2)])


def test_ap_on_another_set_is_in_no_curve_and_in_a_table_of_its_own(tmp_path: Path):
    words = ["phases.pretrain.data.val.shards=other/val", "data.val.shards=own/val"]
    aps = [0.5, 0.6, 0.7, 0.1, 0.2]  # three of pretrain, two of finetune
    groups = group_runs(read_runs([write_run(tmp_path / "ladder", aps, *words)]))
    ((run,),) = groups.values()
    curve = compare.ap_curve([run], "bbox/AP")
    assert [(point.phase, point.step, point.mean) for point in curve] == [
        ("finetune", 10, 0.1),
        ("finetune", 20, 0.2),
    ]
    assert run.evaluated_on == "own/val"
    # Mask AP of the made runs is half of box AP.
    (row,) = facts.other_sets_table(groups).rows
    assert row == ["ladder", "pretrain", "other/val", "70.0", "35.0"]
    (about,) = facts.run_table(groups).rows
    assert about[-1] == "pretrain: other/val\nfinetune: own/val"
    # Before the second phase is evaluated, the first one is compared.
    early = read_runs([write_run(tmp_path / "early", aps[:3], *words)])
    assert [point.mean for point in compare.ap_curve(early, "bbox/AP")] == aps[:3]
    assert facts.other_sets_table({"early": early}).rows == []
