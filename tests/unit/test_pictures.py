import errno
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bigdet.pictures.files import list_pixels, read_picture, shown_size, to_pixels
from bigdet.pictures.pixels import EXIF_ORIENTATION

WHITE_LEFT = np.zeros((40, 80, 3), dtype=np.uint8)
WHITE_LEFT[:, :40] = 250


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_picture_is_turned_as_exif_says(tmp_path, suffix):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned clockwise by 90 degrees: left becomes top
    Image.fromarray(WHITE_LEFT).save(path, exif=exif)
    shown = read_picture(path)
    assert shown.shape == (80, 40, 3)
    assert shown_size(path) == (80, 40)
    assert (shown[:36] > 240).all()
    assert (shown[44:] < 10).all()
    stored = read_picture(path, "stored")
    assert stored.shape == (40, 80, 3)
    assert shown_size(path, "stored") == (40, 80)
    assert (stored[:, :36] > 240).all()
    assert (stored[:, 44:] < 10).all()


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png")])
def test_other_color_modes_become_rgb(tmp_path, mode, suffix):
    color = Image.new("RGB", (96, 64), (200, 200, 200)).convert(mode)
    color.save(tmp_path / f"x.{suffix}")
    shown = read_picture(tmp_path / f"x.{suffix}")
    assert (shown.shape, shown.dtype) == ((64, 96, 3), np.uint8)
    assert np.abs(shown.astype(int) - 200).max() <= 3


def test_palette_with_transparency_becomes_rgb(tmp_path):
    image = Image.new("RGB", (20, 10), (10, 200, 30)).quantize(4)
    image.save(tmp_path / "x.png", transparency=b"\x80\xff")
    assert read_picture(tmp_path / "x.png")[0, 0].tolist() == [10, 200, 30]


def test_16_bits_of_gray_become_8(tmp_path):
    gray = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png")[0].tolist() == [[v] * 3 for v in (0, 1, 255, 128)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_picture(tmp_path, suffix):
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"x.{suffix}"
    first.save(path, save_all=True, append_images=[second], **options)
    assert read_picture(path)[5, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0cut"])
def test_broken_picture_is_a_value_error(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    for read in (read_picture, shown_size):
        with pytest.raises(ValueError, match="not a readable image"):
            read(tmp_path / "x.jpg")


def test_truncated_picture_is_a_value_error_on_reading(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("x.jpg", "x.png"):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="not a readable image"):
            read_picture(path)


def noise_jpeg(path, **options):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90, **options)
    return bytearray(path.read_bytes())


def test_jpeg_whose_middle_is_lost_is_reported_though_pillow_makes_gray_of_it(tmp_path):
    path = tmp_path / "x.jpg"
    data = noise_jpeg(path)
    middle = len(data) // 2
    for damage, problem in (
        (bytes(len(data) - middle - 2), "a part of the compressed data is zeros"),
        (b"\xff\xd3" * 8, "Corrupt JPEG data"),  # a mark that has no business there
    ):
        damaged = data[:middle] + damage + data[middle + len(damage) :]
        path.write_bytes(damaged)
        with Image.open(path) as image:
            image.load()  # no error
        with pytest.raises(ValueError, match=f"not a readable image .*{problem}"):
            read_picture(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_as_pillow_reads_and_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    noise_jpeg(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_picture(tmp_path / "x.jpg"), expected)


def test_why_a_file_cannot_be_read_is_reported_without_repeating_its_name(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("folder.jpg", "Is a directory"), ("away.jpg", "No such file or dir.*y")):
        with pytest.raises(ValueError, match=rf"^not a readable image \({reason}\)$"):
            read_picture(tmp_path / name)


def png_of_zeros(width, height):
    """A small file of a large black image with 1 bit per pixel."""

    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(((width + 7) // 8 + 1) * height))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_decompression_bomb_is_refused_by_its_header_and_a_large_photograph_is_not(tmp_path):
    bomb, large = tmp_path / "bomb.png", tmp_path / "large.png"
    bomb.write_bytes(png_of_zeros(20_000, 10_000))
    large.write_bytes(png_of_zeros(12_000, 9_000))  # 108 million pixels, as telephones take them
    for read in (read_picture, shown_size):
        with pytest.raises(ValueError, match="too large an image"):
            read(bomb)
    assert shown_size(large) == (9_000, 12_000)


def test_pixels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((3, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="no known range"):
        read_picture(tmp_path / "x.tif")


def test_files_pillow_numpy_and_torch_give_the_same_pixels(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(WHITE_LEFT).save(path)
    expected = torch.from_numpy(WHITE_LEFT).permute(2, 0, 1)
    with Image.open(path) as opened:
        for given in (path, str(path), opened, WHITE_LEFT, expected):
            assert torch.equal(to_pixels(given), expected)


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((3, 8, 8), dtype=np.uint8),  # torch's order
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(given):
    with pytest.raises(ValueError, match="uint8, RGB"):
        to_pixels(given)


def test_what_is_no_list_of_pictures_is_reported(tmp_path):
    path = tmp_path / "away.jpg"
    for given, said in [
        (str(path), rf"found one picture, {path}, expected a list of them"),
        (Image.new("L", (4, 4)), "found one picture"),
        ([path], rf"^{path}: not a readable image \(No such file or directory\)\.$"),
        ([b"bytes"], "found a bytes, expected a picture: a file"),
        ([None], "found a NoneType"),
    ]:
        with pytest.raises(ValueError, match=said):
            list_pixels(given)
    assert list_pixels([]) == []


def test_what_the_system_says_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr("bigdet.host.reading.RETRY_SECONDS", (0.0,))
    opened, failures = Image.open, []

    def fail(path):
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number), str(path))
        return opened(path)

    monkeypatch.setattr(Image, "open", fail)
    failures[:] = [errno.ESTALE]
    assert read_picture(tmp_path / "a.png").shape == (3, 4, 3)  # at the second attempt
    failures[:] = [errno.EACCES]
    with pytest.raises(ValueError, match=r"^cannot be read \(Permission denied\)\. Allow the user"):
        read_picture(tmp_path / "a.png")
    failures[:] = [errno.EMFILE] * 2  # the other pictures of a folder would fail too
    with pytest.raises(OSError, match=r"a\.png: cannot be read \(Too many open files\)\. Raise"):
        shown_size(tmp_path / "a.png")
