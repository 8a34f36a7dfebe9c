"""Which checkpoint a run goes on from, on its own machine and on another one."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from bigdet.config.load import dump_config, load_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.engine import keeping
from bigdet.engine.parts import Part, copy_share
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Disks, Save, next_number, write
from bigdet.run_dir import RunDir
from bigdet.training.starting_point import _fetch_frozen, fetch_newer, find_checkpoint

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


def config_of(run_dir: RunDir, resume: Path | str, *words: str) -> RunConfig:
    return load_config(CONFIG, [f"output={run_dir.root}", f"resume={resume}", *words])


def save(
    run_dir: RunDir,
    step: int,
    resume: Path | str = "auto",
    remote: Path | None = None,
    best: str | None = None,
) -> Path:
    """Write a checkpoint as a run that began at ``resume`` does, and copy it away."""
    folder = run_dir.checkpoint("pretrain", step)
    state = {"phase": "pretrain", "best_checkpoint": best}
    run = {"config": dump_config(config_of(run_dir, resume)), "run": state}
    one = Save(folder, next_number(run_dir.checkpoints), Disks(), {}, run)
    write(one, copy_share([Part("model", "w", (1,), 0, torch.zeros(1), is_whole=True)], 0, 1))
    if remote is not None:
        Remote(f"file://{remote}").copy(one, lambda name: True)
    return folder


def checkpoints(run_dir: RunDir) -> list[str]:
    return sorted(path.parent.name for path in run_dir.checkpoints.glob("*/state.json"))


def test_a_fork_that_was_refused_or_killed_before_it_began_begins_there_or_elsewhere(
    tmp_path: Path,
):
    trunk, fork = RunDir(tmp_path / "trunk"), RunDir(tmp_path / "fork")
    fifth, sixth = (save(trunk, step) for step in (5, 6))
    config = config_of(fork, fifth)
    for _ in range(2):  # refused for its options, and started again with others
        assert find_checkpoint(config, fork) == fork.checkpoint("pretrain", 5)
    fork.latest.unlink()  # killed when the copy was in its place
    assert find_checkpoint(config, fork) == fork.checkpoint("pretrain", 5)
    assert fork.latest.read_text() == "pretrain-5\n"
    fork.config.write_text(dump_config(config_of(fork, "auto")))  # killed before its first save
    assert find_checkpoint(config_of(fork, sixth), fork) == fork.checkpoint("pretrain", 6)
    assert checkpoints(fork) == ["pretrain-6"]
    fork.config.write_text(dump_config(config_of(fork, sixth)))  # it has begun
    save(fork, 9, sixth)
    shutil.rmtree(trunk.root)
    assert find_checkpoint(config_of(fork, sixth), fork) == fork.checkpoint("pretrain", 9)
    with pytest.raises(ConfigError, match="pretrain-5 is not a checkpoint"):
        find_checkpoint(config, fork)


def test_a_fork_goes_on_from_its_remote_on_another_machine(tmp_path: Path):
    trunk, remote = RunDir(tmp_path / "trunk"), tmp_path / "remote"
    fifth, sixth = (save(trunk, step) for step in (5, 6))
    machines = [RunDir(tmp_path / name / "fork") for name in ("lost", "fresh")]
    word = f"checkpoint.remote=file://{remote}"

    def start(run_dir: RunDir, resume: Path | str) -> Path | None:
        config = config_of(run_dir, resume, word)
        fetch_newer(config, run_dir)
        return find_checkpoint(config, run_dir)

    lost, fresh = machines
    assert start(lost, fifth) == lost.checkpoint("pretrain", 5)  # nothing is there yet
    save(lost, 10, fifth, remote)
    words = (
        r"resume: found .*pretrain-6, but .*/remote, has checkpoints of a run that did not begin"
    )
    with pytest.raises(ValueError, match=words):
        start(fresh, sixth)
    assert start(fresh, fifth) == fresh.checkpoint("pretrain", 10)
    assert checkpoints(fresh) == ["pretrain-10"]
    save(fresh, 20, fifth, remote)
    shutil.rmtree(trunk.root)
    assert start(lost, fifth) == lost.checkpoint("pretrain", 20)  # the first machine, once more
    # Who asks for an earlier one of the run itself gets that one.
    save(fresh, 30, fifth, remote)
    assert start(lost, lost.checkpoint("pretrain", 10)) == lost.checkpoint("pretrain", 10)
    assert checkpoints(lost) == ["pretrain-10", "pretrain-20", "pretrain-5"]


def test_the_best_checkpoint_comes_along_or_is_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    remote, here, other = tmp_path / "remote", RunDir(tmp_path / "here"), RunDir(tmp_path / "other")
    config = config_of(other, "auto", f"checkpoint.remote=file://{remote}")
    for step in (1, 2, 3):
        save(here, step, remote=remote, best="pretrain-1")
    fetch_newer(config, other)
    assert checkpoints(other) == ["pretrain-1", "pretrain-3"]
    assert other.best.read_text() == "pretrain-1\n"
    assert other.latest.read_text() == "pretrain-3\n"
    keeping.mark_best(other.checkpoint("pretrain", 3))  # its evaluation, after it was saved
    fetch_newer(config, other)
    assert other.best.read_text() == "pretrain-3\n"
    save(here, 4, remote=remote, best="pretrain-4")
    fetch_newer(config, other)  # again on the other machine, which has the former best
    assert other.best.read_text() == "pretrain-4\n"
    assert not caplog.messages
    save(here, 5, remote=remote, best="pretrain-2")
    shutil.rmtree(remote / "pretrain-2")
    fetch_newer(config, other)
    (message,) = caplog.messages
    assert message.startswith("pretrain-2, the best checkpoint so far, is neither here nor at file")


def test_the_best_here_stays_if_it_is_later_and_a_finished_run_is_left_as_it_is(tmp_path: Path):
    remote, run_dir = tmp_path / "remote", RunDir(tmp_path / "run")
    config = config_of(run_dir, "auto", f"checkpoint.remote=file://{remote}")
    for step in (1, 2):
        save(run_dir, step, remote=remote, best="pretrain-1")
    save(run_dir, 1, best="pretrain-1")  # again, and not copied
    fetch_newer(config, run_dir)
    assert keeping.numbers(run_dir.checkpoints) == {"pretrain-1": 3, "pretrain-2": 2}
    assert run_dir.best.read_text() == "pretrain-1\n"
    run_dir.best.unlink()
    run_dir.weights.touch()
    fetch_newer(config, run_dir)
    assert not run_dir.best.exists()


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
