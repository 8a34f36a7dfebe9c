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
from bigdet.engine import checkpoint, keeping, writing
from bigdet.engine.parts import Piece, Share
from bigdet.engine.whole import write_whole
from bigdet.engine.writing import Disks, Save
from bigdet.pieces.reading import Stored
from bigdet.pieces.tensor_file import Spec

METADATA = {"phase": "train", "config": "output: x"}
MATRIX, SCALAR = Spec("F32", (2, 3)), Spec("F32", ())


def make_share(step: int) -> Share:
    """A matrix in two pieces with one of its optimizer's, in disorder; a count and a scalar."""
    weight = torch.full((6,), float(step))
    values = {
        ("model", "head.weight", 4): weight[4:],
        ("exp_avg", "head.weight", 0): torch.full((6,), -1.5),
        ("model", "head.count", 0): torch.tensor([step]),
        ("model", "head.weight", 0): weight[:4],
        ("step", "head.weight", 0): torch.tensor([float(step)]),
    }
    catalog = {
        "model": {"head.weight": MATRIX, "head.count": Spec("I64", ()), "none": Spec("F32", (0,))},
        "exp_avg": {"head.weight": MATRIX},
        "step": {"head.weight": SCALAR},
    }
    return Share([Piece(*key, numbers.clone()) for key, numbers in values.items()], catalog)


def save(folder: Path, phase: str, step: int) -> Path:
    return save_share(folder / f"{phase}-{step}", make_share(step), phase=phase, step=step)


def save_share(path: Path, share: Share, **run: Any) -> Path:
    number = writing.next_number(path.parent)
    writing.write(Save(path, number, Disks(), METADATA, run), share)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors_of(stored: Stored) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (kind, name): stored.read(kind, name).view(spec.shape)
        for kind, specs in stored.catalog.items()
        for name, spec in specs.items()
    }


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", "train", 7)
    loaded = checkpoint.load(path)
    assert loaded.run == {"phase": "train", "step": 7}
    assert loaded.engine.catalog == make_share(7).catalog
    assert loaded.engine.metadata == METADATA
    expected = {
        ("model", "head.weight"): torch.full((2, 3), 7.0),
        ("model", "head.count"): torch.tensor(7),
        ("model", "none"): torch.zeros(0),
        ("exp_avg", "head.weight"): torch.full((2, 3), -1.5),
        ("step", "head.weight"): torch.tensor(7.0),
    }
    torch.testing.assert_close(tensors_of(loaded.engine), expected, rtol=0, atol=0)
    assert (tmp_path / "checkpoints/latest").read_text() == "train-7\n"
    assert names(path) == ["index-1.json", "pieces-1-0.safetensors", "state.json"]
    assert names(tmp_path / "checkpoints") == ["latest", "train-7"]


def test_the_weights_of_a_checkpoint_in_one_file(tmp_path: Path) -> None:
    path = save(tmp_path, "train", 7)
    assert write_whole(path)
    with safe_open(path / "model.safetensors", framework="pt") as file:  # the library as a witness
        assert file.metadata() == METADATA
        assert list(file.keys()) == ["head.count", "head.weight", "none"]
        assert torch.equal(file.get_tensor("head.weight"), torch.full((2, 3), 7.0))
        assert torch.equal(file.get_tensor("head.count"), torch.tensor(7))
    keeping.clean(tmp_path, keep=1, protected=[])
    assert "model.safetensors" in names(path)  # it is no leftover
    save_share(path, make_share(8))
    assert names(path) == ["index-2.json", "pieces-2-0.safetensors", "state.json"]


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
        ("pieces-3-0.safetensors", cut_short, r"has \d+ bytes, expected \d+ bytes"),
        ("pieces-3-0.safetensors", flip_last_bit, "altered since it was written"),
        ("pieces-3-0.safetensors", Path.unlink, r"missing, expected \d+ bytes"),
        ("index-3.json", flip_last_bit, "altered since it was written"),
        ("index-3.json", Path.unlink, r"missing, expected \d+ bytes"),
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
    flip_last_bit(second / "pieces-2-0.safetensors")
    with pytest.raises(ValueError, match=f"{third}/{name}.* resume={first}\\."):
        checkpoint.load(third)
    flip_last_bit(first / "pieces-1-0.safetensors")
    with pytest.raises(ValueError, match="No earlier one can be used"):
        checkpoint.load(third)


def test_checkpoints_after_a_broken_one_are_not_proposed(tmp_path: Path) -> None:
    first = save(tmp_path, "train", 10)
    save(tmp_path, "train", 20)
    flip_last_bit(first / "pieces-1-0.safetensors")
    with pytest.raises(ValueError, match="No earlier one can be used"):
        checkpoint.load(first)


def test_full_disk_is_one_error_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    first = save(tmp_path, "train", 1)
    share = Share(
        [Piece("model", "weight", 0, torch.zeros(100_000))],
        {"model": {"weight": Spec("F32", (100_000,))}},
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("train-2", "train-1"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(ValueError, match=rf"{name}: cannot .* GiB are free.*make room"):
                save_share(tmp_path / name, share)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["latest", "train-1"]
        assert names(first) == ["index-1.json", "pieces-1-0.safetensors", "state.json"]
        assert checkpoint.load(first).run["step"] == 1


@pytest.mark.parametrize("name", ["train-2", "train-1"])
def test_death_at_any_point_of_a_save_leaves_a_usable_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # train-1 is there; then train-2 is written, or train-1 again. A kill is simulated before each
    # rename, sync, deletion and opening of a file in turn: nothing after it happens.
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
    monkeypatch.setattr(keeping, "delete", deadly(keeping.delete))
    monkeypatch.setattr(Path, "open", deadly(Path.open))
    monkeypatch.setattr(os, "replace", deadly(os.replace))
    num_deaths, is_dead = 0, True
    while is_dead:
        folder = tmp_path / str(num_deaths)
        left = 1000
        save(folder, "train", 1)
        left = num_deaths
        try:
            save_share(folder / name, make_share(2), step=2)
            is_dead = False
        except KeyboardInterrupt:
            num_deaths += 1
        left = 1000
        latest = (folder / "latest").read_text().strip()
        assert checkpoint.load(folder / latest).run["step"] in (1, 2)
        save_share(folder / name, make_share(2), step=2)  # the run, started again
        assert checkpoint.load(folder / name).run["step"] == 2
        keeping.clean(folder, keep=2, protected=[])
        assert names(folder) == sorted({"latest", "train-1", name})
    assert num_deaths > 8


def test_saving_again_under_a_name_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, "train", 1)
    save_share(tmp_path / "train-1", make_share(9), step=9)
    assert checkpoint.load(tmp_path / "train-1").run == {"step": 9}
    assert names(tmp_path) == ["latest", "train-1"]


def test_newest_best_and_protected_checkpoints_are_kept(tmp_path: Path) -> None:
    # In the order in which they are written; steps start anew in each phase.
    for phase, step in (("b", 10), ("b", 20), ("b", 30), ("a", 1), ("a", 2), ("a", 3), ("a", 4)):
        save(tmp_path, phase, step)
    keeping.mark_best(tmp_path / "b-20")
    for torn, file in ((".part-a-5", "model.safetensors"), ("a-5", "pieces-8-0.safetensors")):
        (tmp_path / torn).mkdir()
        (tmp_path / torn / file).write_bytes(b"half")
    (tmp_path / "a-4/pieces-9-1.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("not ours")
    keeping.clean(tmp_path, keep=2, protected=["b-30", "a-9"])
    assert names(tmp_path) == ["a-3", "a-4", "b-20", "b-30", "best", "latest", "notes"]
    assert names(tmp_path / "a-4") == ["index-7.json", "pieces-7-0.safetensors", "state.json"]
    assert (tmp_path / "best").read_text() == "b-20\n"
    keeping.clean(tmp_path, keep=0, protected=[])
    assert names(tmp_path) == ["a-4", "b-20", "best", "latest", "notes"]  # the latest always stays


def test_every_kth_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, "train", step)
    keeping.clean(tmp_path, keep=1, protected=[], keep_every=20)
    assert names(tmp_path) == ["latest", "train-20", "train-40", "train-50"]


def test_the_loss_scale_is_kept(tmp_path: Path) -> None:
    scale = {"value": 1024.0, "good_steps": 7}
    save_share(tmp_path / "train-1", dataclasses.replace(make_share(1), loss_scale=scale))
    loaded = checkpoint.load(tmp_path / "train-1")
    assert loaded.engine.loss_scale == scale
    assert loaded.run == {}


def test_cleaning_where_nothing_was_saved_does_nothing(tmp_path: Path) -> None:
    keeping.clean(tmp_path / "absent", keep=2, protected=[])
    assert not (tmp_path / "absent").exists()


def spoil(share: Share, number: int) -> Share:
    """The share with one number of a piece that is not finite."""
    share.pieces[number].values[1] = float("nan")
    return share


@pytest.mark.parametrize(
    ("piece", "found"),
    [(3, r"head\.weight/model@0 \(1 of 4 numbers\)"), (1, r"head\.weight/exp_avg@0 \(1 of 6")],
)
def test_what_is_not_finite_is_refused_for_the_newest_that_is(
    tmp_path: Path, piece: int, found: str
) -> None:
    good = save(tmp_path, "train", 1)
    for step in (2, 3):
        save_share(tmp_path / f"train-{step}", spoil(make_share(step), piece))
    found = rf"train-3/pieces-3-0\.safetensors: 1 of 5 tensors is not finite: {found}"
    with pytest.raises(ValueError, match=rf"{found}.*Go on with resume={good}"):
        checkpoint.load(tmp_path / "train-3")
    assert checkpoint.newest_usable(tmp_path) == good
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.adopt(tmp_path / "train-2", tmp_path / "fork")
    assert not (tmp_path / "fork").exists()
    save_share(good, spoil(make_share(1), piece))
    assert checkpoint.newest_usable(tmp_path) is None


def test_the_state_file_is_strict_json(tmp_path: Path) -> None:
    run = {"best": float("nan"), "seconds": float("inf")}
    save_share(tmp_path / "train-1", make_share(1), **run)
    text = (tmp_path / "train-1/state.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert checkpoint.load(tmp_path / "train-1").run == {"best": None, "seconds": None}


@pytest.mark.parametrize("name", ["state.json", "pieces-2-0.safetensors"])
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
