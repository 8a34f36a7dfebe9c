"""The sweep command on a tiny set: forks, stops, continues, prints, submits; its last table."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigdet import sweep
from bigdet.config.rules import ConfigError
from bigdet.config.sweep import load_sweep
from bigdet.host import locks
from tests.commands.runs import ROOT, TINY
from tests.fake_runs import write_run

COMMAND = f"{sys.executable} -m bigdet.train"
SWEEP = """
config: {config}
output: {output}
command: {command}
overrides: {overrides}
runs:
  trunk: {{}}
  short: {{overrides: [phases.pretrain.steps=5, phases.finetune.steps=2],
           fork: {{run: trunk, phase: pretrain, step: 4}}}}
"""
STEP = ["phases.pretrain.schedule=step", "phases.pretrain.drops=[-1]", "log.tensorboard=false"]


def write_sweep(folder: Path, shards: Path, *more: str, text: str = SWEEP) -> Path:
    file = folder / "sweep.yaml"
    data = [f"data.train.shards={shards}/train", f"data.val.shards={shards}/val"]
    overrides = json.dumps([*TINY, "checkpoint.every=100", *data, *STEP, *more])
    config = os.path.relpath(ROOT / "configs" / "quickstart.yaml", folder)
    output, command = folder / "runs", json.dumps(COMMAND)
    file.write_text(text.format(config=config, output=output, overrides=overrides, command=command))
    return file


def start(file: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigdet.sweep", str(file), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, shapes_shards: Path) -> Path:
    """A sweep that was stopped in its first run and then went on to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep(folder, shapes_shards)
    process = start(file)
    metrics = folder / "runs/trunk/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 75, printed
    assert not (folder / "runs/short").exists()
    process = start(file)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return folder


def test_a_fork_is_the_run_that_it_would_have_been_alone(
    swept: Path, tmp_path: Path, shapes_shards: Path
):
    alone = write_sweep(
        tmp_path,
        shapes_shards,
        "phases.pretrain.steps=5",
        "phases.finetune.steps=2",
        text=SWEEP[: SWEEP.index("  short")],
    )
    printed, _ = start(alone).communicate(timeout=300)
    own, expected = (
        load_file(run / "model.safetensors")
        for run in (swept / "runs/short", tmp_path / "runs/trunk")
    )
    assert own.keys() == expected.keys(), printed
    different = [name for name in own if not torch.equal(own[name], expected[name])]
    assert not different, different
    # The fork counts what its trunk has seen.
    fork, whole = lines(swept / "runs/short"), lines(tmp_path / "runs/trunk")
    assert [(line["phase"], line["step"]) for line in fork] == [
        ("pretrain", 5),
        ("pretrain", 5),
        ("finetune", 1),
        ("finetune", 2),
        ("finetune", 2),
    ]
    assert fork[-1]["seen/images"] == whole[-1]["seen/images"]
    assert fork[-1]["cost/steps"] == 7
    assert fork[-1]["phase_cost/steps"] == 2
    assert fork[-1]["bbox/AP"] == whole[-1]["bbox/AP"]


def test_a_sweep_ends_in_a_table_and_starts_nothing_again(swept: Path):
    report = (swept / "runs/report.md").read_text().splitlines()
    header, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in report[:4])
    for name, row in zip(("trunk", "short"), rows, strict=True):
        cells = dict(zip(header, row, strict=True))
        assert (cells["run"], cells["seeds"], cells["state"]) == (name, "1", "finished")
        measured = lines(swept / "runs" / name)[-1]
        for column, key in (
            ("box AP", "bbox/AP"),
            ("box AP50", "bbox/AP50"),
            ("mask AP", "segm/AP"),
        ):
            rounding = 0.5 * 0.1 ** len(cells[column].partition(".")[2])
            assert float(cells[column]) == pytest.approx(100 * measured[key], abs=1.001 * rounding)
    page = (swept / "runs/report.html").read_text()
    assert all(f"</i>{name}</button>" in page for name in ("trunk", "short"))
    printed, _ = start(swept / "sweep.yaml").communicate(timeout=100)
    assert printed.count("already finished") == 2


def test_finished_runs_with_other_options_are_refused(swept: Path, shapes_shards: Path):
    changed = write_sweep(swept, shapes_shards, "phases.finetune.lr=0.5")
    with pytest.raises(
        ConfigError, match=r"runs\.trunk: .*phases\.finetune\.lr \(was 0\.0005, now"
    ):
        sweep.main([str(changed)])
    write_sweep(swept, shapes_shards)


def test_a_fork_whose_past_would_have_been_another_is_refused_at_once(
    tmp_path: Path, shapes_shards: Path
):
    file = write_sweep(tmp_path, shapes_shards)
    file.write_text(file.read_text().replace("phases.pretrain.steps=5", "phases.pretrain.steps=4"))
    # It would drop 1 step before its end, so step 4, where it begins, had a lower rate.
    with pytest.raises(ConfigError, match=r"runs\.short: phases\.pretrain\.drops: up to step 4"):
        sweep.main([str(file), "--print"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.norm_scope=all", r"model\.norm_scope \(was None, now all\)"),
        ("phases.pretrain.lr=0.5", r"phases\.pretrain\.lr \(was 0\.001, now 0\.5\)"),
    ],
)
def test_a_fork_that_was_another_run_is_refused_before_its_trunk_is_trained(
    tmp_path: Path, shapes_shards: Path, word: str, said: str
):
    file = write_sweep(tmp_path, shapes_shards)
    text = file.read_text().replace("phases.finetune.steps=2]", f"phases.finetune.lr=0.1, {word}]")
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^runs\.short: fork\.run: trunk .*: {said}\. Give"):
        sweep.main([str(file), "--print"])


def test_commands_are_printed_for_what_is_left(tmp_path: Path, shapes_shards: Path, capsys):
    file = write_sweep(tmp_path, shapes_shards)
    assert sweep.main([str(file), "--print"]) == 0
    trunk, short = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert trunk[:3] == shlex.split(COMMAND)
    assert trunk[-2:] == [f"output={tmp_path}/runs/trunk", "checkpoint.at=[pretrain-4]"]
    assert short[-1] == f"resume={tmp_path}/runs/trunk/checkpoints/pretrain-4"


FAKE_SBATCH = """#!/usr/bin/env bash
# Does what sbatch would: runs each task of the array, and says the job's number.
echo "$@" >> "$LOG"
cat > "$LOG.job"
for word in "$@"; do case "$word" in --array=0-*) last="${word#--array=0-}";; esac; done
for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$LOG.job" >> "$LOG.ran"; done
echo 41
"""


def test_slurm_arrays_run_every_command_and_forks_wait(tmp_path: Path, shapes_shards: Path, capsys):
    file = write_sweep(tmp_path, shapes_shards)
    more = "  other: {overrides: [\"data.val.shards='a b'\"]}\n  last: {after: short}\n"
    file.write_text(file.read_text() + more)
    assert sweep.main([str(file), "--slurm", "--command", "eval echo '$SRUN_CPUS_PER_TASK'"]) == 0
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(FAKE_SBATCH)
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "submit.sh").write_text(capsys.readouterr().out)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "LOG": str(log)}
    environment["SLURM_CPUS_PER_TASK"] = "7"  # which srun of some versions does not read
    command = ["bash", str(tmp_path / "submit.sh"), "--nodes=2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    first, second, third = log.read_text().splitlines()
    assert "--array=0-1" in first
    assert "--nodes=2" in first
    assert "--dependency" not in first
    assert "--array=0-0" in second
    assert "--dependency=afterok:41" in second
    assert "--dependency=afterok:41" in third
    ran = (tmp_path / "log.ran").read_text().splitlines()
    assert {line.split()[0] for line in ran} == {"7"}
    outputs = [re.search(r"output=\S+/runs/(\w+)", line).group(1) for line in ran]
    assert outputs == ["trunk", "other", "short", "last"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "run: trunk",
            "run: trank",
            r"runs\.short: fork\.run: found trank, .*earlier in the list: trunk",
        ),
        ("fork:", "after: trunk, fork:", r"runs\.short: after: a fork waits"),
        ("step: 4", "step: 7", r"runs\.short: fork\.step: found 7, expected 1 to 6"),
        ("phase: pretrain", "phase: train", r"runs\.short: fork\.phase: .* pretrain, finetune"),
        ("fork:", "frok:", r"runs\.short\.frok"),
        ("trunk: {}", "trunk: {overrides: [phases.pretrain.lr=-1]}", r"runs\.trunk: phases\.pretr"),
        ("trunk: {}", "trunk: {config: nowhere.yaml}", r"runs\.trunk: .*no such config"),
        ("config:", "# config:", r"runs\.trunk: config: not set"),
        ("output:", "# output:", "required and not set: output"),
        ("runs:", "seeds: [1, 1]\nruns:", r"seeds: found \[1, 1\], expected each once"),
        ("runs:", "seeds: []\nruns:", r"seeds: found \[\], expected each once"),
        ("trunk: {}", "trunk: {overrides: [output=x]}", r"runs\.trunk: overrides: found output=x"),
        ("trunk: {}", "a/b: {}", r"runs\.a/b: .*without /"),
    ],
)
def test_mistakes_name_the_run_and_the_key(
    tmp_path: Path, shapes_shards: Path, old: str, new: str, said: str
):
    file = write_sweep(tmp_path, shapes_shards)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said) as caught:
        load_sweep(file)
    assert str(caught.value).startswith(str(file))


ENDS = {
    "finishes, and the launcher fails": (["model.safetensors"], 1),
    "stops, and the launcher makes 1 of it": (["stopped"], 1),
    "leaves nothing, and the launcher says that all is well": ([], 0),
    "leaves nothing, and says that it stopped": ([], 75),
    "ends with an evaluation unscored": (["model.safetensors", "evaluation/x-1.detections"], 0),
}


@pytest.mark.parametrize(
    ("what", "failed"),
    [
        ("finishes, and the launcher fails", []),
        ("stops, and the launcher makes 1 of it", None),
        ("leaves nothing, and the launcher says that all is well", ["trunk", "short"]),
        ("leaves nothing, and says that it stopped", ["trunk", "short"]),
        ("ends with an evaluation unscored", ["trunk", "short"]),
    ],
)
def test_what_became_of_a_run_is_read_from_its_folder(
    tmp_path, shapes_shards, monkeypatch, what, failed
):
    _, runs = load_sweep(write_sweep(tmp_path, shapes_shards))
    files, code = ENDS[what]
    script = (
        "import sys, pathlib\n"
        "words = dict(word.split('=', 1) for word in sys.argv[2:])\n"
        f"for name in {files}:\n"
        "    file = pathlib.Path(words['output'], name)\n"
        "    file.parent.mkdir(parents=True, exist_ok=True)\n"
        "    file.touch()\n"
        f"sys.exit({code})\n"
    )
    monkeypatch.setattr(sweep, "_stop_requested", False)
    (tmp_path / "runs/trunk").mkdir(parents=True)
    (tmp_path / "runs/trunk/stopped").touch()  # by an earlier start
    found = sweep.run_all(runs, [sys.executable, "-c", script])
    assert sweep._stop_requested is (failed is None)
    assert found == (failed or [])
    assert (tmp_path / "runs/short").exists() is (failed == [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found ''"),
        ("nothing-there x", "found 'nothing-there x', .* such as"),
        ("a '", "No clos"),
    ],
)
def test_a_command_that_is_not_there_is_reported_before_the_first_run(
    tmp_path, shapes_shards, text, said
):
    file = write_sweep(tmp_path, shapes_shards)
    with pytest.raises(ConfigError, match=f"^--command: {said}"):
        sweep.main([str(file), "--command", text])
    file.write_text(file.read_text().replace("runs:", "rnus:"))
    with pytest.raises(ConfigError, match="is not a sweep, as it has no `runs`"):
        load_sweep(file)


def test_runs_on_several_data_sets_have_a_report_for_each(tmp_path: Path, shapes_shards: Path):
    file = write_sweep(
        tmp_path, shapes_shards, text=SWEEP[: SWEEP.index("  short")] + "  b: {{}}\n"
    )
    planned, runs = load_sweep(file)
    write_run(tmp_path / "runs/trunk", [0.1], "data.val.shards=data/one/val")
    sweep.report(planned, runs)  # the other run has not begun
    assert "| b | 0 |" in (tmp_path / "runs/report.md").read_text()
    assert (tmp_path / "runs/report.html").is_file()
    write_run(tmp_path / "runs/b", [0.2], "data.val.shards=./data/one/val/")
    sweep.report(planned, runs)  # on the same data, written otherwise
    assert (tmp_path / "runs/report.html").is_file()
    shutil.rmtree(tmp_path / "runs/b")
    write_run(tmp_path / "runs/b", [0.2], "data.val.shards=data/two/val", objects=7)
    sweep.report(planned, runs)
    text = (tmp_path / "runs/report.md").read_text()
    assert "| trunk | 1 | 10.0 |" in text
    assert "| b | 1 | 20.0 |" in text
    assert "- runs on data/two/val: report-two-val/report.html\n" in text
    assert not (tmp_path / "runs/report.html").exists()
    page = (tmp_path / "runs/report-two-val/report.html").read_text()
    assert "</i>b</button>" in page
    assert "</i>trunk</button>" not in page


def test_seeds_make_runs_of_their_own_and_forks_stay_with_their_seed(
    tmp_path: Path, shapes_shards: Path
):
    file = write_sweep(tmp_path, shapes_shards)
    file.write_text(file.read_text() + "seeds: [3, 5]\n")
    _, runs = load_sweep(file)
    assert [run.name for run in runs] == ["trunk-s3", "trunk-s5", "short-s3", "short-s5"]
    assert [run.config.seed for run in runs] == [3, 5, 3, 5]
    assert runs[3].config.resume.endswith("runs/trunk-s5/checkpoints/pretrain-4")


def test_a_sweep_that_another_process_makes_is_left_to_it(tmp_path: Path, shapes_shards: Path):
    file = write_sweep(tmp_path, shapes_shards)
    folder = tmp_path / "runs"
    folder.mkdir()
    with locks.held(folder, folder / "sweep.lock"):
        process = start(file)
        printed, _ = process.communicate(timeout=200)
        assert [path.name for path in folder.iterdir()] == ["sweep.lock"]
    assert process.returncode == 1, printed
    assert f"{folder}: process {os.getpid()} on {os.uname().nodename} writes here" in printed
