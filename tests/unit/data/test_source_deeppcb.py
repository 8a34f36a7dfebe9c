"""DeepPCB's lists and text files to shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bigdet.cli import make_shards
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.conversion import Making
from bigdet.data.making.sources.deeppcb import convert_deeppcb
from bigdet.pictures.pixels import EXIF_ORIENTATION, Exif


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two photographs of a group as the repository has them; the second has no defect."""
    root = tmp_path / "PCBData"
    images, texts = root / "group1/1", root / "group1/1_not"
    images.mkdir(parents=True)
    texts.mkdir()
    for name in ("10001_test", "10001_temp", "10002_test"):
        Image.new("L", (64, 48), 90).save(images / f"{name}.jpg")
    (texts / "10001.txt").write_text("4 6 20 16 3\n30 0 70 48 6\n")
    (texts / "10002.txt").write_text("")
    lines = [f"group1/1/{n}.jpg group1/1_not/{n}.txt" for n in (10001, 10002)]
    (root / "trainval.txt").write_text("\n".join(lines) + "\n")
    return root


def test_boxes_are_corners_and_types_count_from_one(root: Path, tmp_path: Path) -> None:
    manifest = convert_deeppcb(root, "trainval", tmp_path / "out")
    assert manifest is not None
    assert (manifest.images, manifest.instances) == (2, 2)
    assert manifest.options == {"root": str(root), "split": "trainval", "shard_megabytes": 256}
    shards = ShardSet(tmp_path / "out")
    names = [category.name for category in shards.categories]
    assert names == ["open", "short", "mousebite", "spur", "copper", "pin-hole"]
    first, second = shards.record(0), shards.record(1)
    assert (first["file_name"], first["height"], first["width"]) == (
        "group1/1/10001_test.jpg",
        48,
        64,
    )
    # 20 - 4 and 16 - 6; the second reaches 6 pixels beyond the right edge and is cut at 64.
    found = [(entry["label"], entry["bbox"]) for entry in first["annotations"]]
    assert found == [(2, [4, 6, 16, 10]), (5, [30, 0, 34, 48])]
    assert second["annotations"] == []


@pytest.mark.parametrize(("exif", "size"), [("shown", (64, 48)), ("stored", (48, 64))])
def test_an_image_that_exif_turns_is_seen_as_the_option_says(
    root: Path, tmp_path: Path, exif: Exif, size: tuple[int, int]
) -> None:
    tags = Image.Exif()
    tags[EXIF_ORIENTATION] = 6  # shown turned by 90 degrees: 48 wide and 64 high
    Image.new("L", (64, 48), 90).save(root / "group1/1/10001_test.jpg", exif=tags)
    (root / "trainval.txt").write_text("group1/1/10001.jpg group1/1_not/10001.txt", "utf-8-sig")
    (root / "group1/1_not/10001.txt").write_text("4 30 20 46 3\n")
    convert_deeppcb(root, "trainval", tmp_path / "out", making=Making(exif=exif))
    record = ShardSet(tmp_path / "out").record(0)
    assert (record["height"], record["width"]) == size
    assert [entry["bbox"] for entry in record["annotations"]] == [[4, 30, 16, 16]]


def test_what_is_not_so_is_named(root: Path, tmp_path: Path) -> None:
    text = root / "group1/1_not/10001.txt"
    for line in ("4 6 20 16", "4 6 20 16 7", "4 6 20 16 0", "4 6 x 16 1", "4.5 6 20 16 1"):
        text.write_text(f"1 1 9 9 1\n{line}\n")
        with pytest.raises(
            ShardError, match=rf"10001\.txt: line 2: found '{line}', expected x1 y1"
        ):
            convert_deeppcb(root, "trainval", tmp_path / "out")
    with pytest.raises(ShardError, match=r"train\.txt: cannot be read .*\(found: trainval\)"):
        convert_deeppcb(root, "train", tmp_path / "out")
    (root / "trainval.txt").write_text("only_one.jpg\n")
    with pytest.raises(ShardError, match=r"trainval\.txt: line 1: found 'only_one\.jpg'"):
        convert_deeppcb(root, "trainval", tmp_path / "out")
    (root / "trainval.txt").write_text("group1/1/7.jpg group1/1_not/10002.txt\n")
    with pytest.raises(ShardError, match=r"7\.jpg: cannot be read as an image .* line 1 names it"):
        convert_deeppcb(root, "trainval", tmp_path / "out")


def test_the_command_makes_the_set(root: Path, tmp_path: Path) -> None:
    words = ["--root", str(root), "--split", "trainval", "--out", str(tmp_path / "out")]
    assert make_shards.main(["deeppcb", *words]) == 0
    assert ShardSet(tmp_path / "out").manifest.instances == 2


@pytest.mark.parametrize(
    "words",
    [
        ["coco", "--images", "nowhere", "--annotations", "nowhere.json"],
        ["objects365", "--images", "nowhere", "--annotations", "nowhere.json"],
        ["voc", "--root", "nowhere", "--split", "trainval"],
        ["deeppcb", "--root", "nowhere", "--split", "trainval"],
        ["merge"],
    ],
)
def test_every_source_says_what_is_not_there(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere|out"):
        make_shards.main([*words, "--out", str(tmp_path / "out")])
