"""VOC's text files as tools write them: taken where they can mean one thing only, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdet.data.format.manifest import ShardError
from bigdet.data.making.annotations import box_warning
from bigdet.data.making.shard_tar import SampleLog
from bigdet.data.making.sources.voc_files import decode_text, read_split
from tests.unit.data.test_source_voc import Voc, object_of

BOX = (1, 1, 9, 9)
DECLARED = '<?xml version="1.0" encoding="{}"?>'
REPAIRED = "annotation file with a flaw that was repaired"
DOG = "\u72d7"  # Chinese; GBK has two bytes for it that are no UTF-8


@pytest.fixture
def voc(tmp_path: Path) -> Voc:
    voc = Voc(tmp_path)
    voc.add("a", object_of("dog", BOX))
    return voc


def change(voc: Voc, old: str, new: str, encoding: str = "utf-8") -> None:
    """Replace something in the XML file of image a, and store it in an encoding."""
    path = voc.root / "Annotations/a.xml"
    path.write_bytes(path.read_text().replace(old, new).encode(encoding))


@pytest.mark.parametrize(
    ("name", "head", "encoding", "noted"),
    [
        (DOG, DECLARED.format("GBK"), "gbk", "annotation file in gbk"),
        (DOG, DECLARED.format("gb2312"), "gb2312", "annotation file in gb2312"),
        (DOG, "", "gbk", "annotation file in gbk"),
        (DOG, DECLARED.format("utf-8"), "gbk", "annotation file in gbk"),
        (DOG, DECLARED.format("utf-16"), "utf-16", None),
        (DOG, DECLARED.format("UTF-16"), "utf-8", REPAIRED),
        (DOG, "", "utf-16-le", None),
        (DOG, "", "utf-8-sig", None),
        (DOG, "\n" + DECLARED.format("utf-8"), "utf-8", REPAIRED),
        ("\u00e9 x", DECLARED.format("ISO-8859-1"), "latin-1", None),
        ("\u00e9 x", "", "latin-1", "annotation file in latin-1"),  # GBK has no such pair of bytes
        ("dog & cat", "", "utf-8", REPAIRED),
        ("dog &amp; cat", "", "utf-8", None),
        ("dog &nbsp; &#8217;", DECLARED.format("GBK"), "gbk", REPAIRED),
    ],
)
def test_xml_in_other_encodings_and_with_bare_ampersands_is_read(
    voc, tmp_path, name, head, encoding, noted
):
    change(voc, "<annotation>", head + "<annotation>")
    change(voc, ">dog<", f">{name}<", encoding)
    shards = voc.convert(tmp_path / "out", "a")
    expected = name.replace("&amp;", "&").replace("&#8217;", "\u2019")
    assert [category.name for category in shards.categories] == [expected]
    assert shards.manifest.changed == ({noted: 1} if noted else {})
    assert shards.manifest.instances == 1


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size></size>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>80</width><height>0</height></size>",
        "<size><width/><height>60</height></size>",
        "<size><width>0.0</width><height>0.0</height></size>",
    ],
)
def test_a_size_of_nothing_is_not_recorded_and_read_from_the_image(voc, tmp_path, size):
    change(voc, "<size><width>80</width><height>60</height><depth>3</depth></size>", size)
    record = voc.convert(tmp_path / "out", "a").record(0)
    assert (record["height"], record["width"]) == (60, 80)


@pytest.mark.parametrize(
    ("flag", "is_difficult"),
    [
        ("True", 1), ("true", 1), ("yes", 1), ("1", 1), ("1.0", 1), (" 1 ", 1), ("Y", 1),
        ("False", 0), ("no", 0), ("0", 0), ("0.0", 0), ("", 0), ("Unspecified", 0),
    ],
)  # fmt: skip
def test_difficult_is_read_in_words_too(voc, tmp_path, flag, is_difficult):
    change(voc, "</object>", f"<difficult>{flag}</difficult></object>")
    shards = voc.convert(tmp_path / "out", "a")
    assert shards.record(0)["annotations"][0]["iscrowd"] == is_difficult
    noted = {"difficult object made crowd": 1} if is_difficult else {}
    assert shards.manifest.changed == noted


@pytest.mark.parametrize("size", [("-1", "-1"), ("None", "None"), ("nan", "60"), ("80px", "60")])
def test_a_size_that_is_none_is_read_from_the_image_and_counted(voc, tmp_path, size):
    text = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    change(voc, "<size><width>80</width><height>60</height><depth>3</depth></size>", text)
    shards = voc.convert(tmp_path / "out", "a")
    assert (shards.record(0)["height"], shards.record(0)["width"]) == (60, 80)
    assert shards.manifest.changed == {"size of an image not recorded: taken from its file": 1}


@pytest.mark.parametrize("name", ["ignore", "iscrowd"])
def test_flags_of_other_tools_make_crowd_too(voc, tmp_path, name):
    change(voc, "</object>", f"<{name}>1</{name}></object>")
    shards = voc.convert(tmp_path / "out", "a")
    assert shards.record(0)["annotations"][0]["iscrowd"] == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<annotation>", '<annotation xmlns="http://example.org/voc">'),
        ("<annotation>", "<Annotation>"),
        ("<object>", "<Object>"),
        ("<name>", "<NAME>"),
    ],
)
def test_names_of_elements_may_have_capitals_and_a_namespace(voc, tmp_path, old, new):
    change(voc, old, new)
    if "xmlns" not in new:
        change(voc, old.replace("<", "</"), new.replace("<", "</"))
    shards = voc.convert(tmp_path / "out", "a")
    assert [entry["bbox"] for entry in shards.record(0)["annotations"]] == [[0, 0, 9, 9]]


def test_an_annotation_may_lie_within_another_element(voc, tmp_path):
    change(voc, "<annotation>", "<root><annotation>")
    change(voc, "</annotation>", "</annotation></root>")
    assert len(voc.convert(tmp_path / "out", "a").record(0)["annotations"]) == 1


@pytest.mark.parametrize(
    ("stem", "file"),
    [("A", "a.xml"), ("a", "a.XML"), ("\u00e9", "e\u0301.xml"), ("s/B", "s/b.xml")],
)
def test_xml_files_are_found_by_other_capitals_and_accents(voc, tmp_path, stem, file):
    image, text = voc.root / "JPEGImages/a.jpg", voc.root / "Annotations/a.xml"
    for path, old in (
        (voc.root / "Annotations" / file, text),
        (voc.root / "JPEGImages" / f"{stem}.jpg", image),
    ):
        path.parent.mkdir(exist_ok=True)
        old.rename(path)
    (voc.root / "Annotations/._a.xml").write_bytes(b"macOS")
    shards = voc.convert(tmp_path / "out", stem)
    assert len(shards.record(0)["annotations"]) == 1
    assert shards.manifest.changed == {
        "annotation file found by ignoring case or form of accents": 1
    }


def test_xml_that_is_no_annotation_of_one_image_is_left_out_and_reported(voc, tmp_path):
    # As a picture without objects it would teach that there is nothing on it.
    inner = "<annotation><object/></annotation>"
    for stem, text in (("b", "<svg><g/></svg>"), ("c", f"<all>{inner}{inner}</all>")):
        voc.add(stem)
        (voc.root / f"Annotations/{stem}.xml").write_text(text)
    shards = voc.convert(tmp_path / "out", "a", "b", "c")
    assert shards.manifest.skipped == {"annotation file not readable": 2}
    text = (tmp_path / "out/skipped.jsonl").read_text()
    assert "has none of object, size, filename" in text
    assert "it has 2 annotations" in text


def test_lone_accented_letters_are_not_taken_for_chinese(voc, tmp_path):
    # In GBK, e8 63 of "pi\u00e8ce" would be one character.
    change(voc, ">dog<", ">pi\u00e8ce<", "latin-1")
    shards = voc.convert(tmp_path / "out", "a")
    assert [category.name for category in shards.categories] == ["pi\u00e8ce"]


def test_boxes_that_count_from_0_are_reported_in_words_of_voc(voc, tmp_path):
    change(voc, "<xmin>1<", "<xmin>0<")
    warning = box_warning(voc.convert(tmp_path / "out", "a").manifest)
    assert warning is not None
    assert "1 of 1 boxes reach beyond" in warning
    assert "VOC counts pixels from 1; do these count from 0" in warning


def test_difficult_that_is_neither_is_counted(voc, tmp_path):
    change(voc, "</object>", "<difficult>maybe</difficult></object>")
    shards = voc.convert(tmp_path / "out", "a")
    assert shards.record(0)["annotations"][0]["iscrowd"] == 0
    assert shards.manifest.changed == {"difficult is neither yes nor no: taken as no": 1}


def names_of(voc: Voc, data: bytes, log: SampleLog) -> list[str]:
    (voc.root / "ImageSets/Main/dog_train.txt").write_bytes(data)
    return read_split(voc.root, "dog_train", log)


def test_lines_of_a_list_may_have_flags_suffixes_and_folders(voc):
    for stem in ("2008_000008", "b", "c", "d", "photo 1", "v1.2", "e"):
        voc.add(stem, object_of("dog", BOX))
    lines = [
        "2008_000008 -1",
        "b  1",
        "c.JPG 0",
        "photo 1",
        "v1.2",
        "JPEGImages/d.jpg",
        "/data/VOC/JPEGImages/a.jpg Annotations/a.xml",
        r"C:\voc\Annotations\e.xml",
        "",
    ]
    log = SampleLog()
    found = names_of(voc, "\r\n".join(lines).encode(), log)
    # "photo 1" is the name of an XML file, and so no flag.
    assert found == ["2008_000008", "b", "c", "photo 1", "v1.2", "d", "a", "e"]
    reason = "flag of a class in the list not used: all its images are taken"
    assert [line["changed"] for line in log.lines] == [reason] * 3


def test_what_is_listed_twice_by_other_names_is_reported(voc):
    log = SampleLog()
    assert names_of(voc, b"a\na.jpg\n./a\n../a\nnone 1\n", log) == ["a", "../a", "none 1"]
    assert [line["skipped"] for line in log.lines] == ["listed twice"] * 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_lists_come_in_other_encodings(voc, encoding):
    voc.add(DOG, object_of("dog", BOX))
    log = SampleLog()
    assert names_of(voc, f"{DOG}\r\na\r\n".encode(encoding), log) == [DOG, "a"]
    counted = [] if encoding.startswith("utf-8") else [f"list of the split in {encoding}"]
    assert [line["changed"] for line in log.lines] == counted


def test_text_without_a_mark_is_reported_by_its_bytes():
    assert decode_text("a b".encode("utf-16-be")) == ("a b", "utf-16-be")
    assert decode_text(b"\xff") == ("\xff", "latin-1")
    assert decode_text("\u3042".encode("shift_jis"), "shift_jis") == ("\u3042", "shift_jis")
    assert decode_text(b"a", "no-such-encoding") == ("a", "utf-8")


def test_images_are_found_by_stem_in_any_case_or_by_what_the_xml_calls_them(voc, tmp_path):
    images = voc.root / "JPEGImages"
    (images / "a.jpg").rename(images / "a.Jpeg")
    voc.add("b", object_of("dog", BOX), suffix=".png")
    (images / "b.WEBP").write_bytes((images / "b.png").read_bytes())  # .png comes first
    voc.add("c", object_of("dog", BOX), suffix=".png")
    (images / "c.png").rename(images / "other.jpg")  # as the XML has it
    shards = voc.convert(tmp_path / "out", "a", "b", "c")
    names = [shards.record(row)["file_name"] for row in range(3)]
    assert names == ["a.Jpeg", "b.png", "other.jpg"]


def test_files_that_macos_adds_are_no_annotations(voc, tmp_path):
    (voc.root / "Annotations/._a.xml").write_text(
        "<annotation><object><name>x</name></object></annotation>"
    )
    assert [c.name for c in voc.convert(tmp_path / "out", "a").categories] == ["dog"]


def test_the_reason_is_in_the_error(voc, tmp_path):
    change(voc, "</annotation>", "")
    first = (
        r"1 x annotation file not readable \(the first: file_name a, error no element found: .*\)"
    )
    second = r"1 x annotation file missing \(the first: file_name b\)"
    with pytest.raises(ShardError, match=rf"can be read: {first}; {second}\. Give the folder"):
        voc.convert(tmp_path / "out", "a", "b")
    voc.add("a", object_of("dog", BOX), height=61)
    with pytest.raises(ShardError, match=r"1 x size differs \(.* found \[60, 80\], recorded \[61"):
        voc.convert(tmp_path / "out", "a")


def test_relative_coordinates_are_reported(voc, tmp_path):
    voc.add("a", object_of("dog", (0.1375, 0.1, 0.625, 0.6667)))
    with pytest.raises(ShardError, match="relative coordinates"):
        voc.convert(tmp_path / "out", "a")
