"""Several sets as one: rows, labels by name, what is reported when categories do not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import shutil

import numpy as np
import pytest

from bigdet.config.data import CacheConfig, DataConfig, TrainSplitConfig, ValSplitConfig
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.mix import (
    MixedSet,
    class_ids,
    open_sets,
    warn_of_absent,
    with_categories,
)
from bigdet.data.format.shard_set import ShardSet

NAMES = ["circle", "square", "triangle", "star"]  # of the synthetic shapes


@pytest.fixture
def other_set(shapes_shards, tmp_path):
    """A function: a copy of the 8 validation images whose labels 0 to 3 have these names."""

    def make(names: list[str], folder: str = "other"):
        shutil.copytree(shapes_shards / "val", tmp_path / folder)
        path = tmp_path / folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["categories"] = [{"id": 1 + i, "name": name} for i, name in enumerate(names)]
        del manifest["sha256"]
        path.write_text(json.dumps(manifest))
        return tmp_path / folder

    return make


def config(train, more, val) -> DataConfig:
    split = TrainSplitConfig(shards=str(train), more_shards=[str(folder) for folder in more])
    return DataConfig(train=split, val=ValSplitConfig(shards=str(val)))


def test_one_set_is_opened_as_it_is(shapes_shards):
    train, val = open_sets(config(shapes_shards / "train", [], shapes_shards / "val"))
    assert type(train) is type(val) is ShardSet


def test_rows_of_a_mix_are_those_of_its_sets_with_labels_by_name(shapes_shards, other_set):
    # The other set calls label 0 a star, 1 a circle, ...; blanks and capitals do not matter.
    folder = other_set(["Star ", "circle", "hexagon", "SQUARE"])
    mix, val = open_sets(config(shapes_shards / "train", [folder], shapes_shards / "val"))
    first, second = ShardSet(shapes_shards / "train"), ShardSet(folder)
    assert len(mix) == len(mix.index) == 24
    assert [category.name for category in mix.categories] == [*NAMES, "hexagon"]
    assert mix.num_classes == 5
    assert mix.address == str(shapes_shards / "train")
    assert len({category.id for category in mix.categories}) == 5
    for row in range(16):
        assert mix.read(row) == first.read(row)
        assert mix.path(row) == first.path(row)
    meaning = [3, 0, 4, 1]
    for row in range(8):
        sample, own = mix.read(16 + row), second.read(row)
        assert sample.image_bytes == own.image_bytes
        labels = [annotation["label"] for annotation in sample.record["annotations"]]
        expected = [meaning[annotation["label"]] for annotation in own.record["annotations"]]
        assert labels == expected
        assert mix.record(16 + row) == sample.record
        assert mix.path(16 + row) == second.path(row)
        assert mix.place(16 + row) == str(second.path(row))
        assert mix.key(16 + row) == second.key(row)
    assert (mix.index["shard"] == np.repeat([0, 1], [16, 8])).all()
    assert mix.manifest.instances == first.manifest.instances + second.manifest.instances
    assert [category.name for category in val.categories] == [*NAMES, "hexagon"]
    assert val.record(3) == ShardSet(shapes_shards / "val").record(3)
    assert val.index_hash() == ShardSet(shapes_shards / "val").index_hash()


def test_a_mix_goes_through_pickle_and_its_hash_identifies_the_sets(shapes_shards, other_set):
    folder = other_set(NAMES)
    mix, _ = open_sets(config(shapes_shards / "train", [folder], shapes_shards / "val"))
    again = pickle.loads(pickle.dumps(mix))
    assert again.read(20) == mix.read(20)
    assert again.index_hash() == mix.index_hash()
    turned, _ = open_sets(config(folder, [shapes_shards / "train"], shapes_shards / "val"))
    assert turned.index_hash() != mix.index_hash()
    mix.close()
    assert mix.read(20) == again.read(20)


def test_a_mix_for_a_thread_shares_the_index_and_has_parts_of_its_own(shapes_shards, other_set):
    folder = other_set(["Star ", "circle", "hexagon", "SQUARE"])
    mix, _ = open_sets(config(shapes_shards / "train", [folder], shapes_shards / "val"))
    own = mix.for_thread()
    assert own.index is mix.index
    assert own.parts[1].index is mix.parts[1].index
    assert own.parts[1] is not mix.parts[1]
    assert [own.read(row) for row in (3, 20)] == [mix.read(row) for row in (3, 20)]


def test_classes_that_a_set_does_not_know_are_reported(shapes_shards, other_set, caplog):
    folder = other_set(["star", "circle", "hexagon", "square"])
    with caplog.at_level(logging.WARNING):
        open_sets(config(shapes_shards / "train", [folder], shapes_shards / "val"))
    first, second = [record.getMessage() for record in caplog.records]
    assert "train does not have 1 of the 5 classes" in first
    assert first.endswith("hexagon")
    assert second.endswith("triangle")


def test_a_set_of_unknown_classes_cannot_be_measured_on(shapes_shards):
    two = [Category(1, "circle"), Category(2, "square")]
    with pytest.raises(ShardError, match=r"2 of its categories .* 'triangle', 'star'"):
        with_categories(ShardSet(shapes_shards / "val"), two)


def test_two_categories_of_one_name_are_refused(shapes_shards, other_set):
    folder = other_set(["star", "Star ", "hexagon", "square"])
    with pytest.raises(ShardError, match="several categories are named 'star'"):
        open_sets(config(shapes_shards / "train", [folder], shapes_shards / "val"))


def test_a_label_that_the_set_does_not_have_is_damage(shapes_shards, monkeypatch):
    part = ShardSet(shapes_shards / "val")
    row = int(np.flatnonzero(part.index["num_boxes"])[0])
    read = ShardSet.read

    def read_damaged(self, row):
        sample = read(self, row)
        sample.record["annotations"][0]["label"] = -1
        return sample

    monkeypatch.setattr(ShardSet, "read", read_damaged)
    with pytest.raises(ShardError, match=r"label -1, the set has 4 categories"):
        MixedSet([part], part.categories).read(row)


def test_sets_at_addresses_are_mixed(shapes_shards, tmp_path):
    cache = CacheConfig(folder=str(tmp_path / "cache"), gib=0.01)
    address = f"pipe:cat {shapes_shards}/val/{{}}"
    data = config(shapes_shards / "train", [address], shapes_shards / "val")
    mix, _ = open_sets(dataclasses.replace(data, cache=cache))
    mix.check_random_reads()
    local = ShardSet(shapes_shards / "val")
    assert [mix.read(row).image_bytes for row in range(16, 24)] == [
        local.read(row).image_bytes for row in range(8)
    ]
    assert mix.place(16) == f"pipe:cat {shapes_shards}/val/000000.tar"


def test_classes_are_measured_by_name_in_whatever_order(shapes_shards, other_set, caplog):
    # other_set numbers its classes from 1 in the order of the names.
    swapped = ShardSet(other_set(["star", "circle", "triangle", "square"], "swapped"))
    assert class_ids(swapped, NAMES) == [2, 4, 3, 1]
    folded = ShardSet(other_set(["Star ", "circle", "TRIANGLE", "square"], "folded"))
    assert class_ids(folded, NAMES) == [2, 4, 3, 1]
    warn_of_absent(folded, NAMES)
    assert not caplog.records
    composed = ShardSet(other_set(["st\u00e4r", "circle", "TRIANGLE", "square"], "composed"))
    other_form = [name.replace("star", "sta\u0308r") for name in NAMES]  # as macOS writes it
    assert class_ids(composed, other_form) == [2, 4, 3, 1]
    assert class_ids(swapped, ["hexagon", *NAMES, "moon"]) == [None, 2, 4, 3, 1, None]
    warn_of_absent(swapped, ["hexagon", *NAMES, "moon"])
    (record,) = caplog.records
    assert "does not have 2 of the 6 classes that are learned" in record.getMessage()
    assert record.getMessage().endswith("hexagon, moon")


def test_classes_that_are_not_learned_are_an_error_that_names_them(shapes_shards, other_set):
    elk = ShardSet(other_set(["star", "elk", "Triangle", "yak"]))
    with pytest.raises(ShardError, match=r"2 of its categories .* 'elk', 'yak'\. .*--categories"):
        class_ids(elk, NAMES)
    cats = ShardSet(other_set(["Cat", "star", "circle", "square"], "cats"))
    with pytest.raises(ShardError, match="'cat' may be several of the classes"):
        class_ids(cats, ["cat", "CAT", *NAMES])
    assert class_ids(cats, ["cat", "Cat", *NAMES]) == [None, 1, 3, 4, None, 2]  # as it is written


def test_a_mix_is_measured_with_the_ids_of_the_validation_set(shapes_shards, other_set):
    val = ShardSet(other_set(["circle", "star", "Square", "triangle"]))
    mix = [
        Category(3, "circle"),
        Category(1, "square"),
        Category(2, "hexagon"),
        Category(9, "star"),
    ]
    mix.append(Category(4, "triangle"))
    view = with_categories(val, mix)
    # The set has circle 1, star 2, square 3, triangle 4; hexagon's 2 is taken.
    assert [category.id for category in view.categories] == [1, 3, 5, 2, 4]
    assert [category.name for category in view.categories] == [c.name for c in mix]
