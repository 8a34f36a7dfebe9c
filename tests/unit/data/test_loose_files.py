"""Annotation files of other tools: loose numbers, missing sizes, flags, LVIS's and same names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bigdet.config.data import SubsetConfig, TrainSplitConfig
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.loose_values import truth_value, whole_number
from bigdet.data.making.sources.categories import load_categories
from bigdet.data.making.sources.coco import convert_coco, convert_objects365
from bigdet.data.ordering.selection import select
from tests.unit.data.coco_trial import CATEGORIES, HEIGHT, WIDTH, Trial, box_of, image_of

SQUARE = [[1, 2, 3, 2, 3, 4, 1, 4]]  # 2 x 2 pixels in the box of 3 x 2 that box_of has


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    trial = Trial(tmp_path)
    for number in (1, 2):
        trial.picture(f"{number}.jpg")
    return trial


def convert(trial: Trial, categories: list[Any], **content: Any) -> ShardSet:
    trial.file.write_text(json.dumps({"categories": categories, **content}))
    convert_coco(trial.images, trial.file, trial.out)
    return ShardSet(trial.out)


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (3.0, 3), ("3", 3), ("003", 3), ("3.0", 3), (" -3 ", -3), (2**63 - 1, 2**63 - 1)]
    + [(v, None) for v in (3.5, "3.5", "x", "", None, True, math.nan, math.inf, 2**63, [3])],
)
def test_whole_numbers_are_read_in_every_form(value: Any, number: int | None) -> None:
    assert whole_number(value) == number


@pytest.mark.parametrize(
    ("value", "flag"),
    [(v, True) for v in (1, True, 1.0, "1", "true", "True", "1.0", "yes")]
    + [(v, False) for v in (0, False, 0.0, "0", "false", "", None, math.nan)]
    + [(v, None) for v in (2, -1, 0.5, "2", "maybe", [], [1], {})],
)
def test_flags_are_read_in_every_form(value: Any, flag: bool | None) -> None:
    assert truth_value(value) is flag


def test_ids_and_sizes_as_floats_or_text_are_numbers(trial: Trial) -> None:
    loose = box_of(4.0, 1.0, category_id="2", iscrowd="0")
    shards = convert(
        trial,
        [{"id": 2.0, "name": "bicycle"}],
        images=[image_of(1.0, height=float(HEIGHT), width=str(WIDTH), file_name="1.jpg")],
        annotations=[loose],
    )
    assert [category.id for category in shards.categories] == [2]
    record = shards.record(0)
    assert (record["image_id"], record["height"], record["width"]) == (1, HEIGHT, WIDTH)
    assert [entry["id"] for entry in record["annotations"]] == [4]
    assert shards.manifest.changed == {}


@pytest.mark.parametrize("size", [None, 0, "", math.nan])
def test_a_size_that_is_not_recorded_is_read_from_the_file(trial: Trial, size: Any) -> None:
    shards = trial.convert([image_of(1, height=size, width=size)], [box_of(1)])
    record = shards.record(0)
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    assert record["annotations"][0]["bbox"] == [1, 2, 3, 2]
    reason = "size of an image not recorded: taken from its file"
    assert shards.manifest.changed == {reason: 1}


def test_image_ids_that_are_text_keep_their_number_if_all_have_one(trial: Trial) -> None:
    images = [image_of("00002", file_name="2.jpg"), image_of("00001", file_name="1.jpg")]
    shards = trial.convert(images, [box_of(1, "00002"), box_of(2, "3")])
    assert shards.index["image_id"].tolist() == [1, 2]
    records = [shards.record(row) for row in (0, 1)]
    assert [record["source_id"] for record in records] == ["00001", "00002"]
    assert [len(record["annotations"]) for record in records] == [0, 1]
    assert shards.manifest.changed == {"annotation dropped: its image is not listed": 1}
    assert shards.manifest.options["image_ids"] == "strings"


def test_ids_that_are_numbers_mixed_with_names_are_kept_as_text(trial: Trial) -> None:
    trial.picture("b.jpg")
    images = [image_of("b"), image_of(1)]  # image 1 becomes number 2
    boxes = [box_of(1, image_id="b"), box_of(2, image_id=1)]
    shards = trial.convert(images, boxes)
    records = [shards.record(row) for row in range(2)]
    assert [(record["image_id"], record["source_id"]) for record in records] == [(1, "b"), (2, "1")]


def test_image_ids_that_are_names_become_places_in_the_file(trial: Trial) -> None:
    images = [image_of("frame_b", file_name="2.jpg"), image_of("7", file_name="1.jpg")]
    boxes = [box_of(1, "7"), box_of(2, "frame_b"), box_of(3, "frame_b"), box_of(4, "frame_x")]
    shards = trial.convert(images, boxes)
    records = [shards.record(row) for row in (0, 1)]
    assert [(r["image_id"], r["source_id"]) for r in records] == [(1, "frame_b"), (2, "7")]
    ids = [[entry["id"] for entry in record["annotations"]] for record in records]
    assert ids == [[2, 3], [1]]
    assert shards.manifest.changed == {"annotation dropped: its image is not listed": 1}


@pytest.mark.parametrize("is_escaped", [True, False])
def test_image_ids_beyond_ascii_find_their_annotations(trial: Trial, is_escaped: bool) -> None:
    image = image_of("stra\u00dfe \u4e00", file_name="1.jpg")
    content = {"images": [image], "annotations": [box_of(4, image["id"])]}
    content["categories"] = CATEGORIES
    trial.file.write_text(json.dumps(content, ensure_ascii=is_escaped), encoding="utf-8")
    manifest = convert_coco(trial.images, trial.file, trial.out)
    assert (manifest.images, manifest.instances, manifest.changed) == (1, 1, {})


def test_a_subset_may_list_the_names(trial: Trial, tmp_path: Path) -> None:
    names = ["x", "00007"]
    images = [image_of(name, file_name=f"{n}.jpg") for n, name in enumerate(names, 1)]
    shards = trial.convert(images, [box_of(1, "x"), box_of(2, "00007")])
    for listed, rows in ((["00007"], [1]), (["x", 2], [0, 1]), ([1], [0])):
        (tmp_path / "ids").write_text(json.dumps(listed))
        subset = SubsetConfig(ids=str(tmp_path / "ids"))
        split = TrainSplitConfig(shards="x", subset=subset)
        assert select(ShardSet(shards.folder), split).rows.tolist() == rows


def test_a_name_given_to_two_images_is_an_error(trial: Trial) -> None:
    images = [image_of("a", file_name="1.jpg"), image_of("a", file_name="2.jpg")]
    with pytest.raises(ShardError, match="1 image ids that occur more than once: a"):
        trial.convert(images, [])


def test_annotation_ids_that_are_missing_or_shared_are_numbered(trial: Trial) -> None:
    reason = "ids of annotations replaced by their places in the file"
    images = [image_of(1), image_of(2)]
    shards = trial.convert(images, [box_of(0, 2), box_of(0, 1), box_of(0, 2, area=5)])
    ids = [[entry["id"] for entry in shards.record(row)["annotations"]] for row in (0, 1)]
    assert ids == [[2], [1, 3]]
    assert shards.manifest.changed == {f"{reason}: some are shared": 1}


def test_annotation_ids_that_are_no_numbers_are_numbered(trial: Trial) -> None:
    boxes = [{**box_of(8), "id": "x"}, box_of(8), {**box_of(9), "id": None}]
    shards = trial.convert([image_of(1)], boxes)
    assert [entry["id"] for entry in shards.record(0)["annotations"]] == [1, 2, 3]


def test_keypoints_are_not_matched_by_ids_that_were_made_up(trial: Trial) -> None:
    with pytest.raises(ShardError, match=r"a\.json: the annotations have no unique ids"):
        trial.convert([image_of(1), image_of(2)], [box_of(0), box_of(0, 2)], keypoints=trial.file)


def test_objects_to_ignore_become_crowd(trial: Trial) -> None:
    flags: list[dict[str, Any]] = [
        {"ignore": 1},
        {"ignore": True},
        {"ignore": "true"},
        {"difficult": 1},
        {"ignore": 0},
        {"ignore": None},
        {"ignore": "0"},
        {"isfake": 1, "isreflected": 1},
        {"ignore": 1, "iscrowd": 1},
    ]
    boxes = [box_of(number, **flag) for number, flag in enumerate(flags)]
    shards = trial.convert([image_of(1)], boxes)
    crowd = [entry["iscrowd"] for entry in shards.record(0)["annotations"]]
    assert crowd == [1, 1, 1, 1, 0, 0, 0, 0, 1]
    assert shards.manifest.changed == {
        "object made crowd: ignore is set": 3,
        "object made crowd: difficult is set": 1,
    }


def test_a_negative_size_is_not_recorded(trial: Trial) -> None:
    shards = trial.convert([image_of(1, height=-1, width=-1)], [])
    assert (shards.record(0)["height"], shards.record(0)["width"]) == (6, 8)


def test_a_file_in_utf_16_is_named(trial: Trial) -> None:
    trial.file.write_bytes(json.dumps({"images": [image_of(1)]}).encode("utf-16"))
    with pytest.raises(ShardError, match="it seems to be UTF-16: store it as UTF-8"):
        convert_coco(trial.images, trial.file, trial.out)


def test_the_reason_of_a_file_that_is_no_image_is_the_same_each_time(trial: Trial) -> None:
    (trial.images / "x.jpg").write_bytes(b"<html>not found</html>")
    trial.convert([image_of(1), image_of(2, file_name="x.jpg")], [])
    (line,) = trial.log()
    assert line["error"] == "not an image that is known: begins with b'<html>not found<'"


def test_flags_of_other_tools_make_crowd_too(trial: Trial) -> None:
    boxes = [box_of(1, is_crowd=1), box_of(2, IsGroupOf=True), box_of(3, is_crowd=0, IsGroupOf=0)]
    shards = trial.convert([image_of(1)], boxes)
    assert [entry["iscrowd"] for entry in shards.record(0)["annotations"]] == [1, 1, 0]
    assert shards.manifest.changed == {
        "object made crowd: IsGroupOf is set": 1,
        "object made crowd: is_crowd is set": 1,
    }


def test_numbers_that_are_text_are_numbers(trial: Trial) -> None:
    box = box_of(1, bbox=["1", "2.0", " 3 ", "2"], area="5.5", segmentation=[])
    shards = trial.convert([image_of(1)], [box, box_of(2, bbox=["1", "2", "3", "x"])])
    assert [
        (entry["id"], entry["bbox"], entry["area"]) for entry in shards.record(0)["annotations"]
    ] == [(1, [1, 2, 3, 2], 5.5)]
    assert shards.manifest.changed == {"annotation dropped: box is not four finite numbers": 1}


def test_a_box_that_is_turned_becomes_the_one_around_it(trial: Trial) -> None:
    # 4 x 2 around (4, 3), by 90 degrees: 2 x 4 around the same point. By 30 degrees it is
    # 4 cos 30 + 2 sin 30 = 4.46 wide and 4 sin 30 + 2 cos 30 = 3.73 high.
    boxes = [
        box_of(number, bbox=[2, 2, 4, 2], area=8, attributes={"rotation": angle})
        for number, angle in enumerate((90, 30.0, 0.0, None, "x"))
    ]
    shards = trial.convert([image_of(1)], boxes)
    found = [entry["bbox"] for entry in shards.record(0)["annotations"]]
    assert found == [[3, 1, 2, 4], [1.77, 1.13, 4.46, 3.73], *[[2, 2, 4, 2]] * 3]
    assert [entry["area"] for entry in shards.record(0)["annotations"]] == [8] * 5
    reason = "rotated box replaced by the upright one around it (attributes.rotation)"
    assert shards.manifest.changed == {reason: 2}


def test_masks_of_nothing_are_none(trial: Trial) -> None:
    nothing: list[Any] = [None, [], [[]], [[], []], {}, ""]
    boxes = [box_of(number, segmentation=mask) for number, mask in enumerate(nothing)]
    shards = trial.convert([image_of(1)], boxes)
    assert not any("segmentation" in entry for entry in shards.record(0)["annotations"])
    assert shards.manifest.changed == {}


def test_a_supercategory_that_is_no_text_is_left_out(trial: Trial) -> None:
    categories = [{"id": 2, "name": "bicycle", "supercategory": 0}]
    shards = convert(trial, categories, images=[image_of(1)], annotations=[])
    assert shards.categories[0].supercategory is None
    assert shards.manifest.changed == {"supercategory left out: not a string": 1}


def test_an_area_of_nothing_is_that_of_the_mask_or_of_the_box(trial: Trial) -> None:
    boxes = [
        box_of(1, area=0, segmentation=SQUARE),
        box_of(2, area=0),
        box_of(3, area=0.5),
        box_of(4, area=None, segmentation=SQUARE),
    ]
    shards = trial.convert([image_of(1)], boxes)
    areas = [entry["area"] for entry in shards.record(0)["annotations"]]
    assert areas == [4, 6, 0.5, 4]
    assert shards.manifest.changed == {
        "area replaced by that of the mask": 1,
        "area replaced by that of the box": 1,
    }


def test_a_relative_mask_of_a_box_in_pixels_is_dropped(trial: Trial) -> None:
    relative = [[0.1, 0.3, 0.5, 0.3, 0.5, 0.6]]
    boxes = [box_of(1, segmentation=relative), box_of(2, segmentation=SQUARE)]
    shards = trial.convert([image_of(1)], boxes)
    found = [entry.get("segmentation") for entry in shards.record(0)["annotations"]]
    assert found == [None, SQUARE]
    reason = "mask dropped: within 0 to 1, so relative coordinates"
    assert shards.manifest.changed == {reason: 1}


def test_relative_coordinates_are_an_error(trial: Trial) -> None:
    boxes = [box_of(1, bbox=["0.25", "0.5", 0.5, 0.5]), box_of(2, bbox=[0, 0, 1, 0.75])]
    with pytest.raises(ShardError, match=r"all 2 boxes are within 0 to 1, .* relative coordinates"):
        trial.convert([image_of(1)], boxes)
    trial.assert_nothing_is_left()
    assert trial.convert([image_of(1)], [*boxes, box_of(3)]).manifest.instances == 3


@pytest.mark.parametrize("convert_one", [convert_coco, convert_objects365])
@pytest.mark.parametrize("second", ["bolt", " bolt", "bolt "])
def test_two_classes_of_one_name_are_refused(trial: Trial, convert_one: Any, second: str) -> None:
    categories = [{"id": 5, "name": "bolt"}, {"id": 9, "name": second}, {"id": 7, "name": "Bolt"}]
    content = {"images": [image_of(1)], "annotations": [], "categories": categories}
    trial.file.write_text(json.dumps(content))
    message = r"several categories have the same name \('bolt': ids 5, 9\)"
    with pytest.raises(ShardError, match=message):
        convert_one(trial.images, trial.file, trial.out)
    with pytest.raises(ShardError, match=message):
        load_categories(trial.file)
    trial.assert_nothing_is_left()


def lvis(trial: Trial, name: str) -> None:
    """An image in train2017 and one in val2017, named by their addresses alone."""
    images: list[dict[str, Any]] = []
    for number, folder in ((1, "train2017"), (2, "val2017")):
        (trial.images / folder).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(trial.images / folder / f"{number}.png")
        url = f"http://host/{folder}/{number}.png"
        images.append({**image_of(number, coco_url=url), "neg_category_ids": [90]})
    del images[0]["file_name"]
    images[1] |= {"file_name": None, "not_exhaustive_category_ids": [2.0]}
    categories = [
        {"id": 90, "name": "clock", "frequency": "c"},
        {"id": 2, "name": "acorn", "frequency": "r"},
    ]
    content = {"images": images, "annotations": [box_of(1, 2)], "categories": categories}
    trial.file.write_text(json.dumps(content))
    convert_coco(trial.images / name, trial.file, trial.out)


def test_images_of_lvis_are_found_and_say_what_was_looked_for(trial: Trial) -> None:
    lvis(trial, ".")
    shards = ShardSet(trial.out)
    records = [shards.record(row) for row in (0, 1)]
    assert [r["file_name"] for r in records] == ["train2017/1.png", "val2017/2.png"]
    assert [r["negative_labels"] for r in records] == [[1], [1]]
    assert [r["not_exhaustive_labels"] for r in records] == [[], [0]]
    assert shards.manifest.federated
    assert shards.categories == [
        Category(2, "acorn", frequency="r"),
        Category(90, "clock", frequency="c"),
    ]


def test_a_list_of_categories_may_lack_classes_that_images_of_lvis_list(trial: Trial) -> None:
    image = image_of(1, neg_category_ids=[90], not_exhaustive_category_ids=[2, 90])
    shards = trial.convert([image], [box_of(4)], categories=[Category(1, "bicycle")])
    record = shards.record(0)
    assert (record["negative_labels"], record["not_exhaustive_labels"]) == ([], [0])
    reason = "classes not in the list of categories left out of lists of images"
    assert trial.log() == [{"changed": reason, "classes": ["toothbrush"]}]
    assert shards.manifest.changed == {reason: 1}


def test_images_of_lvis_are_found_in_one_of_its_folders(trial: Trial) -> None:
    lvis(trial, "val2017")
    assert ShardSet(trial.out).index["image_id"].tolist() == [2]


def test_lists_of_lvis_test_images_have_no_annotations(trial: Trial) -> None:
    trial.file = trial.file.with_name("lvis_v1_image_info_test_dev.json")
    shards = convert(trial, [{"id": 1, "name": "a"}], images=[image_of(1)])
    assert shards.record(0)["annotations"] == []


def test_lists_of_classes_must_be_of_known_ones(trial: Trial) -> None:
    with pytest.raises(ShardError, match=r"1 category ids of images .* not in its categories: 5"):
        trial.convert([image_of(1, neg_category_ids=[5])], [])
    with pytest.raises(ShardError, match=r"neg_category_ids is 2, expected a list of category ids"):
        trial.convert([image_of(1, neg_category_ids=2)], [])
