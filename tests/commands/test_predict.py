import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bigdet.predict import check_output, find_images, load_image, picture_names
from tests.commands.tiny_detector import ROOT, save_detector

CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}]
EXIF_ORIENTATION = 0x0112


def test_picture_is_turned_as_exif_says(tmp_path):
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :40] = 250  # the left half is white as stored
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[EXIF_ORIENTATION] = 6  # shown turned clockwise by 90 degrees: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    shown = load_image(tmp_path / "turned.png")
    assert shown.shape == (80, 40, 3)
    assert (shown[:40] == 250).all()
    assert (shown[40:] == 0).all()


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png")])
def test_other_color_modes_become_rgb(tmp_path, mode, suffix):
    color = Image.new("RGB", (96, 64), (200, 200, 200)).convert(mode)
    color.save(tmp_path / f"x.{suffix}")
    shown = load_image(tmp_path / f"x.{suffix}")
    assert (shown.shape, shown.dtype) == ((64, 96, 3), np.uint8)
    assert np.abs(shown.astype(int) - 200).max() <= 3


def test_palette_with_transparency_becomes_rgb(tmp_path):
    image = Image.new("RGB", (20, 10), (10, 200, 30)).quantize(4)
    image.save(tmp_path / "x.png", transparency=b"\x80\xff")
    assert load_image(tmp_path / "x.png")[0, 0].tolist() == [10, 200, 30]


def test_16_bits_of_gray_become_8(tmp_path):
    gray = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png")[0].tolist() == [[v] * 3 for v in (0, 1, 255, 128)]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0cut"])
def test_broken_picture_is_a_value_error(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable image"):
        load_image(tmp_path / "x.jpg")


def test_folders_give_their_pictures_sorted_and_each_file_is_done_once(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path / "b.JPG", tmp_path])
    assert [path.name for path in found] == ["b.JPG", "a.png"]


def test_absent_file_and_folder_without_pictures_are_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no picture"):
        find_images([tmp_path])


def test_output_must_not_be_the_folder_of_the_pictures(tmp_path):
    with pytest.raises(ValueError, match="could be written over"):
        check_output(tmp_path, [tmp_path / "a.jpg"])
    check_output(tmp_path / "out", [tmp_path / "a.jpg"])


def test_pictures_of_equal_name_get_numbers(tmp_path):
    paths = [tmp_path / "a" / "1.jpg", tmp_path / "b" / "1.png", tmp_path / "2.jpg"]
    assert list(picture_names(paths)) == ["1.jpg", "1-2.jpg", "2.jpg"]


def test_command_draws_what_it_can_read_and_counts_what_it_cannot(tmp_path):
    model, pictures = save_detector(tmp_path / "run", CATEGORIES), tmp_path / "in"
    pictures.mkdir()
    Image.new("RGB", (96, 64), (90, 150, 90)).save(pictures / "a.jpg")
    (pictures / "b.jpg").write_bytes(b"broken")
    Image.new("L", (50, 120), 99).save(pictures / "c.png")
    words = ["-m", "bigdet.predict", model, pictures, "--out", tmp_path / "out", "--score", "0.2"]
    ended = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"{pictures / 'b.jpg'}: not a readable image" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: 1 of 3 images could not be read")
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(r["image_id"], r["file_name"]) for r in results} == {
        (1, str(pictures / "a.jpg")),
        (3, str(pictures / "c.png")),
    }
    assert {r["category_id"] for r in results} <= {17, 3}
    assert results[0]["segmentation"]["size"] == [64, 96]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.jpg",
        "c.jpg",
        "detections.json",
    ]
    with Image.open(tmp_path / "out" / "c.jpg") as drawn:
        assert drawn.size == (333, 800)  # 50x120, enlarged
