"""Tars that webdataset, or anybody, wrote without us."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset

from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import FLAG_CROWD, FLAG_MASKS, ShardSet
from bigdet.data.making.indexing import index_shards
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.categories import load_categories
from bigdet.data.making.storage import open_storage
from bigdet.evaluation.ground_truth import read_ground_truth

CATEGORIES = [Category(18, "dog"), Category(3, "cat")]
JPEG: bytes = simplejpeg.encode_jpeg(np.full((6, 8, 3), 90, dtype=np.uint8))


def record_of(image_id: Any, **changes: Any) -> dict[str, Any]:
    box = {"id": 1, "label": 1, "bbox": [1, 2, 3, 2.5], "area": 7.5, "iscrowd": 0}
    about = {"image_id": image_id, "file_name": "a.jpg", "height": 6, "width": 8}
    return {**about, "annotations": [{**box, **changes}]}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, record: Any, image: bytes = JPEG) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", json.dumps(record).encode())]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_webdatasets_own_writer_wrote_is_read(tmp_path: Path) -> None:
    pattern = str(tmp_path / "part-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for number in range(5):
            record = record_of(100 + number, iscrowd=number == 4)
            writer.write({"__key__": f"some/folder/img {number}", "jpg": JPEG, "json": record})
    manifest = index_shards(tmp_path, CATEGORIES, processes=1)
    assert [(shard.file, shard.samples) for shard in manifest.shards] == [
        ("part-0000.tar", 2),
        ("part-0001.tar", 2),
        ("part-0002.tar", 1),
    ]
    assert (manifest.images, manifest.instances, manifest.crowd) == (5, 4, 1)
    shards = ShardSet(tmp_path)
    assert shards.index["image_id"].tolist() == [100, 101, 102, 103, 104]
    assert shards.index["flags"].tolist() == [0, 0, 0, 0, FLAG_CROWD]
    for row in range(5):
        found = shards.read(row)
        assert found.image_bytes == JPEG
        assert found.record == record_of(100 + row, iscrowd=row == 4)
    assert list(check_shards(tmp_path)) == []


def test_samples_that_cannot_be_used_are_left_out_with_one_line_each(tmp_path: Path) -> None:
    good = sample("good", record_of(1))
    write_tar(
        tmp_path / "a.tar",
        [
            *good,
            ("alone.jpg", JPEG),
            *sample("id", record_of("1")),
            *sample("id2", record_of(-1)),
            *sample("label", record_of(2, label=2)),
            *sample("box", record_of(3, bbox=[1, 2, 0, 3])),
            *sample("nan", record_of(4, bbox=[1, 2, float("nan"), 3])),
            *sample("list", []),
            *sample("gif", record_of(5), b"GIF89a"),
            *sample("size", {**record_of(6), "width": 9}),
            *sample("mask", record_of(7, segmentation=[[1, 2, 3]])),
            *sample("points", record_of(8, keypoints=[1, 2, 2])),
            ("text.jpg", JPEG),
            ("text.json", b"{"),
            ("two.jpg", JPEG),
            ("two.png", JPEG),
            ("two.json", b"{}"),
            ("same.jpg", JPEG),
            ("same.JPG", JPEG),
        ],
    )
    manifest = index_shards(tmp_path, CATEGORIES)
    assert manifest.images == 1
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["skipped"]) for line in lines] == [
        ("alone", "not one image (jpg, jpeg, png, webp) and one json"),
        ("id", "image_id is '1', expected a whole number"),
        ("id2", "image_id is -1, expected a whole number"),
        ("label", "annotation 1: label 2, there are 2 classes"),
        ("box", "annotation 1: box [1, 2, 0, 3] in (6, 8)"),
        ("nan", "annotation 1: box [1, 2, nan, 3], expected four numbers"),
        ("list", "its JSON is a list, expected an object"),
        ("gif", "the image is not JPEG, PNG or WebP"),
        ("size", "the image is 6 x 8 pixels, its record says (6, 9)"),
        ("mask", "annotation 1: segmentation is neither polygons nor RLE of (6, 8)"),
        ("points", "annotation 1: has keypoints, but its category has none"),
        ("text", lines[11]["skipped"]),
        ("two", "not one image (jpg, jpeg, png, webp) and one json"),
        ("same", "two members end in .jpg"),
    ]
    assert lines[11]["skipped"].startswith("its json cannot be read")
    assert list(check_shards(tmp_path)) == []


def test_what_macos_and_tar_add_is_passed_over(tmp_path: Path) -> None:
    added = ["._1.jpg", "._1.json", "__MACOSX/._1.jpg", "a/__MACOSX/1.jpg", ".DS_Store"]
    added += ["a/.DS_Store", "PaxHeader/1.jpg", "PaxHeaders.77/1.json", "./._1.jpg"]
    members = [*sample("1", record_of(1)), *sample("./a/2", record_of(2))]
    for place, name in enumerate(added):
        members.insert(place % 3, (name, b"Mac OS X"))  # between the two of a sample too
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    manifest = index_shards(tmp_path, CATEGORIES)
    assert (manifest.images, manifest.skipped) == (2, {})
    assert list(check_shards(tmp_path)) == []


@pytest.mark.parametrize("mask", [[], None, [[]]])
def test_a_segmentation_of_nothing_is_no_mask(tmp_path: Path, mask: Any) -> None:
    polygon = [[1, 2, 4, 2, 4, 4]]
    members = sample("1", record_of(1, segmentation=mask))
    members += sample("2", record_of(2, segmentation=polygon))
    write_tar(tmp_path / "a.tar", members)
    assert index_shards(tmp_path, CATEGORIES).skipped == {}
    shards = ShardSet(tmp_path)
    assert shards.index["flags"].tolist() == [0, FLAG_MASKS]
    assert "segmentation" not in shards.record(0)["annotations"][0]
    assert "segmentation" not in shards.read(0).record["annotations"][0]
    assert shards.record(1)["annotations"][0]["segmentation"] == polygon
    assert list(check_shards(tmp_path)) == []
    assert read_ground_truth(shards, True, False).has_mask.tolist() == [False, True]


def test_members_that_are_not_adjacent_are_reported_with_what_to_do(tmp_path: Path) -> None:
    (image, text), whole = sample("x", record_of(1)), sample("y", record_of(2))
    write_tar(tmp_path / "a.tar", [image, *whole, text, ("z.jpg", JPEG)])
    assert index_shards(tmp_path, CATEGORIES).images == 1
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    apart = "its image and its json are not adjacent in the tar: pack it again with tar --sort=name"
    assert [(line["key"], line["skipped"]) for line in lines] == [
        ("x", apart),
        ("x", apart),
        ("z", "not one image (jpg, jpeg, png, webp) and one json"),
    ]


def test_suffixes_come_in_any_case_and_next_to_others(tmp_path: Path) -> None:
    text = json.dumps(record_of(1)).encode()
    members = [
        ("1.JPEG", JPEG),
        ("1.cls", b"3"),
        ("1.JSON", text),
        ("1.seg.png", b""),
        ("1.txt", b""),
    ]
    write_tar(tmp_path / "a.tar", members)
    assert index_shards(tmp_path, CATEGORIES).skipped == {}
    assert ShardSet(tmp_path).read(0).image_bytes == JPEG


def test_links_and_devices_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            key = f"kind{int(kind)}"
            link = tarfile.TarInfo(f"{key}.jpg")
            link.type, link.linkname = kind, "secret.jpg"
            tar.addfile(link)
            for name, data in sample(key, record_of(int(kind)))[1:]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for name, data in sample("good", record_of(9)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = index_shards(tmp_path, CATEGORIES)
    assert manifest.images == 1
    assert manifest.skipped == {"a member is not a file: a link, a device or the like": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:1000], r"cannot be read to its end"),
        (lambda data: data[: 4 * 512], "no end mark"),  # both files whole, nothing behind them
        (lambda data: data[:1024] + b"x" + data[1025:], "a damaged header at or before byte 1024"),
        (lambda data: b"x" + data[1:], "cannot be read to its end"),
        (lambda data: b"", "cannot be read to its end"),
    ],
)
def test_a_damaged_tar_is_an_error_and_nothing_is_written(
    tmp_path: Path, change: Any, message: str
) -> None:
    assert len(JPEG) < 1024
    write_tar(tmp_path / "a.tar", sample("good", record_of(1), JPEG[:400]))
    data = (tmp_path / "a.tar").read_bytes()
    for name in ("b.tar", "c.tar"):
        (tmp_path / name).write_bytes(change(data))
    with pytest.raises(ShardError, match=message) as caught:
        index_shards(tmp_path, CATEGORIES)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        str(tmp_path / "b.tar"),
        str(tmp_path / "c.tar"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.tar", "c.tar"]


def test_what_is_no_set_of_tars_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no file there ends in \.tar"):
        index_shards(tmp_path, CATEGORIES)
    write_tar(tmp_path / "a.tar", [("readme.txt", b"hello")])
    with pytest.raises(ShardError, match=r"not one sample can be used; the first: .*readme"):
        index_shards(tmp_path, CATEGORIES)
    write_tar(tmp_path / "a.tar", sample("x", record_of(7)) + sample("y", record_of(7)))
    with pytest.raises(ShardError, match="1 image ids are used by more than one sample: 7"):
        index_shards(tmp_path, CATEGORIES)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match=r"has manifest\.json already"):
        index_shards(tmp_path, CATEGORIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no list of categories"),
        ("{", "not JSON"),
        ('{"a": 1}', "no list of categories"),
        ('[{"id": "1", "name": "x"}]', "category 0 is .*, expected an object with an integer id"),
        ('[{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]', "id 1 occurs twice"),
        ('[{"id": 1, "name": "x"}, {"id": 2, "name": "x"}]', r"the same name \('x': ids 1, 2\)"),
    ],
)
def test_a_list_of_categories_that_is_none_is_an_error(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "categories.json"
    path.write_text(text)
    with pytest.raises(ShardError, match=message):
        load_categories(path)


def test_categories_come_from_lists_annotation_files_and_manifests(tmp_path: Path) -> None:
    path = tmp_path / "categories.json"
    path.write_text('[{"id": 5, "name": "b "}, {"id": 3, "name": "a", "supercategory": "s"}]')
    assert load_categories(path) == [Category(5, "b "), Category(3, "a", "s")]
    path.write_text('["b", "a"]')
    assert load_categories(path) == [Category(1, "b"), Category(2, "a")]
    path.write_text(
        '{"categories": [{"id": 1, "name": "p", "keypoints": ["x"], "flip_pairs": []}]}'
    )
    assert load_categories(path) == [Category(1, "p", keypoints=["x"], flip_pairs=[])]
    # An annotation file is converted with such ids, so it gives its categories too.
    path.write_text('{"categories": [{"id": 2.0, "name": "b"}, {"id": "7", "name": "a"}]}')
    assert load_categories(path) == [Category(2, "b"), Category(7, "a")]


def test_fields_that_would_be_misread_leave_a_sample_out(tmp_path: Path) -> None:
    records = [
        record_of(1),
        record_of(2, ignore=1),
        record_of(3, ignore=1, iscrowd=1),
        record_of(4, bbox=[0.25, 0.5, 0.5, 0.25]),
        {**record_of(5), "neg_category_ids": [3]},
        {**record_of(6), "negative_labels": [2]},
        {**record_of(7), "source_id": 7},
    ]
    members = [member for n, record in enumerate(records) for member in sample(str(n), record)]
    write_tar(tmp_path / "a.tar", members)
    manifest = index_shards(tmp_path, CATEGORIES)
    assert ShardSet(tmp_path).index["image_id"].tolist() == [1, 3]
    assert not manifest.federated
    assert sorted(manifest.skipped) == [
        "annotation 1 has ignore set, which shards write as iscrowd: 1",
        "has neg_category_ids, which shards have by label, as negative_labels and "
        "not_exhaustive_labels",
        "its boxes are within 0 to 1: relative coordinates, expected pixels",
        "negative_labels is [2], expected labels of 2 classes",
        "source_id is 7, expected a string",
    ]
    assert (manifest.instances_per_class, manifest.crowd_per_class) == ([0, 1], [0, 1])


def test_federated_sets_and_string_ids_are_seen(tmp_path: Path) -> None:
    record = {**record_of(1), "negative_labels": [0], "source_id": "one"}
    write_tar(tmp_path / "a.tar", [*sample("0", record_of(2)), *sample("1", record)])
    manifest = index_shards(tmp_path, CATEGORIES)
    assert manifest.federated
    assert manifest.options == {"image_ids": "strings"}


def test_two_at_a_time_and_a_half_made_conversion_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("1", record_of(1)))
    with (
        open_storage(tmp_path).claim(None),
        pytest.raises(ShardError, match=r"process \d+ on \S+ writes here"),
    ):
        index_shards(tmp_path, CATEGORIES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished/plan.json").write_text("{}")
    with pytest.raises(ShardError, match="holds the beginning of a conversion"):
        index_shards(tmp_path, CATEGORIES)
    assert (tmp_path / ".unfinished/plan.json").read_text() == "{}"


def test_outlines_of_nothing_are_none(tmp_path: Path) -> None:
    nothing: list[dict[str, Any]] = [
        {"segmentation": [[], []]},
        {"segmentation": {}},
        {"segmentation": ""},
        {"keypoints": []},
        {"keypoints": None},
    ]
    members = [m for n, entry in enumerate(nothing) for m in sample(f"{n}", record_of(n, **entry))]
    write_tar(tmp_path / "a.tar", members)
    assert index_shards(tmp_path, CATEGORIES).images == 5
    shards = ShardSet(tmp_path)
    assert shards.index["flags"].tolist() == [0] * 5
    for row in range(5):
        assert not {"segmentation", "keypoints"} & shards.record(row)["annotations"][0].keys()
    assert list(check_shards(tmp_path)) == []


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + json.dumps(record_of(2)).encode(),
        json.dumps(record_of(2)).encode("utf-16"),
        json.dumps(record_of(2) | {"score": float("nan")}).encode(),
    ],
)
def test_json_that_readers_of_shards_refuse_is_left_out(tmp_path: Path, text: bytes) -> None:
    # Indexed, it would be a damaged sample in training.
    write_tar(tmp_path / "a.tar", [*sample("1", record_of(1)), ("2.jpg", JPEG), ("2.json", text)])
    manifest = index_shards(tmp_path, CATEGORIES)
    assert (manifest.images, sum(manifest.skipped.values())) == (1, 1)
    assert next(iter(manifest.skipped)).startswith("its json is not strict JSON in UTF-8")
    assert list(check_shards(tmp_path)) == []


def test_names_with_several_dots_are_reported(tmp_path: Path) -> None:
    members = [*sample("1", record_of(1)), *sample("a_jpg.rf.12", record_of(2))]
    write_tar(tmp_path / "a.tar", members)
    (reason,) = index_shards(tmp_path, CATEGORIES).skipped
    assert reason.endswith(
        "the key of a sample ends at the first dot of a name, and these have more"
    )


def test_keypoints_in_parts_of_the_image_are_reported(tmp_path: Path) -> None:
    categories = [Category(1, "dog", keypoints=["nose"]), Category(2, "cat", keypoints=["nose"])]
    right, relative = {"keypoints": [2, 3, 2]}, {"keypoints": [0.25, 0.5, 2]}
    members = [*sample("1", record_of(1, **right)), *sample("2", record_of(2, **relative))]
    write_tar(tmp_path / "a.tar", members)
    manifest = index_shards(tmp_path, categories)
    reason = "annotation 1: keypoints within 0 to 1: relative, expected pixels"
    assert (manifest.images, manifest.skipped) == (1, {reason: 1})


def test_an_area_of_0_is_that_of_the_box_in_evaluation(tmp_path: Path) -> None:
    square = [[1, 2, 3, 2, 3, 4, 1, 4]]  # 2 x 2 pixels; the boxes have 3 x 2.5
    records = [record_of(1, area=0), record_of(2, area=0, segmentation=square), record_of(3)]
    members = [m for record in records for m in sample(str(record["image_id"]), record)]
    write_tar(tmp_path / "a.tar", members)
    index_shards(tmp_path, CATEGORIES)
    truth = read_ground_truth(ShardSet(tmp_path), False, False)
    assert truth.areas.tolist() == [7.5, 4, 7.5]
