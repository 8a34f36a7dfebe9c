"""Saving during training: what a step waits for, and what happens when a save fails."""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigdet import distributed
from bigdet.config.load import load_config
from bigdet.config.phase import num_steps
from bigdet.data.format.phase_sets import DataSets
from bigdet.engine import checkpoint, keeping, writing
from bigdet.engine.parts import Part, Share, copy_share
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Save
from bigdet.models.weights import find_weights
from bigdet.run_dir import RunDir
from bigdet.training.saving import Saver, newest_checkpoint, write_final_weights
from bigdet.training.state import RunState
from bigdet.training.uploads import Uploads
from tests.shipped import unchecked

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def share_of(weights: dict[str, torch.Tensor]) -> Share:
    parts = [
        Part("model", name, tuple(value.shape), 0, value, is_whole=True)
        for name, value in weights.items()
    ]
    return copy_share(parts, 0, 1)


class FakeEngine:
    """Gives 400 KB of state."""

    def share(self, position: int, size: int) -> Share:
        assert (position, size) == (0, 1)
        return share_of({"weight": torch.zeros(100_000)})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def saver(run_dir: RunDir) -> Saver:
    train_set: Any = SimpleNamespace(categories=[])
    sets = dict.fromkeys(("pretrain", "finetune"), DataSets(train_set, train_set))
    return Saver(load_config(CONFIG, ["checkpoint.keep=1"]), run_dir, sets)


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Gives a function that lets no file grow beyond 50 KB, or lets them again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(is_full: bool) -> None:
        soft = 50_000 if is_full else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))

    yield set_full
    set_full(False)


def save(saver: Saver, step: int) -> None:
    engine: Any = FakeEngine()
    saver.save(engine, RunState("pretrain", step=step))


def test_a_frozen_backbone_that_an_earlier_version_named_goes_away_by_its_name_of_today(
    run_dir: RunDir, tmp_path: Path
) -> None:
    train_set: Any = SimpleNamespace(categories=[])
    sets = {"pretrain": DataSets(train_set, train_set)}
    remote = tmp_path / "remote"
    saver = Saver(load_config(CONFIG, [f"checkpoint.remote=file://{remote}"]), run_dir, sets)
    digest = "ab" * 32
    run_dir.frozen("").parent.mkdir()
    run_dir.frozen("").with_name("pretrain.safetensors").write_bytes(b"backbone")
    engine: Any = FakeEngine()
    saver.save(engine, RunState("pretrain", step=1, frozen=digest))
    saver.wait()
    saver.finish_copies()
    # What another machine asks for: see starting_point._fetch_frozen.
    assert [path.name for path in (remote / "frozen").iterdir()] == [run_dir.frozen(digest).name]
    assert (remote / "frozen" / f"{digest[:16]}.safetensors").read_bytes() == b"backbone"


@pytest.fixture
def uploading(run_dir: RunDir, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once files may be copied to the address of a saver, which keeps one checkpoint."""
    may_copy, put = threading.Event(), Remote._put

    def slow_put(*arguments: Any) -> None:
        assert may_copy.wait(60)
        put(*arguments)

    monkeypatch.setattr(Remote, "_put", slow_put)
    saver._uploads = Uploads(Remote(f"file://{run_dir.root}/remote"))
    return may_copy


def test_saves_do_not_wait_for_a_copy_and_the_last_is_copied_at_the_end(
    saver: Saver, run_dir: RunDir, uploading: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    remote = run_dir.root / "remote"
    for step in (1, 2, 3):
        save(saver, step)
    saver.finish()  # of a phase
    # The second is neither newest nor on its way, and keep=1.
    assert names(run_dir) == ["latest", "pretrain-1", "pretrain-3"]
    assert newest_checkpoint(run_dir) == run_dir.checkpoints / "pretrain-3"
    assert not (remote / "latest").exists()
    assert [f"pretrain-{step} is not copied" in caplog.text for step in (1, 2, 3)] == [
        False, True, True,
    ]  # fmt: skip
    uploading.set()
    saver.finish_copies()
    assert sorted(path.name for path in remote.iterdir()) == names(run_dir)
    assert (remote / "latest").read_text() == "pretrain-3\n"
    assert checkpoint.load(remote / "pretrain-3").run["run"]["step"] == 3


def test_a_checkpoint_that_is_saved_again_while_it_is_copied_is_copied_again(
    saver: Saver, run_dir: RunDir, uploading: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    save(saver, 1)
    save(saver, 1)  # as before and after each evaluation
    saver.wait()
    uploading.set()
    with caplog.at_level(logging.INFO, "bigdet"):
        saver.finish_copies()
    assert "pretrain-1 is written again: its earlier state is not copied" in caplog.text
    assert "is on this machine only" not in caplog.text
    remote = run_dir.root / "remote"
    assert checkpoint.load(remote / "pretrain-1").run["run"]["step"] == 1
    assert {path.name for path in (remote / "pretrain-1").iterdir()} >= {"index-2.json"}


def test_a_copy_that_hangs_is_a_warning_at_the_end(
    saver: Saver, run_dir: RunDir, uploading: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    save(saver, 1)
    saver.finish()
    saver.join(0.01)  # as a run that ends
    assert f"checkpoint pretrain-1 is on this machine only, not at file://{run_dir.root}" in (
        caplog.text
    )
    assert "its copy takes longer than 0.01 s" in caplog.text


def test_checkpoints_at_the_address_that_are_of_no_phase_of_the_run_stay(
    run_dir: RunDir, tmp_path: Path
) -> None:
    train_set: Any = SimpleNamespace(categories=[])
    sets = dict.fromkeys(("pretrain", "finetune"), DataSets(train_set, train_set))
    remote = tmp_path / "remote"
    for name in ("train-1", "pretrain-best", "finetune-3", "pretrain-3"):
        (remote / name).mkdir(parents=True)
        (remote / name / "index-1.json").touch()
    saver = Saver(load_config(CONFIG, [f"checkpoint.remote=file://{remote}"]), run_dir, sets)
    save(saver, 4)
    saver.wait()
    saver.finish_copies()
    assert sorted(path.name for path in remote.iterdir()) == [
        "latest", "pretrain-4", "pretrain-best", "train-1",
    ]  # fmt: skip


def names(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.checkpoints.iterdir())


def test_training_continues_while_a_checkpoint_is_written_and_one_is_written_at_a_time(
    saver: Saver, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, running = threading.Event(), []
    original = writing.write

    def slow_save(one: Save, *rest: Any) -> None:
        running.append(one.folder.name)
        assert may_write.wait(20)
        original(one, *rest)
        running.remove(one.folder.name)

    monkeypatch.setattr(writing, "write", slow_save)
    save(saver, 1)  # returns although nothing can be written yet
    assert newest_checkpoint(run_dir) is None
    second = threading.Thread(target=save, args=(saver, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save did not wait for the first"
    assert running == ["pretrain-1"]
    may_write.set()
    second.join()
    saver.finish()
    assert names(run_dir) == ["latest", "pretrain-2"]
    saved = checkpoint.load(run_dir.checkpoints / "pretrain-2")
    assert saved.run["run"]["step"] == 2


def test_a_full_disk_is_a_warning_and_the_next_save_makes_it_good(
    saver: Saver, run_dir: RunDir, full_disk: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save(saver, 1)
    saver.wait()
    full_disk(True)
    with caplog.at_level(logging.WARNING, "bigdet"):
        save(saver, 2)
        saver.join()
        # At once: the next save may be an hour away.
        (warning,) = (record.getMessage() for record in caplog.records)
    assert f"{run_dir.checkpoints}/pretrain-2: cannot write the checkpoint" in warning
    assert "The run continues" in warning
    full_disk(False)
    save(saver, 3)
    saver.finish()
    assert len(caplog.records) == 1
    assert names(run_dir) == ["latest", "pretrain-3"]


def test_a_second_failure_in_a_row_ends_the_run_with_the_checkpoint_before_untouched(
    saver: Saver, run_dir: RunDir, full_disk: Any
) -> None:
    save(saver, 1)
    saver.wait()
    full_disk(True)
    save(saver, 2)
    save(saver, 3)
    with pytest.raises(distributed.SharedError, match=r"pretrain-3: cannot write.*in a row"):
        save(saver, 4)
    full_disk(False)
    assert names(run_dir) == ["latest", "pretrain-1"]
    assert checkpoint.load(run_dir.checkpoints / "pretrain-1").run["run"]["step"] == 1


def test_a_save_that_dies_of_whatever_is_no_save(
    saver: Saver, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room to hash")

    monkeypatch.setattr(writing, "write", fail)
    save(saver, 1)
    with pytest.raises(distributed.SharedError, match="the last checkpoint could not be written"):
        saver.finish()
    assert "pretrain-1: cannot write the checkpoint: MemoryError('no room to hash')" in caplog.text


def test_final_weights_are_on_the_disk_before_they_have_their_name(
    run_dir: RunDir, disk_calls: list[str]
) -> None:
    config = unchecked(CONFIG, ["phases.finetune.steps=3"])
    source = run_dir.checkpoint("finetune", 3) / "model.safetensors"
    source.parent.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, source)
    write_final_weights(config, run_dir)
    assert run_dir.weights.read_bytes() == source.read_bytes()
    assert disk_calls == ["sync model.tmp", "name model.safetensors", f"sync {run_dir.root.name}"]


def test_the_last_save_of_a_run_must_succeed(saver: Saver, run_dir: RunDir, full_disk: Any) -> None:
    save(saver, 1)
    saver.wait()
    full_disk(True)
    save(saver, 2)
    with pytest.raises(distributed.SharedError, match=r"continues from .*pretrain-1\."):
        saver.finish()


class DivergedEngine:
    """Gives a weight and a running variance, the latter infinite."""

    def share(self, position: int, size: int) -> Share:
        variance = torch.tensor([1.0, float("inf")])
        return share_of({"bn.weight": torch.ones(2), "bn.running_var": variance})


def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_ones_named(
    saver: Saver, run_dir: RunDir
) -> None:
    save(saver, 1)
    engine: Any = DivergedEngine()
    with pytest.raises(distributed.SharedError) as caught:
        saver.save(engine, RunState("pretrain", step=2))
    assert str(caught.value).startswith(
        "pretrain step 2: 1 of 2 tensors is not finite: bn.running_var (1 of 2 numbers). "
    )
    assert str(caught.value).endswith(
        f"Last good checkpoint: {run_dir.checkpoints / 'pretrain-1'}."
    )
    assert names(run_dir) == ["latest", "pretrain-1"]


class OverflownEngine:
    """Gives finite weights, and a mean of squared gradients with an infinity in its first piece."""

    def share(self, position: int, size: int) -> Share:
        squares = torch.tensor([1.0, float("inf")])
        parts = [
            Part("model", "fc.weight", (2,), 0, torch.ones(2), is_whole=True),
            Part("exp_avg_sq", "fc.weight", (4,), 0, squares),
            Part("exp_avg_sq", "fc.weight", (4,), 2, torch.ones(2)),
        ]
        return copy_share(parts, 0, 1)


def test_optimizer_state_that_a_resume_would_refuse_is_not_saved_either(
    saver: Saver, run_dir: RunDir
) -> None:
    save(saver, 1)
    engine: Any = OverflownEngine()
    with pytest.raises(
        distributed.SharedError,
        match=r"1 of 3 tensors is not finite: fc\.weight/exp_avg_sq \(1 of 2",
    ):
        saver.save(engine, RunState("pretrain", step=2))
    assert names(run_dir) == ["latest", "pretrain-1"]  # and not deleted, though checkpoint.keep=1


def test_ends_of_phases_and_the_best_have_their_weights_in_one_file(
    saver: Saver, run_dir: RunDir
) -> None:
    last = num_steps(load_config(CONFIG).phases["pretrain"])
    save(saver, 1)
    saver.wait()
    keeping.mark_best(run_dir.checkpoint("pretrain", 1))  # once its score is known
    save(saver, 2)
    save(saver, last)
    save(saver, last + 1)
    saver.finish()
    found = {folder.name: find_weights(folder).name for folder in run_dir.checkpoints.glob("*-*")}
    assert found == {
        "pretrain-1": "model.safetensors",
        f"pretrain-{last}": "model.safetensors",
        f"pretrain-{last + 1}": f"pretrain-{last + 1}",
    }
    keeping.mark_best(run_dir.checkpoint("pretrain", last + 1))
    saver.finish()  # of a run that ends
    assert find_weights(run_dir.checkpoint("pretrain", last + 1)).is_file()
