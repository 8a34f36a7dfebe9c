"""Which checkpoint a run goes on from, on its own machine and on another one."""

import json
from pathlib import Path

import pytest

from bigdet.config.load import dump_config, load_config
from bigdet.config.rules import ConfigError
from bigdet.engine import keeping
from bigdet.engine.remote import Remote
from bigdet.run_dir import RunDir
from bigdet.training.starting_point import _fetch_frozen, find_checkpoint

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with one checkpoint."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.checkpoint("pretrain", 5).mkdir(parents=True)
    (run_dir.checkpoint("pretrain", 5) / "state.json").write_text("{}")
    run_dir.latest.write_text("pretrain-5\n")
    run_dir.config.write_text(dump_config(load_config(CONFIG)))
    return run_dir


def test_auto_continues_from_the_latest_and_never_refuses_it(run_dir: RunDir):
    newest = run_dir.checkpoint("pretrain", 5)
    assert find_checkpoint(load_config(CONFIG), run_dir) == newest
    assert find_checkpoint(load_config(CONFIG), RunDir(run_dir.root / "new")) is None
    with pytest.raises(ConfigError, match=r"resume: found never, but .* has checkpoints"):
        find_checkpoint(load_config(CONFIG, ["resume=never"]), run_dir)


def test_a_named_checkpoint_begins_a_new_folder_and_no_other(run_dir: RunDir, tmp_path: Path):
    named = run_dir.checkpoint("pretrain", 5)
    config = load_config(CONFIG, [f"resume={named}"])
    new = RunDir(tmp_path / "new")
    assert find_checkpoint(config, new) == new.checkpoint("pretrain", 5)
    assert (new.checkpoint("pretrain", 5) / "state.json").is_file()
    new.config.write_text(dump_config(config))
    assert find_checkpoint(config, new) == new.checkpoint("pretrain", 5)  # the same command again
    elsewhere = load_config(CONFIG, [f"resume={new.checkpoint('pretrain', 5)}"])
    with pytest.raises(ConfigError, match="has its own checkpoints"):
        find_checkpoint(elsewhere, run_dir)


def test_an_ended_run_continues_only_for_an_evaluation_that_is_not_scored(run_dir: RunDir):
    config, newest = load_config(CONFIG), run_dir.checkpoint("pretrain", 5)
    run_dir.weights.touch()
    with pytest.raises(ConfigError, match="holds a finished run"):
        find_checkpoint(config, run_dir)
    left = run_dir.detections("pretrain", 5)
    left.parent.mkdir()
    left.touch()
    assert not run_dir.is_finished
    assert find_checkpoint(config, run_dir) == newest
    run_dir.latest.unlink()  # without a checkpoint it would begin anew
    with pytest.raises(ConfigError, match="holds a finished run"):
        find_checkpoint(config, run_dir)


def test_an_earlier_checkpoint_of_the_run_becomes_the_latest_once(run_dir: RunDir):
    earlier, newest = run_dir.checkpoint("pretrain", 3), run_dir.checkpoint("pretrain", 5)
    earlier.mkdir()
    (earlier / "state.json").write_text("{}")
    config = load_config(CONFIG, [f"resume={earlier}"])
    assert find_checkpoint(config, run_dir) == earlier
    run_dir.config.write_text(dump_config(config))  # as the run that began there writes it
    run_dir.latest.write_text("pretrain-5\n")
    assert find_checkpoint(config, run_dir) == newest


def test_a_frozen_backbone_comes_from_the_remote_or_from_the_run_of_an_earlier_version(
    tmp_path: Path,
):
    run_dir, there = RunDir(tmp_path / "run"), tmp_path / "remote" / "frozen"
    folder, digest = run_dir.checkpoints / "pretrain-2", "ab" * 32
    folder.mkdir(parents=True)
    state = {"files": {}, "run": {"phase": "pretrain", "frozen": digest}}
    (folder / "state.json").write_text(json.dumps(state))
    keeping.mark_latest(folder)
    there.mkdir(parents=True)
    remote = Remote(f"file://{tmp_path}/remote")
    words = "has no frozen/abababababababab.safetensors, the frozen backbone of the checkpoint pre"
    with pytest.raises(ValueError, match=words):
        _fetch_frozen(remote, run_dir)
    (there / "abababababababab.safetensors").write_bytes(b"there")
    earlier = run_dir.frozen("").with_name("pretrain.safetensors")
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_bytes(b"here")
    _fetch_frozen(remote, run_dir)
    assert not run_dir.frozen(digest).exists()  # the other name is found too
    earlier.unlink()
    _fetch_frozen(remote, run_dir)
    assert run_dir.frozen(digest).read_bytes() == b"there"
