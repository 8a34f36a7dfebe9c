"""A run whose first phase has data of its own: its classes, AP, weights, and what it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bigdet import evaluate, train
from bigdet.cli import show_batch
from bigdet.config.load import read_config
from bigdet.data.format.manifest import Category
from bigdet.data.format.phase_sets import open_phase_sets
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.data.making.sources.shapes import make_shapes
from bigdet.models.weights import load_detector
from bigdet.run_dir import RunDir
from bigdet.training.phases import _build, build_for_phase
from tests.commands.runs import arguments, assert_same_run, numbers, weights
from tests.spawn import run_ranks

SHAPES = ["circle", "square", "triangle", "star"]
THREE = {"circle": 4, "square": 5, "triangle": 9}
TWO = {"square": 1, "star": 3}
"""Names of the categories in the order of the labels, and their ids."""
WORDS = [
    "data.workers=0", "log.tensorboard=false", "checkpoint.keep=20", "checkpoint.every=1",
    "phases.pretrain.steps=3", "phases.pretrain.images_per_step=4", "phases.pretrain.ema.decay=0.5",
    "phases.finetune.steps=3", "phases.finetune.images_per_step=4",
    "phases.finetune.freeze=backbone", "phases.finetune.freeze_stages=0",
]  # fmt: skip


def with_classes(source: ShardSet, folder: Path, ids: dict[str, int]) -> None:
    """Write the images of a set of shapes with the objects of some classes, in another order."""
    labels = {SHAPES.index(name): label for label, name in enumerate(ids)}
    categories = [Category(number, name) for name, number in ids.items()]
    with ShardWriter(folder, name="x", source="test", categories=categories, options={}) as writer:
        for row in range(len(source)):
            sample = source.read(row)
            kept = [each for each in sample.record["annotations"] if each["label"] in labels]
            kept = [each | {"label": labels[each["label"]]} for each in kept]
            record = sample.record | {"annotations": kept}
            writer.add(sample.image_bytes, record, sample.orientation)


def make_sets(folder: Path) -> None:
    """Write train and val of both: of the same images, so that only classes tell them apart."""
    for split, images in (("train", 24), ("val", 8)):
        make_shapes(folder / "all" / split, split=split, images=images, size=64)
        for name, ids in (("three", THREE), ("two", TWO)):
            with_classes(ShardSet(folder / "all" / split), folder / name / split, ids)


def words_of(folder: Path) -> list[str]:
    own = [f"phases.pretrain.data.{split}.shards={folder}/three/{split}" for split in
           ("train", "val")]  # fmt: skip
    return [*WORDS, *own]


def cut(output: Path, kept: Sequence[str]) -> None:
    """Leave a run as if it had been killed after the last of these checkpoints."""
    (output / "model.safetensors").unlink()
    for folder in (output / "checkpoints").iterdir():
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder)
    (output / "checkpoints/latest").write_text(f"{kept[-1]}\n")


ENGINES = {
    "default": [],
    "zero-3": ["engine.zero_stage=3"],
    "fsdp": ["engine.kind=fsdp", "engine.zero_stage=null"],
}
"""Overrides of an engine that has all weights on each rank, and of those that shard them."""
SGD = [f"phases.{name}.optimizer=sgd" for name in ("pretrain", "finetune")]
"""AdamW would make a step of a whole learning rate from the rounding of a gradient near zero."""
PRETRAINED = ["pretrain-1", "pretrain-2", "pretrain-3"]


def train_all(folder: Path) -> list[int]:
    """Train whole, and on from the middle of each phase; measure both phases afterwards."""
    whole, sets = folder / "whole", folder / "sets"
    codes = [train.main(arguments(whole, sets / "two", *words_of(sets)))]
    for name, kept in (("early", PRETRAINED[:2]), ("late", [*PRETRAINED, "finetune-1"])):
        shutil.copytree(whole, folder / name)
        cut(folder / name, kept)
        codes.append(train.main(arguments(folder / name, sets / "two", *words_of(sets))))
    for name, model, data in (
        ("three", whole / "checkpoints/pretrain-3", "three"),
        ("two", whole, "two"),
    ):
        out = ["--out", str(folder / f"{name}.json")]
        codes.append(evaluate.main([str(model), "--shards", f"{sets}/{data}/val", *out]))
    return codes


def train_late(folder: Path) -> int:
    """Train on from the second phase, on several ranks."""
    sets = folder / "sets"
    return train.main(arguments(folder / "ranks", sets / "two", *words_of(sets)))


def train_engines(folder: Path) -> list[int]:
    """Train whole under each engine, on several ranks."""
    sets = folder / "sets"
    return [
        train.main(arguments(folder / name, sets / "two", *words_of(sets), *SGD, *words))
        for name, words in ENGINES.items()
    ]


def train_fork(folder: Path) -> int:
    """Fork in the middle of the first phase."""
    sets, trunk = folder / "sets", folder / "whole/checkpoints/pretrain-2"
    words = [*words_of(sets), f"resume={trunk}"]
    return train.main(arguments(folder / "fork", sets / "two", *words))


def names_in(output: Path) -> list[str]:
    return [category["name"] for category in load_detector(output).categories]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `train_all` has trained."""
    folder = tmp_path_factory.mktemp("phases")
    make_sets(folder / "sets")
    (codes,) = run_ranks(train_all, 1, folder, folder, timeout_seconds=900)
    assert codes == [0] * 5
    return folder


def test_weights_and_ap_are_of_the_data_of_their_phase(trained: Path):
    whole = trained / "whole"
    assert names_in(whole / "checkpoints/pretrain-3") == [*THREE]
    assert names_in(whole / "checkpoints/finetune-1") == names_in(whole) == [*TWO]
    for phase, step, name, ids in (("pretrain", 3, "three", THREE), ("finetune", 3, "two", TWO)):
        found = json.loads((whole / f"evaluation/{phase}-{step}.json").read_text())
        assert sorted(found["per_class"]["bbox"]) == sorted(ids)
        again = json.loads((trained / f"{name}.json").read_text())  # by bigdet evaluate
        assert again["bbox"] == found["bbox"]
        assert again["per_class"] == found["per_class"]
    # The best AP on another set does not count any more.
    assert (whole / "checkpoints/best").read_text() == "finetune-3\n"
    log = (whole / "logs/rank-0.log").read_text()
    assert f"pretrain step 3 on {trained}/sets/three/val: bbox AP" in log
    assert "finetune step 3: bbox AP" in log
    assert "training of pretrain: 24 images" in log
    pictures = json.loads((whole / "pictures/pretrain.json").read_text())
    assert pictures[0]["truth"].startswith("truth/pretrain-")


def test_classes_that_both_phases_have_keep_their_rows(trained: Path):
    config, run_dir = read_config(trained / "whole/config.yaml"), RunDir(trained / "whole")
    classes = open_phase_sets(config)["finetune"].classes
    assert classes == [*TWO]
    cpu = torch.device("cpu")
    old = load_detector(run_dir.checkpoint("pretrain", 3)).state_dict()
    new = build_for_phase(config, "finetune", classes, run_dir, cpu, False).state_dict()
    drawn = _build(config, "finetune", classes).state_dict()
    # Square is label 1 of three and 0 of two; the background is the last row of the classifier.
    of_classes = [name for name in new if new[name].shape != old[name].shape]
    assert len(of_classes) == 6, of_classes  # classifier, regressor and predictor of masks
    for name in of_classes:
        rows = 4 if ".regressor." in name else 1
        assert torch.equal(new[name][:rows], old[name][rows : 2 * rows]), name
        assert torch.equal(new[name][rows : 2 * rows], drawn[name][rows : 2 * rows]), name
        if ".classifier." in name:
            assert torch.equal(new[name][2], old[name][3])
        if name.endswith(".weight"):
            assert not torch.equal(drawn[name][:rows], old[name][rows : 2 * rows]), name
    for name in new.keys() - of_classes:
        assert torch.equal(new[name], old[name].to(new[name].dtype)), name
    assert "1 of 2" in (trained / "whole/logs/rank-0.log").read_text()


def test_a_run_continues_in_either_phase_as_if_it_had_not_ended(trained: Path):
    assert_same_run(trained / "early", trained / "whole")
    assert_same_run(trained / "late", trained / "whole")


def assert_close_numbers(output: Path, expected: Path) -> None:
    for found, line in zip(numbers(output), numbers(expected), strict=True):
        assert (found["phase"], found["step"]) == (line["phase"], line["step"])
        if "loss/total" in found:
            assert found["loss/total"] == pytest.approx(line["loss/total"], rel=1e-3)
        assert found["seen/images"] == line["seen/images"]


def test_the_second_phase_continues_on_other_ranks(trained: Path):
    shutil.copytree(trained / "whole", trained / "ranks")
    cut(trained / "ranks", [*PRETRAINED, "finetune-1"])
    assert run_ranks(train_late, 2, trained, trained, timeout_seconds=600) == [0, 0]
    own, other = weights(trained / "ranks"), weights(trained / "whole")
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)
    assert_close_numbers(trained / "ranks", trained / "whole")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `train_engines` has trained on two ranks."""
    folder = tmp_path_factory.mktemp("engines")
    make_sets(folder / "sets")
    codes = run_ranks(train_engines, 2, folder, folder, timeout_seconds=900)
    assert codes == [[0] * len(ENGINES)] * 2
    return folder


@pytest.mark.parametrize("engine", ["zero-3", "fsdp"])
def test_classes_change_where_the_weights_are_sharded(engines: Path, engine: str):
    output, whole = engines / engine, engines / "default"
    assert names_in(output / "checkpoints/pretrain-3") == [*THREE]
    assert names_in(output / "checkpoints/finetune-1") == names_in(output) == [*TWO]
    assert_close_numbers(output, whole)
    own, other = weights(output), weights(whole)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        # The frozen backbone is in bf16, whose last bit may differ. Rounding can also move a
        # proposal over a threshold: then rows differ by 2e-5, those of a wrong class by 1e-2.
        torch.testing.assert_close(tensor, other[name], rtol=2.0**-7, atol=1e-4)


def test_a_fork_has_the_data_of_each_phase(trained: Path):
    assert run_ranks(train_fork, 1, trained, trained, timeout_seconds=600) == [0]
    own, other = weights(trained / "fork"), weights(trained / "whole")
    assert own.keys() == other.keys()
    assert not [name for name in own if not torch.equal(own[name], other[name])]
    assert names_in(trained / "fork/checkpoints/pretrain-3") == [*THREE]
    assert names_in(trained / "fork") == [*TWO]
    for name in ("pretrain-3", "finetune-3"):
        found, expected = (
            json.loads((trained / run / f"evaluation/{name}.json").read_text())
            for run in ("fork", "whole")
        )
        assert found["per_class"] == expected["per_class"]


def test_batches_have_the_data_of_their_phase(trained: Path, capsys):
    words = words_of(trained / "sets")
    for phase, shards in (("pretrain", "three"), ("finetune", "two")):
        more = ["--phase", phase, "--step", "1", "--ids", "--world", "1"]
        given = arguments(trained / "unused", trained / "sets/two", *words)
        assert show_batch.main([given[0], *more, *given[1:]]) == 0
        (ids,) = json.loads(capsys.readouterr().out).values()
        found = ShardSet(trained / "sets" / shards / "train")
        with_objects = found.index["image_id"][found.index["num_boxes"] > 0]
        assert len(ids) == 4
        assert set(ids) <= set(with_objects.tolist())
