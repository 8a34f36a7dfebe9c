"""Photos whose EXIF turns them: annotations and pixels agree, for bigdet and for plain readers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from bigdet.data.examples.decode import decode_image
from bigdet.data.examples.samples import DamagedSampleError, decode_sample, load_sample, read_sample
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.orientation import (
    SHOWN,
    SHOWN_BY_OPTION,
    STORED,
    STORED_BY_OPTION,
    as_seen,
    as_stored,
    exif_warning,
)
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.conversion import Making
from bigdet.data.making.indexing import index_shards
from bigdet.data.making.reencoding import Reencoding
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.coco import convert_coco, convert_objects365
from bigdet.data.making.sources.voc import convert_voc
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.pictures.files import read_picture
from bigdet.pictures.pixels import turn_pixels
from tests.unit.data.turned import (
    BOX,
    KEYPOINTS,
    annotations_of,
    mask_box,
    red_box,
    shown_pixels,
    turned_file,
    write_coco,
)


def pixels_of(shards: ShardSet, row: int) -> np.ndarray:
    return load_sample(shards, row)[0].permute(1, 2, 0).numpy()


def plain_samples(folder: Path) -> list[tuple[np.ndarray, dict, bytes]]:
    """Read tars as webdataset with Pillow does: pixels as stored, KEY.json as it is, and bytes."""
    with tarfile.open(folder / "000000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    keys = sorted({name.partition(".")[0] for name in files})
    found = []
    for key in keys:
        (image,) = (files[name] for name in files if name.startswith(key) and name[-5:] != ".json")
        pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
        found.append((pixels, json.loads(files[f"{key}.json"]), image))
    return found


def assert_describes(pixels: np.ndarray, record: dict) -> None:
    """Check boxes, both kinds of mask and keypoints of a record against the red rectangle."""
    size = (record["height"], record["width"])
    assert pixels.shape[:2] == size
    box = red_box(pixels)
    polygon, runs, points = record["annotations"]
    for annotation in record["annotations"]:
        assert annotation["bbox"] == box
    assert mask_box(polygon["segmentation"], size) == box
    assert mask_box(runs["segmentation"], size) == box
    x, y, w, h = box
    (x0, y0, _, x1, y1, _, *unlabeled) = points["keypoints"]
    assert sorted([x0, x1]) == [x, x + w - 1]  # centers of the first and the last pixel
    assert sorted([y0, y1]) == [y, y + h - 1]
    assert unlabeled == [0, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_pillow_turns_them(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(
        turn_pixels(pixels, orientation), np.array(ImageOps.exif_transpose(image))
    )


def test_a_record_is_carried_over_to_the_stored_pixels_and_back():
    # Shown 10 wide and 8 high; orientation 6 shows stored pixels turned clockwise, so what is shown
    # at (x, y) is stored at (y, 10 - x), on 8 x 10. A keypoint counts from centers: (y, 9 - x).
    record = {
        "image_id": 1, "file_name": "x", "height": 8, "width": 10,
        "annotations": [{
            "id": 1, "label": 0, "bbox": [1.17, 2.3, 4.05, 3.1], "area": 9.5, "iscrowd": 0,
            "segmentation": [[1, 2, 5.25, 2, 5.25, 5.4]], "keypoints": [1, 2, 2, 0, 0, 0],
        }],
    }  # fmt: skip
    stored = as_stored(record, 6)
    (annotation,) = stored["annotations"]
    assert (stored["height"], stored["width"], stored["seen_orientation"]) == (10, 8, 6)
    assert annotation["bbox"] == [2.3, 4.78, 3.1, 4.05]  # 10 - 1.17 - 4.05
    assert annotation["segmentation"] == [[2, 9, 2, 4.75, 5.4, 4.75]]
    assert annotation["keypoints"] == [2, 8, 2, 0, 0, 0]
    assert annotation["area"] == 9.5
    for orientation in range(1, 9):
        assert as_seen(as_stored(record, orientation)) == record


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_recorded_as_shown_are_seen_as_shown_and_stored_as_they_are(tmp_path, kind):
    files = {f"{n}.{kind.lower()}": turned_file(n, kind, size=(96, 64)) for n in (5, 6, 7, 8, 1)}
    file = write_coco(tmp_path, files, size=(96, 64))
    manifest = convert_coco(tmp_path / "images", file, tmp_path / "out")
    assert manifest is not None
    assert manifest.changed[SHOWN] == 4
    shards = ShardSet(tmp_path / "out")
    truth = read_ground_truth(shards, True, True)
    assert truth.boxes.tolist() == [BOX] * 15
    assert truth.keypoints[2].ravel().tolist() == KEYPOINTS
    for row, data in enumerate(files.values()):
        image, record = load_sample(shards, row)
        pixels = image.permute(1, 2, 0).numpy()
        assert_describes(pixels, record)
        assert record == shards.record(row)
        assert red_box(pixels) == BOX
        name = record["file_name"]
        np.testing.assert_array_equal(pixels, read_picture(tmp_path / "images" / name))
        entry = shards.index[row]
        assert (entry["height"], entry["width"]) == (96, 64)
        if kind != "TIFF":
            assert shards.read(row).image_bytes == data
    for pixels, record, _ in plain_samples(tmp_path / "out"):
        assert_describes(pixels, record)
    assert list(check_shards(tmp_path / "out")) == []


@pytest.mark.parametrize("orientation", [2, 3, 4])
@pytest.mark.parametrize("convert", [convert_coco, convert_objects365])
def test_where_sizes_do_not_tell_images_are_taken_as_shown(tmp_path, orientation, convert):
    file = write_coco(tmp_path, {"a.jpg": turned_file(orientation)}, size=(64, 96))
    manifest = convert(tmp_path / "images", file, tmp_path / "out")
    assert manifest is not None
    assert manifest.changed == {SHOWN_BY_OPTION: 1}
    shards = ShardSet(tmp_path / "out")
    assert red_box(pixels_of(shards, 0)) == BOX == shards.record(0)["annotations"][0]["bbox"]
    ((pixels, record, _),) = plain_samples(tmp_path / "out")
    assert_describes(pixels, record)


def test_the_option_takes_images_as_stored_where_sizes_do_not_tell(tmp_path):
    files = {"a.jpg": turned_file(3), "b.jpg": turned_file(1)}
    file = write_coco(tmp_path, files, size=(64, 96))
    making = Making(exif="stored")
    manifest = convert_coco(tmp_path / "images", file, tmp_path / "out", making=making)
    assert manifest is not None
    assert manifest.changed == {STORED_BY_OPTION: 1}
    assert manifest.options["exif"] == "stored"
    # 96 - 8 - 30 = 58 and 64 - 6 - 18 = 40: there is the red rectangle of the stored pixels.
    assert red_box(pixels_of(ShardSet(tmp_path / "out"), 0)) == [58, 40, 30, 18]
    assert "seen_orientation" not in plain_samples(tmp_path / "out")[0][1]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_images_recorded_as_stored_are_seen_as_stored_whatever_the_option(tmp_path, kind):
    data = turned_file(6, kind, size=(64, 96))  # stored 96 high and 64 wide
    file = write_coco(tmp_path, {"a": data, "square": turned_file(6, size=(96, 96))}, size=(96, 64))
    content = json.loads(file.read_text())
    content["images"][1]["width"] = 96
    file.write_text(json.dumps(content))
    manifest = convert_coco(tmp_path / "images", file, tmp_path / "out")
    assert manifest is not None
    assert (manifest.changed[STORED], manifest.changed[SHOWN_BY_OPTION]) == (1, 1)
    # Turned counterclockwise (x, y) is at (y, 96 - x): y 96 - 8 - 30 = 58.
    assert red_box(pixels_of(ShardSet(tmp_path / "out"), 0)) == [6, 58, 18, 30]
    warning = exif_warning(manifest.changed)
    assert warning is not None
    assert "convert with --exif stored" in warning
    assert exif_warning({SHOWN: 3, SHOWN_BY_OPTION: 2}) is None


def test_a_size_that_fits_neither_names_exif_and_all_three_sizes(tmp_path):
    file = write_coco(tmp_path, {"a.jpg": turned_file(6, size=(64, 96))}, size=(64, 97))
    with pytest.raises(ShardError, match=r"1 x size differs, as stored and as its EXIF") as caught:
        convert_coco(tmp_path / "images", file, tmp_path / "out")
    assert "found [96, 64], recorded [64, 97], shown [64, 96]" in str(caught.value)


def test_images_made_smaller_are_stored_as_they_are_seen(tmp_path):
    file = write_coco(tmp_path, {"a.jpg": turned_file(8, size=(96, 64))}, size=(96, 64))
    making = Making(reencoding=Reencoding(48))
    convert_coco(tmp_path / "images", file, tmp_path / "out", making=making)
    ((pixels, record, data),) = plain_samples(tmp_path / "out")
    assert pixels.shape == (48, 32, 3)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None
    assert "seen_orientation" not in record
    assert record["annotations"][0]["bbox"] == [4, 3, 15, 9] == red_box(pixels)
    convert_coco(
        tmp_path / "images", file, tmp_path / "same", making=Making(reencoding=Reencoding(96))
    )
    assert plain_samples(tmp_path / "same")[0][1]["seen_orientation"] == 8  # it kept its bytes


@pytest.mark.parametrize("recorded", [(96, 64), None])
def test_voc_is_seen_as_shown(tmp_path, recorded):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "JPEGImages/a.jpg").write_bytes(turned_file(6, size=(96, 64)))
    size = recorded and f"<size><width>{recorded[1]}</width><height>{recorded[0]}</height></size>"
    box = "<xmin>9</xmin><ymin>7</ymin><xmax>38</xmax><ymax>24</ymax>"  # from 1, both inclusive
    (tmp_path / "Annotations/a.xml").write_text(
        f"<annotation>{size or ''}<object><name>part</name><bndbox>{box}</bndbox></object>"
        "</annotation>"
    )
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    manifest = convert_voc(tmp_path, "train", tmp_path / "out")
    assert manifest is not None
    assert manifest.changed == {SHOWN if recorded else SHOWN_BY_OPTION: 1}
    shards = ShardSet(tmp_path / "out")
    assert shards.record(0)["annotations"][0]["bbox"] == BOX == red_box(pixels_of(shards, 0))


def foreign_tar(folder: Path, files: list[bytes], size: tuple[int, int]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, data in enumerate(files):
            polygon, *_ = annotations_of(number, size)
            del polygon["category_id"], polygon["image_id"]
            record = {"image_id": number, "file_name": "x", "height": size[0], "width": size[1]}
            record["annotations"] = [{**polygon, "label": 0}]
            for suffix, content in (("jpg", data), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_foreign_tars_are_seen_as_their_records_have_them(tmp_path):
    foreign_tar(tmp_path / "a", [turned_file(n, size=(96, 64)) for n in (1, 6, 8)], (96, 64))
    foreign_tar(tmp_path / "b", [turned_file(3), turned_file(1)], (64, 96))
    for name, changed in (("a", {SHOWN: 2}), ("b", {SHOWN_BY_OPTION: 1})):
        manifest = index_shards(tmp_path / name, [Category(1, "part")])
        assert manifest.changed == changed
        shards = ShardSet(tmp_path / name)
        for row in range(len(shards)):
            assert red_box(pixels_of(shards, row)) == BOX
            assert shards.record(row)["annotations"][0]["bbox"] == BOX
            assert shards.read(row).record == shards.record(row)
        assert list(check_shards(tmp_path / name)) == []
    foreign_tar(tmp_path / "c", [turned_file(3)], (64, 96))
    manifest = index_shards(tmp_path / "c", [Category(1, "part")], exif="stored")
    assert manifest.changed == {STORED_BY_OPTION: 1}
    assert red_box(pixels_of(ShardSet(tmp_path / "c"), 0)) == [58, 40, 30, 18]


def test_a_set_of_turned_images_can_be_indexed_anew(tmp_path):
    file = write_coco(tmp_path, {"a.jpg": turned_file(6, size=(96, 64))}, size=(96, 64))
    convert_coco(tmp_path / "images", file, tmp_path / "out")
    before = (tmp_path / "out/index.npy").read_bytes()
    for name in ("index.npy", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    keypoints = ["left", "right", "top"]
    manifest = index_shards(tmp_path / "out", [Category(1, "part", keypoints=keypoints)])
    assert manifest.changed == {}
    assert (tmp_path / "out/index.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("size", "expected"),
    [((800, 480), (100, 60)), ((800, 476), (200, 119)), ((800, 477), (800, 477))],
)
def test_a_turned_jpeg_is_decoded_smaller_where_it_divides_without_remainder(size, expected):
    # Stored 480 (476, 477) high and 800 wide, shown 800 high; 1/8 would do for all three.
    data = turned_file(6, size=size)
    image = decode_image(data, (90, 50), orientation=6)
    assert image.shape == (3, *expected)
    assert image.stride()[0] == 1  # channels_last
    scale = size[0] // expected[0]
    found = red_box(image.permute(1, 2, 0).numpy())
    assert [abs(a - b / scale) <= 1 for a, b in zip(found, BOX, strict=True)] == [True] * 4


def test_training_decodes_turned_images_smaller_and_checks_their_size(tmp_path):
    file = write_coco(tmp_path, {"a.jpg": turned_file(6, size=(800, 480))}, size=(800, 480))
    convert_coco(tmp_path / "images", file, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    sample = read_sample(shards, 0)
    assert decode_sample(shards, 0, sample, (90, 50)).shape == (3, 100, 60)
    sample.record["width"] = 479
    for least_size in ((90, 50), None):
        with pytest.raises(DamagedSampleError, match=r"is \(800, 480\), height and width"):
            decode_sample(shards, 0, sample, least_size)


def test_damaged_exif_does_not_keep_an_image_out(tmp_path):
    image = Image.fromarray(shown_pixels(64, 96))
    file = io.BytesIO()
    image.save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x01")
    file = write_coco(tmp_path, {"a.jpg": file.getvalue()}, size=(64, 96))
    manifest = convert_coco(tmp_path / "images", file, tmp_path / "out")
    assert manifest is not None
    assert (manifest.images, manifest.changed) == (1, {})
    assert read_picture(tmp_path / "images/a.jpg").shape == (64, 96, 3)
