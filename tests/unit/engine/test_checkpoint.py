"""Checkpoints on disk: round trip, damage, crashes, full disks, what is kept."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bigdet import distributed
from bigdet.engine import checkpoint
from bigdet.engine.base import EngineState

METADATA = {"phase": "train", "config": "output: x"}


def make_state(step: int) -> EngineState:
    return EngineState(
        {"head.weight": torch.full((2, 3), float(step)), "head.count": torch.tensor(step)},
        {"head.weight": {"exp_avg": torch.full((2, 3), -1.5), "step": torch.tensor(float(step))}},
    )


def save(folder: Path, phase: str, step: int) -> Path:
    path = folder / f"{phase}-{step}"
    checkpoint.save(path, make_state(step), METADATA, {"phase": phase, "step": step})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", "train", 7)
    loaded = checkpoint.load(path)
    assert loaded.run == {"phase": "train", "step": 7}
    torch.testing.assert_close(vars(loaded.engine), vars(make_state(7)), rtol=0, atol=0)
    assert (tmp_path / "checkpoints/latest").read_text() == "train-7\n"
    assert names(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert names(tmp_path / "checkpoints") == ["latest", "train-7"]
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == METADATA
    with safe_open(path / "optimizer.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["head.weight/exp_avg", "head.weight/step"]


def test_state_before_the_first_step_has_no_optimizer(tmp_path: Path) -> None:
    state = EngineState({"weight": torch.zeros(0, 4)}, {})
    checkpoint.save(tmp_path / "train-0", state, {}, {})
    loaded = checkpoint.load(tmp_path / "train-0").engine
    torch.testing.assert_close(vars(loaded), vars(state), rtol=0, atol=0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def raise_step(path: Path) -> None:
    content = json.loads(path.read_text())
    content["step"] += 1
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("model.safetensors", cut_short, r"has \d+ bytes, expected \d+ bytes"),
        ("optimizer.safetensors", flip_last_bit, "altered since it was written"),
        ("optimizer.safetensors", Path.unlink, r"missing, expected \d+ bytes"),
        ("state.json", cut_short, "cut short"),
        ("state.json", raise_step, "altered since it was written"),
        ("state.json", Path.unlink, "missing"),
    ],
)
def test_damaged_file_is_named_with_the_checkpoint_before_it(
    tmp_path: Path, name: str, damage: Any, found: str
) -> None:
    first, second, third = (save(tmp_path, *key) for key in (("b", 10), ("b", 20), ("a", 5)))
    damage(third / name)
    with pytest.raises(ValueError, match=f"{third}/{name}.*{found}.* resume={second}\\."):
        checkpoint.load(third)
    flip_last_bit(second / "model.safetensors")
    with pytest.raises(ValueError, match=f"{third}/{name}.* resume={first}\\."):
        checkpoint.load(third)
    flip_last_bit(first / "model.safetensors")
    with pytest.raises(ValueError, match="No earlier one can be used"):
        checkpoint.load(third)


def test_checkpoints_after_a_broken_one_are_not_proposed(tmp_path: Path) -> None:
    first = save(tmp_path, "train", 10)
    save(tmp_path, "train", 20)
    flip_last_bit(first / "model.safetensors")
    with pytest.raises(ValueError, match="No earlier one can be used"):
        checkpoint.load(first)


def test_full_disk_is_one_error_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    first = save(tmp_path, "train", 1)
    state = EngineState({"weight": torch.zeros(100_000)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"train-2: cannot write .* GiB are free.*make room"):
            checkpoint.save(tmp_path / "train-2", state, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["latest", "train-1"]
    assert checkpoint.load(first).run["step"] == 1


@pytest.mark.parametrize("name", ["train-2", "train-1"])
def test_death_at_any_point_of_a_save_leaves_a_usable_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # train-1 is there; then train-2 is written, or train-1 again. A kill is simulated before each
    # rename, sync and deletion in turn: nothing after it happens.
    left = 0

    def deadly(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", deadly(os.fsync))
    monkeypatch.setattr(checkpoint, "_delete", deadly(checkpoint._delete))
    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(os, "replace", deadly(os.replace))
    num_deaths, is_dead = 0, True
    while is_dead:
        folder = tmp_path / str(num_deaths)
        left = 1000
        save(folder, "train", 1)
        left = num_deaths
        try:
            checkpoint.save(folder / name, make_state(2), {}, {"step": 2})
            is_dead = False
        except KeyboardInterrupt:
            num_deaths += 1
        left = 1000
        latest = (folder / "latest").read_text().strip()
        assert checkpoint.load(folder / latest).run["step"] in (1, 2)
        checkpoint.save(folder / name, make_state(2), {}, {"step": 2})  # the run, started again
        assert checkpoint.load(folder / name).run["step"] == 2
        checkpoint.clean(folder, keep=2, protected=[])
        assert names(folder) == sorted({"latest", "train-1", name})
    assert num_deaths > 8


def test_saving_again_under_a_name_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, "train", 1)
    checkpoint.save(tmp_path / "train-1", make_state(9), {}, {"step": 9})
    assert checkpoint.load(tmp_path / "train-1").run == {"step": 9}
    assert names(tmp_path) == ["latest", "train-1"]


def test_newest_best_and_protected_checkpoints_are_kept(tmp_path: Path) -> None:
    # In the order in which they are written; steps start anew in each phase.
    for phase, step in (("b", 10), ("b", 20), ("b", 30), ("a", 1), ("a", 2), ("a", 3), ("a", 4)):
        save(tmp_path, phase, step)
    checkpoint.mark_best(tmp_path / "b-20")
    (tmp_path / ".part-a-5").mkdir()
    (tmp_path / ".part-a-5/model.safetensors").write_bytes(b"half")
    checkpoint.clean(tmp_path, keep=2, protected=["b-30", "a-9"])
    assert names(tmp_path) == ["a-3", "a-4", "b-20", "b-30", "best", "latest"]
    assert (tmp_path / "best").read_text() == "b-20\n"
    checkpoint.clean(tmp_path, keep=0, protected=[])
    assert names(tmp_path) == ["a-4", "b-20", "best", "latest"]  # the latest always stays


def test_every_kth_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, "train", step)
    checkpoint.clean(tmp_path, keep=1, protected=[], keep_every=20)
    assert names(tmp_path) == ["latest", "train-20", "train-40", "train-50"]


def test_the_loss_scale_is_kept(tmp_path: Path) -> None:
    scale = {"value": 1024.0, "good_steps": 7}
    state = dataclasses.replace(make_state(1), loss_scale=scale)
    checkpoint.save(tmp_path / "train-1", state, {}, {})
    loaded = checkpoint.load(tmp_path / "train-1")
    assert loaded.engine.loss_scale == scale
    assert loaded.run == {}


def test_cleaning_where_nothing_was_saved_does_nothing(tmp_path: Path) -> None:
    checkpoint.clean(tmp_path / "absent", keep=2, protected=[])
    assert not (tmp_path / "absent").exists()


def spoil(state: EngineState) -> EngineState:
    """The state with one weight that is not a number."""
    state.model["head.weight"][1, 2] = float("nan")
    return state


def test_weights_that_are_not_finite_are_refused_for_the_newest_that_are(tmp_path: Path) -> None:
    good = save(tmp_path, "train", 1)
    for step in (2, 3):  # an older version wrote them
        checkpoint.save(tmp_path / f"train-{step}", spoil(make_state(step)), METADATA, {})
    found = r"train-3/model\.safetensors: 1 of 2 tensors is not finite: head\.weight \(1 of 6"
    with pytest.raises(ValueError, match=rf"{found}.*Go on with resume={good}"):
        checkpoint.load(tmp_path / "train-3")
    assert checkpoint.newest_usable(tmp_path) == good
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.adopt(tmp_path / "train-2", tmp_path / "fork")
    assert not (tmp_path / "fork").exists()
    checkpoint.save(good, spoil(make_state(1)), METADATA, {})
    assert checkpoint.newest_usable(tmp_path) is None


def test_an_optimizer_that_is_not_finite_is_refused_too(tmp_path: Path) -> None:
    good, state = save(tmp_path, "train", 1), make_state(2)
    state.optimizer["head.weight"]["exp_avg"][0, 0] = float("inf")
    checkpoint.save(tmp_path / "train-2", state, METADATA, {})
    found = r"train-2/optimizer\.safetensors: 1 of 2 tensors is not finite: head\.weight/exp_avg"
    with pytest.raises(ValueError, match=rf"{found}.*Go on with resume={good}"):
        checkpoint.load(tmp_path / "train-2")
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.adopt(tmp_path / "train-2", tmp_path / "fork")
    assert checkpoint.newest_usable(tmp_path) == good


def test_the_state_file_is_strict_json(tmp_path: Path) -> None:
    run = {"best": float("nan"), "seconds": float("inf")}
    checkpoint.save(tmp_path / "train-1", make_state(1), METADATA, run)
    text = (tmp_path / "train-1/state.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert checkpoint.load(tmp_path / "train-1").run == {"best": None, "seconds": None}


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_what_the_system_says_is_no_damage_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path / "checkpoints", "train", 6)
    path = save(tmp_path / "checkpoints", "train", 7)
    opened = io.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file) == str(path / name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(distributed.SharedError, match="Permission denied") as caught:
        checkpoint.load(path)
    assert name in str(caught.value)
    assert "resume=" not in str(caught.value)  # no advice to go back to train-6
