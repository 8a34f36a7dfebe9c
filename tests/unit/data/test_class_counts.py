"""How many objects of each class there are to learn, and why none are left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bigdet.config.data import TrainSplitConfig
from bigdet.data.format.class_counts import ClassCounts, count_classes, counts_of
from bigdet.data.format.manifest import Category
from bigdet.data.format.mix import MixedSet
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.annotations import box_warning
from bigdet.data.making.shard_check import check_shards
from bigdet.data.ordering.selection import left_out
from tests.unit.data.coco_trial import Trial, box_of, image_of


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Label 0 (bicycle): 2 objects and 1 crowd; label 1 (toothbrush): 2 crowd; image 3 is empty."""
    trial = Trial(tmp_path)
    for number in (1, 2, 3):
        trial.picture(f"{number}.jpg")
    crowd = {"category_id": 90, "iscrowd": 1}
    boxes = [box_of(1), box_of(2), box_of(3, iscrowd=1), box_of(4, **crowd), box_of(5, 2, **crowd)]
    return trial.convert([image_of(number) for number in (1, 2, 3)], boxes)


def rewrite(shards: ShardSet, **changes: object) -> ShardSet:
    """The same set with a manifest of another content; None takes a value out."""
    path = shards.folder / "manifest.json"
    values = json.loads(path.read_text()) | changes
    del values["sha256"]
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return ShardSet(shards.folder)


def test_the_manifest_counts_objects_and_crowd_by_class(shards: ShardSet) -> None:
    assert shards.manifest.instances_per_class == [2, 0]
    assert shards.manifest.crowd_per_class == [1, 2]
    counts = counts_of(shards.manifest)
    assert counts is not None
    assert counts.line() == "bicycle 2 and 1 crowd, toothbrush 0 and 2 crowd"
    (warning,) = counts.warnings("learned")
    assert warning.startswith("1 of 2 classes (toothbrush: 2 crowd) has no object that can be")
    assert "iscrowd: 1 for every RLE mask" in warning


def test_sets_without_these_counts_are_counted(shards: ShardSet) -> None:
    old = rewrite(shards, instances_per_class=None, crowd_per_class=None)
    assert counts_of(old.manifest) is None
    counts = count_classes(old)
    assert counts is not None
    assert (list(counts.instances), list(counts.crowd)) == ([2, 0], [1, 2])
    assert list(check_shards(old.folder)) == []


def test_a_check_compares_the_counts(shards: ShardSet) -> None:
    (problem,) = check_shards(rewrite(shards, instances_per_class=[1, 0]).folder)
    assert problem.what == "instances of label 0: 1, found 2"


def test_a_mix_adds_up_by_name(shards: ShardSet) -> None:
    categories = [Category(1, "Toothbrush"), Category(2, "cat"), Category(3, "bicycle")]
    mixed = MixedSet([shards, shards], categories)
    assert mixed.manifest.instances_per_class == [0, 0, 4]
    assert mixed.manifest.crowd_per_class == [4, 0, 2]


def test_of_many_classes_only_those_without_objects_are_named() -> None:
    categories = [Category(number, f"c{number}") for number in range(365)]
    instances = [number * 1000 for number in range(365)]
    instances[7:14] = [0] * 7
    counts = ClassCounts(categories, instances, [0] * 365)
    assert counts.line() == "365 classes with 0 to 364,000 objects"
    assert counts.warnings("learned") == [  # 0 and 7 to 13
        "8 of 365 classes (c0, c7, c8, c9, c10, and 3 more) have no object at all"
    ]


def test_a_root_class_and_sets_with_nothing_are_reported() -> None:
    categories = [Category(0, "parts"), Category(1, "bolt", "parts"), Category(2, "Bolt", "parts")]
    assert ClassCounts(categories, [0, 2, 2], [0, 0, 0]).warnings("learned") == [
        "1 of 3 classes (parts: a group of other classes) has no object at all",
        "categories 1 ('bolt') and 2 ('Bolt') have the same name except for case and blanks; where "
        "classes are matched by name they are one",
    ]
    one = categories[:1]
    assert ClassCounts(one, [0], [0]).warnings("measured") == [
        "there is no object, so nothing can be measured"
    ]
    (warning,) = ClassCounts(one, [0], [16]).warnings("learned")
    assert warning.startswith("all 16 objects are crowd, so nothing can be learned. Crowd is")


def test_why_images_are_left_out(shards: ShardSet) -> None:
    split = TrainSplitConfig(shards="x")
    assert left_out(shards, split) == (  # images 2 and 3
        " 2 of 3 images have no object that is not crowd; data.train.keep_empty=true includes them."
    )
    assert left_out(shards, dataclasses.replace(split, keep_empty=True)) == ""
    shards.index = np.array(shards.index)
    shards.index["num_boxes"] = 0
    shards.manifest = dataclasses.replace(shards.manifest, instances=0, crowd=5)
    expected = " All 5 objects are crowd (iscrowd: 1), which is not learned."
    assert left_out(shards, split) == expected


def test_labels_of_what_was_looked_for_follow_the_mix(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.picture("1.jpg")
    lists = {"neg_category_ids": [90], "not_exhaustive_category_ids": [2]}
    federated = trial.convert([image_of(1, **lists)], [box_of(1)])
    other = [Category(1, "toothbrush"), Category(2, "cat"), Category(3, "bicycle")]
    mixed = MixedSet([federated], other)
    assert mixed.manifest.federated
    record = mixed.record(0)
    assert record["negative_labels"] == [0]
    assert record["not_exhaustive_labels"] == [2]


def test_boxes_that_leave_their_images_are_reported(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.picture("1.jpg")
    corners = [[1, 2, 7, 5], [5, 1, 8, 6], [1, 1, 2, 2]]  # as x0, y0, x1, y1 in 8 x 6 pixels
    boxes = [box_of(number, bbox=box) for number, box in enumerate(corners)]
    warning = box_warning(trial.convert([image_of(1)], boxes).manifest)
    assert warning is not None
    assert warning.startswith("2 of 3 boxes reach beyond their image.")
