"""Keypoints in a second file, merged by image and annotation id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigdet.data.examples.objects import keypoint_order
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import FLAG_KEYPOINTS, ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.categories import flip_pairs
from bigdet.data.making.sources.coco import convert_coco
from tests.unit.data.coco_trial import Trial, box_of, image_of

POINTS = [1, 2, 2, 3, 3, 1, 0, 0, 0]
PERSON = {
    "id": 2,
    "name": "bicycle",
    "keypoints": ["nose", "left_eye", "right_eye"],
    "skeleton": [[2, 3], [1, 2]],
}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    trial = Trial(tmp_path)
    for name in ("1.jpg", "2.jpg"):
        trial.picture(name)
    return trial


def convert(trial: Trial, points: list[dict[str, Any]], person: Any = PERSON) -> ShardSet:
    content = {"images": [image_of(1)], "annotations": points, "categories": [person]}
    file = trial.file.with_name("points.json")
    file.write_text(json.dumps(content))
    boxes = [box_of(1), box_of(2), box_of(3, 2), box_of(4, 2, category_id=90)]
    return trial.convert([image_of(1), image_of(2)], boxes, keypoints=file)


def test_keypoints_go_to_the_annotation_of_their_id(trial: Trial) -> None:
    shards = convert(trial, [box_of(2, keypoints=POINTS), box_of(3, 2, keypoints=[0] * 9)])
    first, second = shards.record(0)["annotations"], shards.record(1)["annotations"]
    assert [entry.get("keypoints") for entry in first + second] == [None, POINTS, [0] * 9, None]
    assert (shards.index["flags"] & FLAG_KEYPOINTS).tolist() == [FLAG_KEYPOINTS] * 2
    bicycle, toothbrush = shards.categories
    assert bicycle.keypoints == ["nose", "left_eye", "right_eye"]
    assert bicycle.skeleton == [[1, 2], [0, 1]]  # from 0
    assert bicycle.flip_pairs == [[1, 2]]
    assert toothbrush.keypoints is None
    assert shards.manifest.changed == {}
    assert list(check_shards(trial.out)) == []


def test_keypoints_that_cannot_be_used_are_counted(trial: Trial) -> None:
    shards = convert(
        trial,
        [
            box_of(1, keypoints=[1, 2, 2]),
            box_of(2, keypoints=[9, 2, 2, 1, 1, 2, 0, -5, 0]),  # the first is right of the image
            box_of(3, 2, keypoints=[1, 2, 3, 0, 0, 0, 0, 0, 0]),  # 3 is no visibility
            box_of(4, 2, keypoints=POINTS),  # of another category there
            box_of(5, 9, keypoints=POINTS),
            box_of(6, 1, keypoints=POINTS),
        ],
    )
    (_, second), (third, fourth) = (shards.record(row)["annotations"] for row in (0, 1))
    assert second["keypoints"] == [0, 0, 0, 1, 1, 2, 0, -5, 0]
    assert "keypoints" not in third | fourth
    assert shards.manifest.changed == {
        "keypoint outside of the image set to not labeled": 1,
        "keypoints dropped: no annotation of this id and category": 2,
        "keypoints dropped: a visibility is not 0, 1 or 2": 1,
        "keypoints dropped: not 3 times x, y, 0 to 2": 1,
        "keypoints dropped: their image is not listed": 1,
    }


@pytest.mark.parametrize(
    ("person", "message"),
    [
        ({"id": 2, "name": "person"}, "category 2 is 'person', but not in"),
        ({"id": 2, "name": "bicycle"}, "no category has keypoints"),
        ({**PERSON, "keypoints": "nose"}, "keypoints is 'nose', expected a list of names"),
    ],
)
def test_keypoints_of_another_data_set_are_an_error(
    trial: Trial, person: Any, message: str
) -> None:
    with pytest.raises(ShardError, match=message):
        convert(trial, [], person)
    trial.assert_nothing_is_left()


def test_real_keypoints_arrive_as_they_are(coco_dir: Path, tmp_path: Path) -> None:
    folder = coco_dir / "annotations"
    points = folder / "person_keypoints_val2017.json"
    instances = folder / "instances_val2017.json"
    convert_coco(coco_dir / "val2017", instances, tmp_path, keypoints=points)
    shards = ShardSet(tmp_path)
    expected = {
        entry["id"]: entry["keypoints"] for entry in json.loads(points.read_text())["annotations"]
    }
    found = {
        entry["id"]: entry["keypoints"]
        for row in range(len(shards))
        for entry in shards.record(row)["annotations"]
        if "keypoints" in entry
    }
    assert found == expected
    assert len(found) == 262
    person = shards.categories[0]
    assert person.flip_pairs == [[n, n + 1] for n in range(1, 17, 2)]
    assert person.supercategory == "person"
    assert shards.manifest.changed == {}


@pytest.mark.parametrize("skeleton", [[[0, 1], [1, 2]], [[1, 4]], [[1, 2], [3]], [["nose", 2]]])
def test_a_skeleton_that_does_not_fit_is_dropped_with_a_note(trial: Trial, skeleton: Any) -> None:
    shards = convert(trial, [box_of(1, keypoints=POINTS)], {**PERSON, "skeleton": skeleton})
    person = shards.categories[0]
    assert (person.skeleton, person.flip_pairs) == ([], [[1, 2]])
    assert shards.record(0)["annotations"][0]["keypoints"] == POINTS
    reason = "skeleton dropped: its pairs are not of the keypoints, counted from 1"
    assert shards.manifest.changed == {reason: 1}
    assert trial.log()[0]["category_id"] == 2


def test_empty_keypoints_are_none(trial: Trial) -> None:
    """CVAT writes empty lists for classes and objects without points."""
    none = {"id": 90, "name": "toothbrush", "keypoints": [], "skeleton": []}
    content = {"categories": [PERSON, none], "images": [image_of(1)]}
    content["annotations"] = [
        box_of(1, keypoints=POINTS),
        box_of(2, keypoints=[]),
        box_of(3, category_id=90, keypoints=[], num_keypoints=0),
    ]
    trial.file.write_text(json.dumps(content))
    convert_coco(trial.images, trial.file, trial.out)
    shards = ShardSet(trial.out)
    assert shards.categories[1] == Category(90, "toothbrush")
    found = [entry.get("keypoints") for entry in shards.record(0)["annotations"]]
    assert found == [POINTS, None, None]
    assert shards.manifest.changed == {}
    assert keypoint_order(shards.categories).tolist() == [0, 2, 1]


def test_classes_without_keypoints_do_not_matter_in_old_sets_either() -> None:
    names = ["tip", "joint"]
    old = [Category(1, "plier", keypoints=names), Category(2, "bolt", keypoints=[], skeleton=[])]
    assert keypoint_order(old).tolist() == [0, 1]


@pytest.mark.parametrize("visibility", [3, 0.97, -1])
def test_a_visibility_of_another_kind_is_reported(trial: Trial, visibility: float) -> None:
    shards = convert(trial, [box_of(1, keypoints=[*POINTS[:5], visibility, 0, 0, 0])])
    reason = "keypoints dropped: a visibility is not 0, 1 or 2"
    assert shards.manifest.changed == {reason: 1}
    assert trial.log()[0]["found"] == [visibility]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["Left Eye", "Right Eye"], [[0, 1]]),
        (["eyeRight", "eyeLeft", "nose"], [[1, 0]]),
        (["L_eye", "R_eye", "eye.r", "eye.l"], [[0, 1], [3, 2]]),
        (["l-hip", "r-hip", "l", "r"], [[0, 1]]),  # letters alone may be anything
        (["all", "arr", "left_ear"], []),
    ],
)
def test_sides_are_known_in_all_ways_of_writing_them(names: Any, pairs: Any) -> None:
    assert flip_pairs(names) == pairs


def test_names_that_are_numbers_and_relative_keypoints(trial: Trial) -> None:
    # (0.25, 0.5) is in parts of the image, where the box has 3 x 2 pixels; (1, 1) is a pixel.
    points = [[2, 3, 2, 3, 3, 1], [0.25, 0.5, 2, 0.5, 0.5, 2], [1, 1, 2, 0, 0, 0]]
    boxes = [box_of(number, keypoints=entry) for number, entry in enumerate(points)]
    content = {"images": [image_of(1)], "annotations": boxes}
    categories = [{"id": 2, "name": "bicycle", "keypoints": [1, 2]}]
    trial.file.write_text(json.dumps({**content, "categories": categories}))
    convert_coco(trial.images, trial.file, trial.out)
    shards = ShardSet(trial.out)
    assert shards.categories[0].keypoints == ["1", "2"]
    found = [entry.get("keypoints") for entry in shards.record(0)["annotations"]]
    assert found == [points[0], None, points[2]]
    reason = "keypoints dropped: within 0 to 1, so relative coordinates"
    assert shards.manifest.changed == {reason: 1}
