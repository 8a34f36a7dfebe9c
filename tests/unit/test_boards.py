"""Boards: what TensorBoard and Weights & Biases receive."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigdet.logs.boards import TensorBoard, WeightsAndBiases

GRAY = np.full((4, 6, 3), 90, dtype=np.uint8)


class FakeWandb(types.ModuleType):
    """Replaces the package, and keeps what it receives."""

    def __init__(self):
        super().__init__("wandb")
        self.began: list[dict] = []
        self.logged: list[dict] = []
        self.is_finished = False

    def init(self, **options):
        self.began.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "total_step")

    def log(self, values):
        self.logged.append(values)

    def Image(self, picture):  # noqa: N802
        return ("picture", picture.shape)

    def finish(self):
        self.is_finished = True


def begin(folder: Path) -> WeightsAndBiases:
    return WeightsAndBiases(folder, "shapes", "run", None, "offline", {"seed": 3})


def test_wandb_continues_with_the_run_of_the_folder(monkeypatch, tmp_path: Path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    board = begin(tmp_path / "wandb")
    board.add_scalars({"lr": 0.5}, 7)
    board.add_picture("batch/train", GRAY, 7)
    board.close()
    assert fake.logged == [
        {"lr": 0.5, "total_step": 7},
        {"batch/train": ("picture", (4, 6, 3)), "total_step": 7},
    ]
    assert fake.is_finished
    begin(tmp_path / "wandb")
    begin(tmp_path / "other")
    first, again, other = fake.began
    assert first["config"] == {"seed": 3}
    assert (first["project"], first["mode"], first["resume"]) == ("shapes", "offline", "allow")
    assert first["id"] == again["id"] != other["id"]


def test_wandb_that_is_not_installed_is_reported_with_its_key(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"^log\.wandb: wandb cannot be imported .*pip install wandb"
    ):
        begin(tmp_path)


def test_tensorboard_reads_numbers_and_pictures_of_a_run_that_went_back(tmp_path: Path):
    board = TensorBoard(tmp_path, first_step=1)
    for step in (1, 2, 3):
        board.add_scalars({"loss/total": step / 4, "lr": 0.5}, step)
    board.add_picture("batch/train", GRAY, 7)
    board.close()
    again = TensorBoard(tmp_path, first_step=3)  # a resume from step 2
    again.add_scalars({"loss/total": 8.0}, 3)
    again.add_picture("batch/train", GRAY // 2, 3)
    again.close()
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert events.Tags()["scalars"] == ["loss/total", "lr"]
    losses = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert losses == [(1, 0.25), (2, 0.5), (3, 8.0)]
    assert [event.step for event in events.Scalars("lr")] == [1, 2]
    (picture,) = events.Images("batch/train")
    assert picture.step == 3
    with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image), GRAY // 2)
