"""Image files of all kinds: the same pixels in training and prediction; what tars hold of them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigdet.data.examples.samples import load_sample
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.shard_tar import SampleLog
from bigdet.data.making.sources.coco import convert_coco
from bigdet.data.making.sources.image_files import read_image
from bigdet.data.making.sources.voc import convert_voc
from bigdet.pictures.files import read_picture
from tests.unit.data.turned import write_coco

SIZE = (48, 64)
RGB = np.stack([*np.mgrid[:48, :64], np.full(SIZE, 200)], -1).astype(np.uint8)
GRAY16 = (np.mgrid[:48, :64].sum(0) * 590).astype(np.uint16)  # up to 64,900


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def convert(folder: Path, files: dict[str, bytes]) -> ShardSet:
    annotations = write_coco(folder, files, SIZE)
    convert_coco(folder / "images", annotations, folder / "out")
    return ShardSet(folder / "out")


def pixels_of(shards: ShardSet, row: int) -> np.ndarray:
    return load_sample(shards, row)[0].permute(1, 2, 0).numpy()


MODES = {
    "1.png": ("1", "PNG"), "1.tif": ("1", "TIFF"), "1.bmp": ("1", "BMP"), "L.tif": ("L", "TIFF"),
    "LA.png": ("LA", "PNG"), "LA.tif": ("LA", "TIFF"), "P.png": ("P", "PNG"), "P.gif": ("P", "GIF"),
    "P.bmp": ("P", "BMP"), "RGB.bmp": ("RGB", "BMP"), "RGB.tif": ("RGB", "TIFF"),
    "RGB.ppm": ("RGB", "PPM"), "RGBA.png": ("RGBA", "PNG"), "RGBA.webp": ("RGBA", "WEBP"),
    "RGBA.tif": ("RGBA", "TIFF"), "CMYK.jpg": ("CMYK", "JPEG"), "CMYK.tif": ("CMYK", "TIFF"),
    "YCbCr.tif": ("YCbCr", "TIFF"), "RGB.jp2": ("RGB", "JPEG2000"), "L.jpg": ("L", "JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_training_and_prediction_see_the_same_pixels(tmp_path, name):
    mode, kind = MODES[name]
    image = Image.fromarray(RGB).convert("RGB" if mode in ("LA", "RGBA") else mode)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(RGB[..., 0]))  # transparent at the top
    shards = convert(tmp_path, {name: encode(image, kind)})
    shown = read_picture(tmp_path / "images" / name)
    np.testing.assert_array_equal(pixels_of(shards, 0), shown)
    with Image.open(tmp_path / "images" / name) as opened:
        np.testing.assert_array_equal(shown, np.array(opened.convert("RGB")))
    is_kept = kind in ("PNG", "WEBP", "JPEG")
    data = shards.read(0).image_bytes
    assert (data == (tmp_path / "images" / name).read_bytes()) == is_kept
    assert shards.manifest.changed == (
        {} if is_kept else {f"{kind} file stored as a PNG of the same pixels": 1}
    )
    assert list(check_shards(tmp_path / "out")) == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_of_16_bits_the_upper_8_are_seen_and_all_16_are_kept(tmp_path, kind):
    shards = convert(tmp_path, {"a": encode(Image.fromarray(GRAY16), kind)})
    expected = np.repeat((GRAY16 >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels_of(shards, 0), expected)
    np.testing.assert_array_equal(read_picture(tmp_path / "images/a"), expected)
    stored = Image.open(io.BytesIO(shards.read(0).image_bytes))
    np.testing.assert_array_equal(np.array(stored), GRAY16)
    assert not any("16-bit" in reason for reason in shards.manifest.changed)


def rgb16_png(pixels: np.ndarray) -> bytes:
    """Return a PNG of ``(H, W, 3)`` uint16, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("bits", "seen", "factor"), [(8, 0, 256), (10, 3, 64), (12, 15, 16), (14, 63, 4), (16, 255, 0)]
)
def test_values_that_fill_a_part_of_16_bits_are_counted_with_what_to_do(
    tmp_path, bits, seen, factor
):
    gray = (np.mgrid[:48, :64].sum(0) * (2**bits - 1) // 110).astype(np.uint16)
    rgb = rgb16_png(np.repeat(gray[..., None], 3, axis=-1))
    files = {"a.png": encode(Image.fromarray(gray), "PNG"), "b.png": rgb}
    shards = convert(tmp_path, files)
    assert pixels_of(shards, 0).max() == pixels_of(shards, 1).max() == seen
    reason = (
        f"16-bit image seen as 0..{seen} of 255, nearly black: its values fill a part of the 16 "
        f"bits only; multiply them by {factor} and convert again"
    )
    assert shards.manifest.changed == ({reason: 2} if factor else {})


def test_numbers_of_no_known_range_are_reported(tmp_path):
    deep, real = Image.new("I", SIZE[::-1], 70_000), Image.new("F", SIZE[::-1], 0.5)
    files = {"a.tif": encode(deep, "TIFF"), "b.tif": encode(real, "TIFF")}
    with pytest.raises(ShardError, match="2 x not decodable"):
        convert(tmp_path, files)
    for name, said in (("a.tif", "more than 16 bits"), ("b.tif", "floating-point numbers")):
        with pytest.raises(ValueError, match=said):
            read_picture(tmp_path / "images" / name)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_pictures_the_first_is_used_and_counted(tmp_path, kind):
    first, second = (
        Image.new("RGB", SIZE[::-1], (200, 10, 30)),
        Image.new("RGB", SIZE[::-1], "blue"),
    )
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    shards = convert(tmp_path, {"a": data})
    assert pixels_of(shards, 0)[24, 32].tolist() == [200, 10, 30]
    assert shards.manifest.changed["only the first of several pictures in a file is used"] == 1


@pytest.mark.parametrize("suffix", ["bmp", "TIF", "gif", "JPG", "Png"])
def test_voc_takes_files_of_any_suffix(tmp_path, suffix):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    kind = {"bmp": "BMP", "tif": "TIFF", "gif": "GIF", "jpg": "JPEG", "png": "PNG"}[suffix.lower()]
    (tmp_path / f"JPEGImages/a.{suffix}").write_bytes(encode(Image.fromarray(RGB), kind))
    box = "<xmin>9</xmin><ymin>7</ymin><xmax>38</xmax><ymax>24</ymax>"
    (tmp_path / "Annotations/a.xml").write_text(
        f"<annotation><object><name>x</name><bndbox>{box}</bndbox></object></annotation>"
    )
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    manifest = convert_voc(tmp_path, "train", tmp_path / "out")
    assert manifest is not None
    assert (manifest.images, manifest.instances) == (1, 1)
    assert ShardSet(tmp_path / "out").record(0)["file_name"] == f"a.{suffix}"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM"])
def test_damaged_files_of_other_formats_are_left_out_with_a_reason(tmp_path, kind):
    words = random.Random(kind)
    data = encode(Image.fromarray(RGB), kind)
    for _ in range(60):
        damaged = bytearray(data[: words.choice([len(data), words.randrange(1, len(data))])])
        for _ in range(3):
            damaged[words.randrange(min(len(damaged), 200))] = words.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        log = SampleLog()
        read = read_image(tmp_path / "a", None, {}, log)
        assert (read is None) == any("skipped" in line for line in log.lines)


def test_what_is_no_pixels_is_not_run(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(Image.fromarray(RGB), "EPS"))
    log = SampleLog()
    assert read_image(tmp_path / "a.jpg", None, {}, log) is None
    assert log.lines[0]["error"] == "EPS files are programs, which are not run; store it as PNG"
