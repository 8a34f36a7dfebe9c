"""Which images are trained on, and how often, from config and index."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from bigdet.config.data import SubsetConfig, TrainSplitConfig
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.mix import MixedSet
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.data.ordering.repeats import repeat_factors
from bigdet.data.ordering.selection import read_classes, select
from tests.unit.data.small_shards import noise_jpeg, record_of


@pytest.fixture(scope="module")
def shards(shapes_shards):
    """16 images, of which 3 and 8 are made out to have no boxes."""
    shards = ShardSet(shapes_shards / "train")
    shards.index = shards.index.copy()
    shards.index["num_boxes"] = 1
    shards.index["num_boxes"][[3, 8]] = 0
    return shards


def chosen(shards, **options):
    return select(shards, TrainSplitConfig(shards="unused", **options))


def test_all_images_with_objects_are_the_default(shards):
    selection = chosen(shards)
    assert selection.rows.tolist() == [row for row in range(16) if row not in (3, 8)]
    assert selection.repeats is None
    assert selection.windows is None
    assert chosen(shards, keep_empty=True).rows.tolist() == list(range(16))


def test_options_not_in_use_leave_the_state_as_older_checkpoints_have_it(shards):
    state = chosen(shards).state
    used = {name: value for name, value in state.items() if value is not None}
    assert used == {"samples": 14, "index": shards.index_hash()}


def test_a_subset_is_drawn_once_and_for_all_and_a_smaller_one_is_part_of_it(shards):
    ten = chosen(shards, subset=SubsetConfig(images=10))
    assert len(set(ten.rows.tolist())) == 10
    assert (np.diff(ten.rows) > 0).all()
    assert not {3, 8} & set(ten.rows.tolist())
    assert chosen(shards, subset=SubsetConfig(images=10)).rows.tolist() == ten.rows.tolist()
    four = chosen(shards, subset=SubsetConfig(images=4))
    assert set(four.rows.tolist()) < set(ten.rows.tolist())
    # Raw Philox under a hash of what the words are for: no machine and no numpy draws others.
    key = hashlib.blake2b(b'["subset", 0]', digest_size=16).digest()
    drawn = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(14).argsort()[:4]
    filled = [row for row in range(16) if row not in (3, 8)]
    assert four.rows.tolist() == sorted(filled[place] for place in drawn)
    other = chosen(shards, subset=SubsetConfig(images=10, seed=1))
    assert other.rows.tolist() != ten.rows.tolist()
    assert other.state["subset"] != ten.state["subset"]


def test_a_subset_larger_than_the_set_is_refused(shards):
    assert len(chosen(shards, subset=SubsetConfig(images=14)).rows) == 14
    with pytest.raises(
        ShardError, match=r"subset\.images: found 15, .* 14 images .*keep_empty=true"
    ):
        chosen(shards, subset=SubsetConfig(images=15))
    with pytest.raises(ShardError, match=r"has 16 images to train on\. Write at most that\.$"):
        chosen(shards, subset=SubsetConfig(images=17), keep_empty=True)


@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_subset_by_ids_leaves_out_empty_images(shards, tmp_path, form):
    ids = [int(shards.index["image_id"][row]) for row in (12, 3, 0)]
    text = json.dumps(ids) if form == "json" else "\n".join(map(str, ids)) + "\n"
    (tmp_path / "ids").write_text(text)
    subset = SubsetConfig(ids=str(tmp_path / "ids"))
    assert chosen(shards, subset=subset).rows.tolist() == [0, 12]
    assert chosen(shards, subset=subset, keep_empty=True).rows.tolist() == [0, 3, 12]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("123456789 1", "lists 1 images that"),
        ("1 2 1", "the image 1 more than once"),
        ("", "lists no image"),
        ("one two", "not a list of image ids"),
        ('[{"id": 1}]', "not a list of image ids"),
        ("[1, 2", "not a list of image ids"),
        (None, "not a list of image ids"),
    ],
)
def test_lists_of_ids_that_cannot_be_used_are_refused(shards, tmp_path, text, reason):
    if text is not None:
        (tmp_path / "ids").write_text(text)
    with pytest.raises(ShardError, match=reason) as error:
        chosen(shards, subset=SubsetConfig(ids=str(tmp_path / "ids")))
    assert str(error.value).startswith("data.train.subset.ids: ")


def test_weights_are_those_of_the_sets(shapes_shards):
    parts = [ShardSet(shapes_shards / "train"), ShardSet(shapes_shards / "val")]  # 16 and 8
    mix = MixedSet(parts, parts[0].categories)
    selection = chosen(mix, weights=[1.0, 2.5], keep_empty=True)
    assert selection.repeats.num_entries == 16 + 20
    counts = np.diff(selection.repeats.draw(0, "train", 0), prepend=0)
    assert counts[:16].tolist() == [1] * 16
    assert set(counts[16:].tolist()) == {2, 3}
    assert selection.state["weights"] == [1.0, 2.5]
    assert chosen(mix, weights=[1.0, 1.0]).repeats is None


def test_windows_know_the_shards_of_all_sets(shapes_shards):
    parts = [ShardSet(shapes_shards / "train"), ShardSet(shapes_shards / "val")]
    selection = chosen(MixedSet(parts, parts[0].categories), order="windowed", keep_empty=True)
    assert selection.windows.shards.tolist() == [0] * 16 + [1] * 8
    assert selection.state["window"] == selection.windows.size == 1024


def test_repeats_follow_the_classes_in_the_annotations(shapes_shards):
    shards = ShardSet(shapes_shards / "train")
    rows = np.flatnonzero(shards.index["num_boxes"])
    classes, offsets = read_classes(shards, rows)
    for place, row in enumerate(rows):
        found = classes[offsets[place] : offsets[place + 1]].tolist()
        objects = shards.record(int(row))["annotations"]
        assert found == sorted({entry["label"] for entry in objects if not entry["iscrowd"]})
    factors = repeat_factors(classes, offsets, shards.num_classes, 1.0)
    selection = chosen(shards, repeat_threshold=1.0)
    assert selection.repeats.num_entries == int(factors.sum())
    assert selection.state["repeat_threshold"] == 1.0


def test_the_phases_of_a_run_share_one_selection(shapes_shards, monkeypatch):
    shards = ShardSet(shapes_shards / "train")
    first = chosen(shards, repeat_threshold=1.0)
    monkeypatch.setattr(ShardSet, "record", None)  # annotations are not read again
    assert chosen(shards, repeat_threshold=1.0) is first
    assert chosen(shards, keep_empty=True).rows.tolist() == list(range(16))


def test_images_with_too_few_labeled_keypoints_are_left_out(tmp_path):
    # Labeled are visibility 1 and 2. Row 0: two on one object; row 1: one each on two objects, and
    # two on a crowd, which does not count; row 2: none labeled; row 3: an object without any.
    points = {
        0: [([1, 1, 2, 2, 2, 1, 0, 0, 0], 0)],
        1: [
            ([1, 1, 2, 0, 0, 0, 0, 0, 0], 0),
            ([0, 0, 0, 3, 3, 1, 0, 0, 0], 0),
            ([1, 1, 2, 2, 2, 2, 0, 0, 0], 1),
        ],
        2: [([0, 0, 0, 0, 0, 0, 0, 0, 0], 0)],
        3: [(None, 0)],
    }
    with ShardWriter(
        tmp_path, name="people", source="test", categories=[Category(1, "person")], options={}
    ) as writer:
        for row, objects in points.items():
            record = record_of(row + 1)
            (plain,) = record["annotations"]
            record["annotations"] = [
                {**plain, "id": number, "label": 0, "iscrowd": crowd}
                | ({} if keypoints is None else {"keypoints": keypoints})
                for number, (keypoints, crowd) in enumerate(objects)
            ]
            writer.add(noise_jpeg(row), record)
    shards = ShardSet(tmp_path)
    assert chosen(shards).rows.tolist() == [0, 1, 2, 3]
    assert chosen(shards, min_keypoints=1).rows.tolist() == [0, 1]
    assert chosen(shards, min_keypoints=2).rows.tolist() == [0, 1]
    assert chosen(shards, min_keypoints=2).state["min_keypoints"] == 2
    with pytest.raises(ShardError, match=r"min_keypoints: found 3, but no image"):
        chosen(shards, min_keypoints=3)
