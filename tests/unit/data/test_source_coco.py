from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.annotations import clean_mask, clip_box, decode_counts
from bigdet.data.making.conversion import Making
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.coco import convert_coco
from tests.unit.data.coco_trial import CATEGORIES, HEIGHT, WIDTH, Trial, box_of, image_of


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    trial = Trial(tmp_path)
    trial.picture("1.jpg")
    return trial


def test_images_come_by_rising_id_with_labels_by_rising_category_id(trial: Trial) -> None:
    trial.picture("5.png", "PNG")
    first = box_of(11, 5, category_id=90, segmentation=[[1, 2, 4, 2, 4, 4]])
    shards = trial.convert(
        [image_of(5, file_name="5.png"), image_of(1)], [first, box_of(3, 1), box_of(4, 5)]
    )
    assert [(category.id, category.name) for category in shards.categories] == [
        (2, "bicycle"),
        (90, "toothbrush"),
    ]
    assert shards.categories[1].supercategory == "indoor"
    assert shards.index["image_id"].tolist() == [1, 5]
    assert shards.read(0).image_bytes == (trial.images / "1.jpg").read_bytes()
    assert shards.record(1) == {
        "image_id": 5,
        "file_name": "5.png",
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {
                "id": 11,
                "label": 1,
                "bbox": [1, 2, 3, 2],
                "area": 5.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 4, 2, 4, 4]],
            },
            {"id": 4, "label": 0, "bbox": [1, 2, 3, 2], "area": 5.5, "iscrowd": 0},
        ],
    }
    assert shards.manifest.name == "a"
    assert shards.manifest.skipped == shards.manifest.changed == {}
    assert not (trial.out / "skipped.jsonl").exists()


def test_an_image_without_annotations_is_kept(trial: Trial) -> None:
    shards = trial.convert([image_of(1)], [])
    assert shards.record(0)["annotations"] == []
    assert shards.index["num_boxes"].tolist() == [0]


def test_images_that_cannot_be_used_are_skipped_counted_and_listed(trial: Trial) -> None:
    data = trial.picture("3.jpg")
    (trial.images / "3.jpg").write_bytes(data[: len(data) // 2])
    (trial.images / "4.jpg").write_bytes(b"GIF89a and so on")
    trial.picture("5.jpg", width=WIDTH + 1)
    trial.picture("../outside.jpg")
    (trial.images / "7.jpg").mkdir()
    images = [image_of(number) for number in (1, 2, 3, 4, 5, 7)]
    images.append(image_of(6, file_name="../outside.jpg"))
    images.append(image_of(8, file_name=str(trial.images / "1.jpg")))
    shards = trial.convert(images, [box_of(1), box_of(2, 3)])
    assert shards.index["image_id"].tolist() == [1]
    assert shards.manifest.instances == 1
    assert shards.manifest.skipped == {
        "file missing": 2,
        "file name leads out of the image folder": 2,
        "not an image that can be read: convert it to PNG or JPEG": 1,
        "not decodable": 1,
        "size differs": 1,
    }
    assert [line["image_id"] for line in trial.log()] == [2, 3, 4, 5, 6, 7, 8]
    assert trial.log()[3] == {
        "skipped": "size differs",
        "image_id": 5,
        "file_name": "5.jpg",
        "found": [6, 9],
        "recorded": [6, 8],
    }


def test_annotations_that_cannot_be_used_are_dropped_or_clipped_and_counted(trial: Trial) -> None:
    annotations = [
        box_of(1, bbox=[-1, 2, 4, 2], area=None),  # x from -1 to 3: clipped to 0 to 3
        box_of(2, bbox=[1, 2, 0, 2]),
        box_of(3, bbox=[9, 2, 3, 2]),  # right of the image, which ends at 8
        box_of(4, bbox=[1, 2, math.nan, 2]),
        box_of(5, bbox=[1, 2, 3]),
        box_of(6, segmentation=[[1, 2, 4, 2]]),  # two points
        box_of(7, image_id=99),
        box_of(8, bbox=[5, 4, 3.004, 2.0]),  # over by a rounding error: as it is
        box_of(9, bbox=None),
        box_of(10, bbox=[1, 2, 1e-9, 2]),  # its edges are one float32 number
        box_of(11, bbox=[10**400, 2, 3, 2]),
        box_of(12, iscrowd="perhaps"),
        box_of(13, area=-2),
        box_of(14, area=1e30),
        box_of(15, segmentation=[[1, 2, 4, 2, 4, 4], [1, 2, 3]]),
    ]
    shards = trial.convert([image_of(1)], annotations)
    found = shards.record(0)["annotations"]
    assert [(entry["id"], entry["bbox"], entry["area"]) for entry in found] == [
        (1, [0, 2, 3, 2], 6),
        (6, [1, 2, 3, 2], 5.5),
        (8, [5, 4, 3.004, 2.0], 5.5),
        (13, [1, 2, 3, 2], 6),
        (14, [1, 2, 3, 2], 6),
        (15, [1, 2, 3, 2], 5.5),
    ]
    masks = [entry.get("segmentation") for entry in found]
    assert masks == [None] * 5 + [[[1, 2, 4, 2, 4, 4]]]
    assert shards.manifest.instances == 6
    assert shards.manifest.changed == {
        "annotation dropped: box has no area in the image": 3,
        "annotation dropped: box is not four finite numbers": 4,
        "annotation dropped: iscrowd is neither 0 nor 1": 1,
        "annotation dropped: its image is not listed": 1,
        "area replaced by that of the box": 2,
        "box clipped to the image": 1,
        "mask dropped: neither polygons nor RLE of the image": 1,
        "part of a mask dropped: not a polygon in the image": 1,
    }
    ids = [line["annotation_id"] for line in trial.log()]
    assert ids == [7, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15]


def test_boxes_are_clipped_at_all_four_edges() -> None:
    assert clip_box([-2.5, -1, 20, 30], height=6, width=8) == [0, 0, 8, 6]
    assert clip_box([6, 5, 4, 4], height=6, width=8) == [6, 5, 2, 1]
    assert clip_box([1.25, 2, 3, 4], height=6, width=8) == [1.25, 2, 3, 4]
    assert clip_box([8, 2, 3, 4], height=6, width=8) is None
    assert clip_box([1, 2, -3, 4], height=6, width=8) is None


@pytest.mark.parametrize("is_compressed", [False, True])
def test_both_forms_of_rle_are_stored_compressed(trial: Trial, is_compressed: bool) -> None:
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    bitmap[1:3, 0] = 1  # column by column: 1 off, 2 on, 3 + 42 off
    rle: dict[str, Any] = {"size": [HEIGHT, WIDTH], "counts": [1, 2, 45]}
    if is_compressed:
        rle["counts"] = coco_mask.encode(bitmap)["counts"].decode()
    shards = trial.convert([image_of(1)], [box_of(1, segmentation=rle, iscrowd=1)])
    mask = shards.record(0)["annotations"][0]["segmentation"]
    assert isinstance(mask["counts"], str)
    assert (coco_mask.decode(mask) == bitmap).all()
    assert (shards.manifest.instances, shards.manifest.crowd) == (0, 1)
    assert shards.index["num_boxes"].tolist() == [0]
    assert shards.manifest.changed == {}


def test_compressed_counts_decode_as_pycocotools_encodes_them() -> None:
    random = np.random.default_rng(5)
    for _ in range(50):
        counts = [int(n) for n in random.integers(0, 5000, size=random.integers(1, 9))]
        total = sum(counts)
        rle = coco_mask.frPyObjects({"size": [total, 1], "counts": counts}, total, 1)
        assert decode_counts(rle["counts"].decode()) == counts


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [6, 8], "counts": [1, 2, 44]},  # 47 of 48 pixels
        {"size": [6, 8], "counts": [50, -2]},
        {"size": [8, 6], "counts": [48]},
        {"size": [6, 8], "counts": [48.0]},
        {"size": [6, 8], "counts": "zzzz"},
        {"size": [6, 8], "counts": "0P"},  # the second number ends in the middle
        {"size": [6, 8], "counts": "\x00"},
        {"size": [6, 8]},
        {"counts": [48]},
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, math.inf]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 1e9, 6]],
        [[1, 2, 3, 2, 5, 2]],  # flat
        [[9, 2, 12, 2, 12, 5]],  # right of the image
        {"size": [6, 8], "counts": [48]},  # not one pixel
        {"size": [6, 8], "counts": "P" * 100},  # a number that never ends
        [1, 2, 3, 4, 5, 6],
        "polygon",
    ],
)
def test_what_pycocotools_would_choke_on_is_no_mask(mask: Any) -> None:
    assert clean_mask(mask, HEIGHT, WIDTH) is None


def test_parts_of_a_mask_that_are_no_polygons_are_left_out() -> None:
    triangle = [1, 2, 4, 2, 4, 4.5]
    assert clean_mask([triangle, [1, 2]], HEIGHT, WIDTH) == [triangle]


def content_without(key: str) -> dict[str, Any]:
    content = {"images": [image_of(1)], "annotations": [box_of(1)], "categories": CATEGORIES}
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json: not JSON \("),
        ("\x89PNG", r"a\.json: not JSON \("),
        ("[]", "not a COCO annotation file: the top is a list"),
        ('{"a": 1}', "not a COCO annotation file: it has no list of images, only a"),
        (json.dumps(content_without("annotations")), "it has no list of annotations, only images"),
        (json.dumps(content_without("categories")), "it has no list of categories"),
        (json.dumps({**content_without(""), "images": []}), "list of images is empty"),
    ],
)
def test_a_file_that_is_not_coco_is_one_clear_error(trial: Trial, text: str, message: str) -> None:
    trial.file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=message):
        convert_coco(trial.images, trial.file, trial.out)
    trial.assert_nothing_is_left()


def test_images_whose_annotations_are_secret_come_without_any(trial: Trial) -> None:
    picture = image_of(7)
    trial.picture(picture["file_name"])
    file = trial.file.with_name("image_info_test-dev2017.json")
    file.write_text(json.dumps({"images": [picture], "categories": CATEGORIES}))
    convert_coco(trial.images, file, trial.out)
    shards = ShardSet(trial.out)
    assert shards.index["image_id"].tolist() == [7]
    assert shards.record(0)["annotations"] == []


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ([image_of(1), image_of(1)], [], "1 image ids that occur more than once: 1"),
        ([image_of(1)], [box_of(4), box_of(4)], "1 annotation ids .* more than once: 4"),
        ([image_of(1)], [box_of(4, category_id=7)], "1 annotations of category ids .* not .*: 7"),
        ([image_of(-1), image_of(-5)], [], "2 image ids that are negative: -5, -1"),
        (
            [image_of(2**63)],
            [],
            r"images\[0\] .* id is 9223372036854775808, expected an integer below",
        ),
        ([image_of(None)], [], r"images\[0\] is not as in COCO: id is None, expected an integer"),
        ([image_of(1, height=6.5)], [], r"images\[0\] .* height is 6.5, expected an integer"),
        ([image_of(1), 5], [], r"images\[1\] is not as in COCO: id is None"),
        ([image_of(1, file_name=3)], [], r"images\[0\] .* file_name is 3, expected a string"),
        ([image_of(1)], [{"id": 1}], r"annotations\[0\] is not as in COCO: image_id is None"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_clear_error(
    trial: Trial, images: list[Any], annotations: list[Any], message: str
) -> None:
    with pytest.raises(ShardError, match=rf"a\.json: {message}"):
        trial.convert(images, annotations)
    trial.assert_nothing_is_left()


def test_long_lists_of_ids_are_shortened(trial: Trial) -> None:
    images = [image_of(number) for number in range(8)]
    with pytest.raises(ShardError, match=r"8 image ids .*: 0, 1, 2, 3, 4, \.\.\.\. Correct"):
        trial.convert(images * 2, [])


def test_a_missing_annotation_file_is_an_error(trial: Trial) -> None:
    with pytest.raises(ShardError, match=r"a\.json: cannot be read \(No such file"):
        convert_coco(trial.images, trial.file, trial.out)
    trial.assert_nothing_is_left()


def test_a_missing_empty_or_wrong_image_folder_is_an_error(trial: Trial, tmp_path: Path) -> None:
    (trial.images / "1.jpg").rename(trial.images / "one.jpg")
    with pytest.raises(ShardError, match=r"holds none of the 1 images .* first is 1\.jpg"):
        trial.convert([image_of(1)], [])
    (trial.images / "one.jpg").unlink()
    with pytest.raises(ShardError, match=r"images: the folder is empty"):
        trial.convert([image_of(1)], [])
    trial.images.rmdir()
    with pytest.raises(ShardError, match=r"images: no such folder"):
        trial.convert([image_of(1)], [])
    trial.assert_nothing_is_left()


def test_a_folder_with_shards_is_refused_and_kept(trial: Trial) -> None:
    trial.convert([image_of(1)], [box_of(1)])
    before = {path.name: path.read_bytes() for path in trial.out.iterdir()}
    with pytest.raises(ShardError, match="has shards already"):
        trial.convert([image_of(1)], [])
    assert {path.name: path.read_bytes() for path in trial.out.iterdir()} == before


def test_ids_above_2_to_the_53_are_kept_exactly(trial: Trial) -> None:
    number = 2**53 + 1  # the first that a double cannot hold
    trial.picture(f"{number}.jpg")
    shards = trial.convert([image_of(number)], [box_of(number + 2, number)])
    assert shards.index["image_id"].tolist() == [number]
    assert shards.record(0)["annotations"][0]["id"] == number + 2


def test_names_with_spaces_and_letters_of_any_kind_are_read(trial: Trial) -> None:
    names = ["a b.jpg", "\u00e4\u4e2d\U0001f600.jpg", "x" * 300 + ".jpg", "half \ud800.jpg", ""]
    for name in names[:2]:
        trial.picture(name)
    listed = [image_of(place, file_name=name) for place, name in enumerate(names)]
    shards = trial.convert(listed, [])
    assert [shards.record(row)["file_name"] for row in range(2)] == names[:2]
    assert shards.manifest.skipped == {"file missing": 3}


def test_a_self_crossing_polygon_is_kept_and_covers_what_odd_turns_surround(trial: Trial) -> None:
    bow = [0, 0, 8, 6, 8, 0, 0, 6]
    shards = trial.convert([image_of(1)], [box_of(1, segmentation=[bow])])
    assert shards.record(0)["annotations"][0]["segmentation"] == [bow]
    assert shards.manifest.changed == {}


def test_images_of_absurd_size_are_never_decoded(trial: Trial) -> None:
    """Headers that promise 20,000 x 20,000 pixels: as the record says, and not."""
    frame = (20_000).to_bytes(2, "big") * 2
    data = bytearray(trial.picture("2.jpg"))
    place = data.index(b"\xff\xc0") + 5  # height and width in the start of frame
    data[place : place + 4] = frame
    for name in ("2.jpg", "3.jpg"):
        (trial.images / name).write_bytes(data)
    png = bytearray(trial.picture("4.png", "PNG"))
    png[16:24] = (20_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (trial.images / "4.png").write_bytes(png)
    (trial.images / "5.jpg").write_bytes(b"")
    large = {"height": 20_000, "width": 20_000}
    images = [image_of(1), image_of(2, **large), image_of(3), image_of(5)]
    shards = trial.convert([*images, image_of(4, file_name="4.png", **large)], [])
    assert shards.index["image_id"].tolist() == [1]
    assert shards.manifest.skipped == {
        "file empty": 1,
        "more pixels than shards hold": 2,
        "size differs": 1,
    }


def test_real_coco_keeps_every_image_instance_crowd_and_mask(
    coco_dir: Path, tmp_path: Path
) -> None:
    file = coco_dir / "annotations" / "instances_val2017.json"
    manifest = convert_coco(coco_dir / "val2017", file, tmp_path, making=Making(10))
    assert manifest is not None
    assert len(manifest.shards) > 1
    assert max(shard.bytes for shard in manifest.shards) <= 10**7 + 20_480  # a tar's padded end
    assert manifest.skipped == manifest.changed == {}
    assert list(check_shards(tmp_path)) == []
    truth = COCO(str(file))
    shards = ShardSet(tmp_path)
    assert shards.index["image_id"].tolist() == sorted(truth.imgs)
    per_class: Counter[tuple[int, int]] = Counter()
    for row in range(len(shards)):
        for entry in shards.record(row)["annotations"]:
            source = truth.anns[entry["id"]]
            assert source["category_id"] == shards.categories[entry["label"]].id
            assert (source["bbox"], source["area"]) == (entry["bbox"], entry["area"])
            per_class[source["category_id"], entry["iscrowd"]] += 1
            if entry["iscrowd"]:
                stored = coco_mask.decode(entry["segmentation"])
                assert (stored == truth.annToMask(source)).all()
            else:
                assert entry["segmentation"] == source["segmentation"]
    expected = Counter((a["category_id"], a["iscrowd"]) for a in truth.anns.values())
    assert per_class == expected


def test_a_list_of_categories_fixes_the_labels_and_the_file_the_ids(trial: Trial) -> None:
    # The file has bicycle 2 and toothbrush 90. The list's own ids do not count, but for what the
    # file lacks: cat's 2 is taken, so it gets the next free one.
    listed = [Category(2, "cat"), Category(1, "Toothbrush "), Category(5, "bicycle")]
    shards = trial.convert([image_of(1)], [box_of(3, category_id=90), box_of(4)], categories=listed)
    assert [(category.id, category.name) for category in shards.categories] == [
        (91, "cat"),
        (90, "toothbrush"),
        (2, "bicycle"),
    ]
    assert [each["label"] for each in shards.record(0)["annotations"]] == [1, 2]


def test_objects_of_a_category_that_is_not_listed_are_an_error(trial: Trial) -> None:
    objects = [box_of(3, category_id=90), box_of(4)]
    with pytest.raises(ShardError, match=r"1 objects of 1 categories .* the list: toothbrush\."):
        trial.convert([image_of(1)], objects, categories=[Category(1, "bicycle")])
    trial.convert([image_of(1)], [box_of(4)], categories=[Category(1, "bicycle")])  # none of them
