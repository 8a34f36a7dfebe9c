"""Configs that come with bigdet are found by name from any folder; a local file comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.config.shipped import SHIPPED, find_config, list_shipped
from bigdet.config.sweep import load_sweep


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_folder_is_that_of_the_sources():
    assert Path(__file__).parents[3] / "configs" == SHIPPED


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quickstart", "quickstart.yaml"),
        ("quickstart.yaml", "quickstart.yaml"),
        ("configs/quickstart.yaml", "quickstart.yaml"),
        ("configs/quickstart", "quickstart.yaml"),
        ("sweeps/small", "sweeps/small.yaml"),
        ("configs/sweeps/small.yaml", "sweeps/small.yaml"),
        (Path("data/coco.yaml"), "data/coco.yaml"),
    ],
)
def test_names_of_shipped_files(name, file):
    assert find_config(name) == SHIPPED / file


def test_a_local_file_comes_first_and_a_folder_does_not_count(elsewhere):
    (elsewhere / "quickstart").mkdir()
    assert find_config("quickstart") == SHIPPED / "quickstart.yaml"
    (elsewhere / "quickstart.yaml").write_text("seed: 1\n")
    assert find_config("quickstart") == Path("quickstart.yaml")
    assert find_config("configs/quickstart.yaml") == SHIPPED / "quickstart.yaml"
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs/quickstart.yaml").write_text("seed: 2\n")
    assert find_config("configs/quickstart.yaml") == Path("configs/quickstart.yaml")


@pytest.mark.parametrize("name", ["nowhere", "../configs/quickstart.yaml", "/quickstart", ""])
def test_what_is_not_there_stays_as_it_was_written(name):
    assert find_config(name) == Path(name)


def test_a_local_config_includes_local_fragments_and_shipped_ones(elsewhere):
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine/quick.yaml").write_text(
        "include: [data/shapes.yaml, model/mask_rcnn_r50_gn.yaml, ours.yaml]\n"
        "output: runs/mine\n"
        "phases: {train: {steps: 10, images_per_gpu: 1, images_per_step: 1, "
        "lr: 0.01, warmup_steps: 0, resize: {kind: short_side, size: 64, cap: 64}}}\n"
    )
    (elsewhere / "mine/ours.yaml").write_text("seed: 5\n")
    config = load_config("mine/quick")
    assert (config.seed, config.model.norm) == (5, "gn")
    assert config.data.train.shards == "data/shapes/train"


def test_a_shipped_sweep_finds_its_configs_and_so_does_a_local_one(elsewhere):
    _, runs = load_sweep("sweeps/small")
    assert {Path(run.config_file).parent for run in runs} == {SHIPPED}
    (elsewhere / "mine.yaml").write_text("output: o\nconfig: quickstart\nruns: {a: {}}\n")
    (run,) = load_sweep("mine.yaml")[1]
    assert run.config_file == str(SHIPPED / "quickstart.yaml")


@pytest.mark.parametrize("name", ["quikstart", "quikstart.yaml", "configs/quikstart.yaml"])
def test_a_misspelled_name_is_reported_with_the_nearest(name):
    with pytest.raises(ConfigError, match=rf"^{name}: .*did you mean 'quickstart', which comes"):
        load_config(name)
    with pytest.raises(ConfigError, match="did you mean 'sweeps/small', which comes with bigdet"):
        load_sweep("configs/sweeps/smal.yaml")


def test_all_are_listed_with_what_they_are():
    shipped = dict(list_shipped())
    assert len(shipped) == len(list(SHIPPED.rglob("*.yaml")))
    assert shipped["model/retinanet_r50"] == "RetinaNet, ResNet-50 with BN in the backbone only."
    assert {"quickstart", "sweeps/small", "engine/zero2"} <= set(shipped)
