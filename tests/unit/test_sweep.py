"""What a sweep makes of its list, and which finished runs it takes for its own; nothing trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigdet import sweep
from bigdet.config.load import dump_config, load_config
from bigdet.config.rules import ConfigError
from bigdet.config.sweep import load_sweep
from bigdet.data.format.phase_sets import open_phase_sets
from bigdet.run_dir import RunDir
from bigdet.training.resume import settle_config
from tests.unit.data.small_shards import write_set

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PRETRAIN = "phases.pretrain"
IN_STEPS = [f"{PRETRAIN}.images_per_gpu=4", f"{PRETRAIN}.images_per_step=16"]
DROPS = [f"{PRETRAIN}.schedule=step", f"{PRETRAIN}.warmup_steps=10"]


def write_sweep(folder: Path, runs: dict[str, Any], *overrides: str) -> Path:
    file = folder / "sweep.yaml"
    values = {"output": str(folder / "runs"), "config": str(QUICKSTART), "runs": runs}
    file.write_text(json.dumps({**values, "overrides": overrides}))
    return file


def finish(folder: Path, overrides: list[str], data: bool = False) -> None:
    """Write the folder of a finished run as ``train`` leaves it."""
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    config = load_config(QUICKSTART, [*overrides, f"output={folder}"])
    config = settle_config(config, None, None, open_phase_sets(config) if data else None)
    run_dir.config.write_text(dump_config(config))
    run_dir.weights.touch()


@pytest.mark.parametrize(
    ("made", "now", "said"),
    [
        ([], [], ""),
        (["steps=300"], ["steps=3000"], r"pretrain\.steps \(was 300, now 3000\)"),
        ([], ["images_per_step=32"], r"pretrain\.images_per_step \(was 16, now 32\)"),
        ([], ["images_per_step=null"], ""),  # by ranks
        (["drops=[-50]"], ["drops=[250]"], ""),
        (["drops=[-50]"], ["drops=[-60]"], r"pretrain\.drops \(was \[250\], now \[240\]\)"),
        (["drops=[250]"], ["steps=null", "images=4800", "drops=[-800]"], ""),  # 300 and 50 steps
        (
            ["drops=[250]"],
            ["steps=null", "images=4816", "drops=[4000]"],
            r"pretrain\.steps \(was 300, now 301\)",
        ),
    ],
)
def test_a_finished_run_has_the_length_batch_and_drops_that_the_sweep_lists(
    tmp_path: Path, made: list[str], now: list[str], said: str
):
    base = [*IN_STEPS, *DROPS, f"{PRETRAIN}.steps=300"]
    made, now = ([*base, *(f"{PRETRAIN}.{word}" for word in words)] for words in (made, now))
    finish(tmp_path / "runs" / "a", made)
    (run,) = load_sweep(write_sweep(tmp_path, {"a": {"overrides": now}}))[1]
    if not said:
        sweep._check_finished(run)
    else:
        with pytest.raises(ConfigError, match=rf"^runs\.a: .*: phases\.{said}[^()]*$"):
            sweep._check_finished(run)


def test_lengths_in_passes_are_compared_where_the_data_are(tmp_path: Path, caplog):
    for split in ("train", "val"):
        write_set(tmp_path / split, num_shards=1, per_shard=10)
    data = [f"data.{split}.shards={tmp_path}/{split}" for split in ("train", "val")]
    both = ["images_per_gpu=4", "images_per_step=4"]
    words = [f"phases.{name}.{word}" for name in ("pretrain", "finetune") for word in both]
    words += [*data, f"{PRETRAIN}.steps=null", f"{PRETRAIN}.warmup_steps=0"]
    finish(tmp_path / "runs" / "a", [*words, f"{PRETRAIN}.passes=2"], data=True)
    for passes, said in ((2, ""), (3, r"pretrain\.steps \(was 6, now 9\)")):  # 3 steps in a pass
        overrides = [*words, f"{PRETRAIN}.passes={passes}"]
        (run,) = load_sweep(write_sweep(tmp_path, {"a": {"overrides": overrides}}))[1]
        if said:
            with pytest.raises(ConfigError, match=said):
                sweep._check_finished(run)
            (tmp_path / "train" / "manifest.json").unlink()
        sweep._check_finished(run)
    assert "lengths in passes cannot be compared" in caplog.text


def test_runs_of_a_sweep_copy_their_checkpoints_to_addresses_of_their_own(tmp_path: Path):
    own = "checkpoint.remote=memory://bucket/of_c"
    runs = {"a": {}, "b": {}, "c": {"overrides": [own]}}
    file = write_sweep(tmp_path, runs, "checkpoint.remote=memory://bucket/x/")
    planned = load_sweep(file)[1]
    expected = ["memory://bucket/x/a", "memory://bucket/x/b", "memory://bucket/of_c"]
    assert [run.config.checkpoint.remote for run in planned] == expected
    assert load_config(*[planned[1].config_file, planned[1].overrides]) == planned[1].config


@pytest.mark.parametrize(
    ("phase", "step", "said"),
    [
        ("pretrain", 99, "found pretrain-99, but b begins at pretrain-100 of a. Fork from a"),
        ("pretrain", 100, ""),
        ("finetune", 1, ""),
    ],
)
def test_a_fork_of_a_fork_begins_where_that_one_has_begun(
    tmp_path: Path, phase: str, step: int, said: str
):
    runs = {
        "a": {},
        "b": {"fork": {"run": "a", "phase": "pretrain", "step": 100}},
        "c": {"fork": {"run": "b", "phase": phase, "step": step}},
    }
    file = write_sweep(tmp_path, runs)
    if not said:
        assert load_sweep(file)[1][2].config.resume.endswith(f"runs/b/checkpoints/{phase}-{step}")
    else:
        with pytest.raises(ConfigError, match=rf"runs\.c: fork\.step: {said}"):
            load_sweep(file)
