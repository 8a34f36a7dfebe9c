"""Image files by the names that annotation tools write."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from bigdet.data.format.manifest import ShardError
from bigdet.data.making.sources import file_names
from bigdet.data.making.sources.file_names import (
    ACCENTS,
    ADDRESS,
    BACKSLASHES,
    BLANKS,
    CASE,
    DOTS,
    FRONT,
    OTHER_SUFFIX,
    PERCENT,
    SUFFIX,
    find_files,
)
from tests.unit.data.coco_trial import Trial, box_of, image_of

FILE = "upload 1/3f0c-Stra\u00dfe \u00e9.png"


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (FILE, None),
        (f"./{FILE}", None),
        (FILE.replace("/", "\\"), BACKSLASHES),
        (f"images\\{FILE}".replace("/", "\\"), f"{BACKSLASHES} and {FRONT}"),
        (f"..\\..\\studio\\media\\{FILE}".replace("/", "\\"), f"{BACKSLASHES} and {FRONT}"),
        (f"D:\\data\\images\\{FILE}".replace("/", "\\"), f"{BACKSLASHES} and {FRONT}"),
        (quote(FILE), PERCENT),
        (f"/{FILE}", FRONT),
        (f"images/{FILE}", FRONT),
        (f"../images/{FILE}", FRONT),
        (f"/home/somebody/data/images/{FILE}", FRONT),
        (f"upload 1/../{FILE}", DOTS),
        (f"file:///C:/data/{quote(FILE)}", f"{ADDRESS} and {PERCENT} and {FRONT}"),
        (f"https://host/b/{quote(FILE)}?key=a/b#c", f"{ADDRESS} and {PERCENT} and {FRONT}"),
        (f"s3://bucket/{FILE}", f"{ADDRESS} and {FRONT}"),
        (f"/data/local-files/?d=images/{FILE}", f"{ADDRESS} and {FRONT}"),
        (FILE.replace(".png", ".PNG"), CASE),
        (FILE.upper(), CASE),
        (unicodedata.normalize("NFD", FILE), ACCENTS),
        (f"C:\\{FILE}".replace("/", "\\").upper(), f"{BACKSLASHES} and {FRONT} and {CASE}"),
        (FILE.removesuffix(".png"), SUFFIX),
        (quote(f"images/{FILE.removesuffix('.png')}"), f"{PERCENT} and {FRONT} and {SUFFIX}"),
    ],
)
def test_a_file_is_found_by_each_way_of_writing_its_name(tmp_path: Path, name: str, way: str):
    make_files(tmp_path, FILE, "upload 1/other.png", "other.png")
    found = find_files(tmp_path, ["other.png", name])
    assert found.ways == ({} if way is None else {1: way})
    assert (tmp_path / str(found.paths[1])).samefile(tmp_path / FILE)
    assert found.file_bytes.tolist() == [5, 5]


@pytest.mark.parametrize(
    "names",
    [
        ["A.png"],  # a.PNG or a.png
        ["b"],  # b.jpg or b.png
        ["x/c.png", "y/c.png"],  # both would be c.png
        ["c.png", "/data/c.png"],  # the file of another name
        ["d.jpg"],  # a file, but of another kind
        ["../outside.png", "/etc/passwd", "\\..\\outside.png"],
        ["", ".", "..", "/", "\\", "x" * 300, "half \ud800.jpg", "%2e%2e/outside.png", "a\0.png"],
        ["folder.png"],
    ],
)
def test_what_is_not_sure_or_lies_outside_is_not_taken(tmp_path: Path, names: list[str]):
    folder = tmp_path / "images"
    make_files(folder, "a.PNG", "a.png", "b.jpg", "b.png", "c.png", "d.jpg.txt", "folder.png/x")
    make_files(tmp_path, "outside.png")
    found = find_files(folder, names)
    assert found.ways == {}
    assert found.file_bytes.tolist() == [5 if name == "c.png" else 0 for name in names]


def test_what_leaves_out_least_of_a_name_is_taken(tmp_path: Path):
    make_files(tmp_path, "x.png", "b/x.png", "b c/x.png")
    found = find_files(tmp_path, ["/a/b/x.png", "b%20c/x.png", "/x.png"])
    assert found.paths == ["b/x.png", "b c/x.png", "x.png"]


def test_the_folder_is_listed_once_and_only_for_names_that_need_it(tmp_path: Path, monkeypatch):
    make_files(tmp_path, "a.png", "b.png", "c.png")
    listed = []
    walk = os.walk

    def counted(folder):
        listed.append(folder)
        return walk(folder)

    monkeypatch.setattr(file_names.os, "walk", counted)
    find_files(tmp_path, ["a.png", "/b.png"])
    assert listed == []
    assert find_files(tmp_path, ["A.PNG", "B.png", "c"]).paths == ["a.png", "b.png", "c.png"]
    assert len(listed) == 1


def test_names_that_are_changed_are_counted_listed_and_kept_in_the_record(tmp_path: Path):
    trial = Trial(tmp_path)
    trial.picture("a 1.jpg")
    trial.picture("b.jpg")
    names = {1: "a%201.jpg", 2: "C:\\data\\b.jpg"}
    shards = trial.convert(
        [image_of(number, file_name=name) for number, name in names.items()],
        [box_of(1), box_of(2, 2)],
    )
    assert shards.manifest.changed == {
        f"file found by {PERCENT}": 1,
        f"file found by {BACKSLASHES} and {FRONT}": 1,
    }
    assert trial.log()[1] == {
        "changed": f"file found by {BACKSLASHES} and {FRONT}",
        "image_id": 2,
        "file_name": names[2],
        "found": "b.jpg",
    }
    assert [shards.record(row)["file_name"] for row in range(2)] == list(names.values())


def test_a_folder_with_none_of_the_files_is_refused_with_what_it_holds(tmp_path: Path):
    trial = Trial(tmp_path)
    trial.picture("a.jpg")
    with pytest.raises(ShardError, match=r"none of the 1 images.*first is b.jpg.*holds a.jpg"):
        trial.convert([image_of(1, file_name="b.jpg")], [])
    (trial.images / "train").mkdir()
    trial.picture("train/b.jpg")
    with pytest.raises(ShardError, match=f"{trial.images}/train has b.jpg. Give the folder that"):
        trial.convert([image_of(1, file_name="x\\b.jpg")], [])


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.png", OTHER_SUFFIX),
        ("x/A.BMP", f"{FRONT} and {CASE} and {OTHER_SUFFIX}"),
        ("a.jpg ", BLANKS),
        (" a.jpg\n", BLANKS),
    ],
)
def test_other_suffixes_and_blanks_are_looked_through(tmp_path: Path, name: str, way: str) -> None:
    make_files(tmp_path, "a.jpg", "b.jpg", "b.tif", "c.txt")
    found = find_files(tmp_path, [name, "b.png", "c.png"])  # of b there are two, c is no picture
    assert found.paths == ["a.jpg", "b.png", "c.png"]
    assert found.ways == {0: way}


def test_a_file_that_is_named_itself_is_none_of_another_suffix(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    assert find_files(tmp_path, ["a.jpg", "a.png"]).ways == {}
