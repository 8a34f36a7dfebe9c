from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.conversion import Making
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.voc import convert_voc

HEIGHT, WIDTH = 60, 80
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin></bndbox></part>"


def object_of(name: str, box: tuple[Any, ...], more: str = "") -> str:
    edges = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
    parts, rest = PART * more.count("P"), more.replace("P", "")
    return f"<object><name>{name}</name>{parts}<bndbox>{inner}</bndbox>{rest}</object>"


class Voc:
    """A small data set in VOC's layout under a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root / "voc"
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (self.root / name).mkdir(parents=True)

    def add(self, stem: str, *objects: str, suffix: str = ".jpg", height: int = HEIGHT) -> None:
        file = io.BytesIO()
        Image.new("RGB", (WIDTH, HEIGHT)).save(file, "PNG" if suffix == ".png" else "JPEG")
        (self.root / "JPEGImages" / (stem + suffix)).write_bytes(file.getvalue())
        size = f"<size><width>{WIDTH}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>other.jpg</filename>{size}{''.join(objects)}</annotation>"
        (self.root / "Annotations" / f"{stem}.xml").write_text(text)

    def convert(self, out: Path, *stems: str, **options: Any) -> ShardSet:
        (self.root / "ImageSets/Main/train.txt").write_text("\n".join(stems) + "\n")
        convert_voc(self.root, "train", out, **options)
        return ShardSet(out)


@pytest.fixture
def voc(tmp_path: Path) -> Voc:
    return Voc(tmp_path)


def test_pixels_count_from_1_and_edges_are_inclusive(voc: Voc, tmp_path: Path) -> None:
    dog = object_of("dog", (1, 1, 80, 60))  # the whole image
    cat = object_of(" cat\n", (10.5, 20, 30.25, 40), "<difficult>1</difficult>")
    person = object_of("person", (5, 6, 7, 8), "PP<difficult>0</difficult>")
    voc.add("b", dog, cat)
    voc.add("a", person, suffix=".png")
    shards = voc.convert(tmp_path / "out", "b", "a")
    assert [(c.id, c.name) for c in shards.categories] == [(1, "cat"), (2, "dog"), (3, "person")]
    assert shards.record(0) == {
        "image_id": 1,
        "file_name": "b.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {"id": 1, "label": 1, "bbox": [0, 0, 80, 60], "area": 4800, "iscrowd": 0},
            # from 9.5 to 30.25 and from 19 to 40
            {"id": 2, "label": 0, "bbox": [9.5, 19, 20.75, 21], "area": 435.75, "iscrowd": 1},
        ],
    }
    second = shards.record(1)
    assert (second["image_id"], second["file_name"]) == (2, "a.png")
    assert [(a["id"], a["bbox"]) for a in second["annotations"]] == [(3, [4, 5, 3, 3])]
    assert shards.manifest.changed == {
        "difficult object made crowd": 1,
        "part of an object left out": 2,
    }
    assert (shards.manifest.instances, shards.manifest.crowd) == (2, 1)


def test_what_cannot_be_used_is_left_out_and_ids_are_rows(voc: Voc, tmp_path: Path) -> None:
    box = (1, 1, 9, 9)
    voc.add("good", object_of("dog", box))
    voc.add("size", object_of("dog", box), height=HEIGHT + 1)
    voc.add("xml", object_of("dog", box))
    (voc.root / "Annotations/xml.xml").write_text("<annotation><object>")
    voc.add("gone", object_of("dog", box))
    (voc.root / "JPEGImages/gone.jpg").unlink()
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        bomb += f'<!ENTITY {name} "{f"&{before};" * 10}">'
    (voc.root / "Annotations/bomb.xml").write_text(f"{bomb}]><annotation>&j;</annotation>")
    voc.add("a name", object_of("dog", (1, 1, "x", 9)), object_of("dog", (5, 5, 5, 9)))
    flawed = [
        object_of("", box),
        object_of("dog", ("nan", 1, 5, 9)),
        object_of("dog", (60, 9, 99, 20)),
    ]
    voc.add("last", *flawed)
    stems = ["size", "xml", "good", "gone", "bomb", "none", "../voc/Annotations/good", "a name"]
    shards = voc.convert(tmp_path / "out", *stems, "last", "good")
    assert shards.index["image_id"].tolist() == [1, 2, 3]
    names = [shards.record(row)["file_name"] for row in range(3)]
    assert names == ["good.jpg", "a name.jpg", "last.jpg"]
    assert shards.manifest.skipped == {
        "annotation file missing": 1,
        "annotation file not readable": 2,
        "file missing": 1,
        "file name leads out of the image folder": 1,
        "listed twice": 1,
        "size differs": 1,
    }
    assert shards.manifest.changed == {
        "annotation dropped: box has no area in the image": 1,
        "annotation dropped: box is not four finite numbers": 2,
        "annotation dropped: the object has no name": 1,
        "box clipped to the image": 1,
    }
    assert list(check_shards(tmp_path / "out")) == []


def test_given_categories_fix_the_labels_and_must_have_all_names(voc: Voc, tmp_path: Path) -> None:
    voc.add("a", object_of("dog", (1, 1, 9, 9)))
    given = [Category(7, "person"), Category(3, "dog")]
    shards = voc.convert(tmp_path / "out", "a", categories=given)
    assert shards.record(0)["annotations"][0]["label"] == 1
    with pytest.raises(ShardError, match="1 categories that are not in the list: dog"):
        voc.convert(tmp_path / "other", "a", categories=given[:1])


def test_labels_are_the_same_in_all_splits(voc: Voc, tmp_path: Path) -> None:
    voc.add("a", object_of("dog", (1, 1, 9, 9)))
    voc.add("b", object_of("cat", (1, 1, 9, 9)))
    first = voc.convert(tmp_path / "first", "a")
    second = voc.convert(tmp_path / "second", "b")
    assert first.categories == second.categories


def test_a_split_or_layout_that_is_not_there_is_an_error(voc: Voc, tmp_path: Path) -> None:
    voc.add("a", object_of("dog", (1, 1, 9, 9)))
    voc.convert(tmp_path / "out", "a")
    with pytest.raises(ShardError, match=r"test\.txt: cannot be read .* one of its splits: train"):
        convert_voc(voc.root, "test", tmp_path / "b")
    with pytest.raises(ShardError, match="none of the images of split train has a file"):
        voc.convert(tmp_path / "c", "nothing")
    (voc.root / "JPEGImages/a.jpg").write_bytes(b"")
    with pytest.raises(ShardError, match=r"not one image could be used: .*file empty"):
        voc.convert(tmp_path / "d", "a")


def test_real_voc_sets_keep_every_box_that_has_an_area(coco_dir: Path, tmp_path: Path) -> None:
    """4888 boxes are annotated; two of them, one in train and one in val, have no area."""
    root = coco_dir.parent / "bccd_voc"
    counts: Counter[str] = Counter()
    for split, num_images in (("train", 205), ("val", 87), ("test", 72)):
        manifest = convert_voc(root, split, tmp_path / split, making=Making(2))
        assert manifest is not None
        assert (manifest.images, manifest.skipped) == (num_images, {})
        assert [category.name for category in manifest.categories] == ["Platelets", "RBC", "WBC"]
        assert list(check_shards(tmp_path / split)) == []
        if split != "test":
            log = json.loads((tmp_path / split / "skipped.jsonl").read_text())
            assert log["file_name"] == f"BloodImage_00{343 if split == 'train' else 338}"
        shards = ShardSet(tmp_path / split)
        for row in range(len(shards)):
            counts.update(entry["label"] for entry in shards.record(row)["annotations"])
    assert counts.total() == 4886
    convert_voc(coco_dir.parent / "voc2007_one", "val", tmp_path / "one")
    boxes = [entry["bbox"] for entry in ShardSet(tmp_path / "one").record(0)["annotations"]]
    assert boxes == [[47, 239, 148, 132], [7, 11, 345, 487]]  # 48..195, 240..371; 8..352, 12..498
