from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest

from bigdet.data.format.manifest import ShardError
from bigdet.data.making.sources import json_lists
from bigdet.data.making.sources.coco_file import load_coco
from bigdet.data.making.sources.json_lists import Entry, read_lists


def entries(path: Path, text: str) -> list[Any]:
    path.write_text(text, encoding="utf-8")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return list(read_lists(path, data, ["images", "other"]))


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 3])
def test_entries_and_their_places_do_not_depend_on_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_lists, "WINDOW", window)
    images = [
        {"id": 1, "name": "\u00e4\u4e2d"},
        12,
        3456.5,
        [],
        'x\\"y',
        {"a": {"b": [1, 2]}},
        None,
    ]
    content = {"info": {"long": "text " * 20}, "images": images, "other": []}
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    found = entries(tmp_path / "a.json", text)
    assert [entry for entry in found if isinstance(entry, str)] == ["info", "images", "other"]
    data = (tmp_path / "a.json").read_bytes()
    places = [entry for entry in found if isinstance(entry, Entry)]
    assert [json.loads(data[e.offset : e.offset + e.size]) for e in places] == images
    assert [entry.value for entry in places[1:]] == images[1:]


@pytest.mark.parametrize("window", [1, 1 << 22])
def test_a_file_cut_anywhere_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(json_lists, "WINDOW", window)
    text = '{"info": {"a": [1, true]}, "images": [{"id": 12, "name": "x"}, -1.5e3], "other": []}'
    assert len(entries(tmp_path / "a.json", text)) == 5
    for size in range(1, len(text)):
        with pytest.raises(ShardError, match=r"a\.json: not JSON \(byte \d+ of \d+: ") as caught:
            entries(tmp_path / "a.json", text[:size])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [1}', "byte 13 of 14: expected , or ]"),
        ('{"images": [1], }', "not JSON"),
        ('{"images": [1,]}', "not JSON"),
        ('{"images": [1]} {', "byte 16 of 17: something follows its end"),
        ("{5: [1]}", "a key is not a string"),
        ('{"images": [1], "images": [2]}', "two lists of images"),
        ('{"images": {}}', "no list of images, but '{}'"),
        ('{"images": [' + "[" * 100_000 + "]", "maximum recursion depth"),
        ('{"images": [' + "1" * 5000 + "]}", "integer string conversion"),
    ],
)
def test_what_is_not_json_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ShardError, match=message.replace("[", r"\[")):
        entries(tmp_path / "a.json", text)


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    assert entries(tmp_path / "a.json", '\ufeff {"images": []}') == ["images"]


def test_text_that_is_not_utf8_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    image = b'{"id": 1, "height": 2, "width": 2, "file_name": "\xff.jpg"}'
    category = b'{"id": 1, "name": "x"}'
    path.write_bytes(b'{"images": [%b], "annotations": [], "categories": [%b]}' % (image, category))
    with pytest.raises(ShardError, match=r"a\.json: not JSON \(byte 12: invalid start byte\)"):
        load_coco(path)
    path.write_bytes(b"")
    with pytest.raises(ShardError, match="the file is empty"):
        load_coco(path)
