"""Run folders that can be reported on, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigdet.reporting.runs import common_name, group_runs, read_runs, short_names
from bigdet.reporting.writing import write_report
from tests.fake_runs import write_run


def test_a_folder_that_is_no_run_is_reported(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent: not a run: it is not a folder"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"not a run: it has no config\.yaml.*output folder"):
        read_runs([tmp_path])


def test_a_run_without_metrics_is_reported(tmp_path: Path):
    run = write_run(tmp_path / "a", [0.1])
    (run / "metrics.jsonl").write_text('{"phase": "pretrain", "st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: has no line"):
        read_runs([run])


def test_runs_measured_on_other_data_are_refused(tmp_path: Path):
    first, other = write_run(tmp_path / "a", [0.1]), write_run(tmp_path / "b", [0.1], objects=11)
    with pytest.raises(
        ValueError, match=r"b: was evaluated on other data than .*a: objects of each"
    ):
        read_runs([first, other])
    file = other / "evaluation/pretrain-10.json"
    numbers = json.loads(file.read_text())
    numbers["per_class"]["bbox"] = {"cow": 0.5}
    file.write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match=r"classes: \['cow'\], not \['cat', 'dog'\]"):
        read_runs([first, other])
    voc = write_run(tmp_path / "c", [0.1], "evaluation.metric=voc07")
    with pytest.raises(ValueError, match=r"evaluation\.metric: voc07, not coco"):
        read_runs([first, voc])
    dense = write_run(tmp_path / "d", [0.1], "evaluation.max_detections=300")
    with pytest.raises(ValueError, match=r"evaluation\.max_detections: 300, not 100"):
        read_runs([first, dense])


def test_a_report_names_how_many_detections_ap_counts(tmp_path: Path):
    note = "AP counts up to 300 detections per class and image (evaluation.max_detections)"
    for words in (["evaluation.max_detections=300"], []):
        groups = group_runs(read_runs([write_run(tmp_path / f"run{len(words)}", [0.1], *words)]))
        outcomes = {name: [run.outcome for run in runs] for name, runs in groups.items()}
        for file in write_report(groups, tmp_path, "title", outcomes):
            assert (note in file.read_text()) == bool(words)


def test_a_report_begins_with_what_it_is_about(tmp_path: Path):
    groups = group_runs(read_runs([write_run(tmp_path / "run", [0.1])]))
    outcomes = {name: [run.outcome for run in runs] for name, runs in groups.items()}
    text, page = write_report(groups, tmp_path, "title", outcomes, "Is 1 < 2?")
    assert text.read_text().startswith("Is 1 < 2?\n\n| run | seeds |")
    assert "<p>Is 1 &lt; 2?</p>" in page.read_text().partition(">Results<")[0]
    text, page = write_report(groups, tmp_path, "title", outcomes)
    assert text.read_text().startswith("| run | seeds |")
    assert ">About<" not in page.read_text()


def test_metrics_of_another_config_are_reported(tmp_path: Path):
    run = write_run(tmp_path / "a", [0.1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"has the phases train, which config\.yaml does not list"):
        read_runs([run])


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/1/a"), Path("/x/2/a")]) == ["1/a", "2/a"]
    assert common_name(["direct-s0", "direct-s1"]) == "direct"
    assert common_name(["direct_seed3", "direct_seed12"]) == "direct"
    assert common_name(["one", "two", "three"]) == "one and 2 more"


def test_a_run_given_twice_is_read_once(tmp_path: Path):
    run = write_run(tmp_path / "a", [0.1])
    (tmp_path / "link").symlink_to(run)
    (read,) = read_runs([run, run.parent / "." / "a", tmp_path / "link"])
    assert read.name == "a"


def test_seeds_on_the_same_shards_are_one_group_however_these_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    spelled = ("data/val", "data/val/", f"{tmp_path}/data/val", "data/other")
    runs = [
        write_run(tmp_path / f"run-s{seed}", [0.1], f"seed={seed}", f"data.val.shards={shards}")
        for seed, shards in enumerate(spelled)
    ]
    groups = group_runs(read_runs(runs))
    assert [len(members) for members in groups.values()] == [3, 1]


def test_groups_with_the_same_common_name_are_all_kept(tmp_path: Path):
    # Two pairs of seeds, and a run that is called what the names of either pair have in common.
    options = {
        "direct-s0": [],
        "direct-s1": ["seed=1"],
        "direct": ["phases.pretrain.lr=0.5"],
        "direct-seed0": ["phases.pretrain.lr=0.25"],
        "direct-seed1": ["phases.pretrain.lr=0.25", "seed=1"],
        "direct-s0 and 1 more": ["phases.pretrain.lr=0.125"],
    }
    runs = read_runs([write_run(tmp_path / name, [0.1], *each) for name, each in options.items()])
    assert {name: [run.name for run in members] for name, members in group_runs(runs).items()} == {
        "direct-s0 and 1 more*": ["direct-s0", "direct-s1"],
        "direct": ["direct"],
        "direct-seed0 and 1 more": ["direct-seed0", "direct-seed1"],
        "direct-s0 and 1 more": ["direct-s0 and 1 more"],
    }
    first = group_runs(runs[:2] + runs[3:5])
    assert list(first) == ["direct", "direct-seed0 and 1 more"]


def test_an_ended_run_with_an_evaluation_unscored_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = write_run(tmp_path / "a", [0.1, 0.2, 0.3, 0.4, 0.5])
    assert read_runs([run])[0].outcome.is_finished
    assert not caplog.records
    (run / "evaluation/finetune-20.detections").touch()
    assert not read_runs([run])[0].outcome.is_finished
    assert "its last evaluation is not scored yet; start the run again" in caplog.text
