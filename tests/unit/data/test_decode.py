"""Image files to pixels: as stored, always RGB, or a clear refusal."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet.data.examples.decode import decode_image, decoded_extent, stored_size
from bigdet.ops.resize import resize_image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:20, :30]
    return Image.fromarray(np.stack([x * 8, y * 12, x + y], -1).astype(np.uint8)).convert(mode)


def as_pillow_sees(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_any_file_becomes_the_rgb_that_pillow_sees(mode, kind, options):
    data = encode(gradient(mode), kind, **options)
    image = decode_image(data)
    assert image.shape == (3, 20, 30)
    assert image.dtype == torch.uint8
    assert image.stride() == (1, 30 * 3, 3)  # channels_last
    torch.testing.assert_close(image, as_pillow_sees(data), rtol=0, atol=0)


def test_transparency_is_dropped_without_a_warning():
    image = gradient().convert("P")
    data = encode(image, "PNG", transparency=bytes([0] * 256))
    torch.testing.assert_close(
        decode_image(data), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    )


def test_an_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show": annotations refer to the stored pixels
    assert decode_image(encode(gradient(), "JPEG", exif=exif)).shape == (3, 20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused(kind):
    data = encode(gradient(), kind)
    with pytest.raises(ValueError, match=r"."):
        decode_image(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        decode_image(data)


def test_stray_bytes_before_a_marker_are_left_out():
    data = encode(gradient(), "JPEG", optimize=True)
    found = decode_image(data[:-2] + b"\x12\x34\x56" + data[-2:])  # simplejpeg refuses this
    torch.testing.assert_close(found, as_pillow_sees(data), rtol=0, atol=1)


@pytest.mark.parametrize(
    ("first", "last"), [(0.0, 1.0), (0.5, 1.0), (0.3, 0.6)], ids=["all", "rest", "middle"]
)
@pytest.mark.parametrize("options", [{"quality": 95}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("has_end", [True, False])
def test_zeros_in_place_of_compressed_data_are_refused(options, first, last, has_end):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", **options)
    scan = data.index(b"\xff\xda") + 14
    length = len(data) - 2 - scan
    start, stop = scan + int(first * length), scan + int(last * length)
    damaged = data[:start] + bytes(stop - start) + data[stop:]
    with pytest.raises(ValueError, match=r"."):
        decode_image(damaged if has_end else damaged[:-2])


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_zeros_that_are_a_flat_picture_are_no_damage(options, color):
    image = Image.new("RGB", (640, 480), color)
    image.paste(gradient(), (300, 200))
    data = encode(image, "JPEG", **options)
    assert (bytes(64) in data) == bool(options)  # not with the standard code tables
    torch.testing.assert_close(decode_image(data), as_pillow_sees(data), rtol=0, atol=1)


def test_zeros_in_the_headers_or_behind_the_end_are_no_damage():
    data = encode(gradient(), "JPEG", optimize=True, exif=b"Exif\0\0" + bytes(500))
    found = decode_image(data + bytes(500))
    torch.testing.assert_close(found, as_pillow_sees(data), rtol=0, atol=1)
    found = decode_image(data[:-2] + b"\x12\x34\x56" + data[-2:] + bytes(500))
    torch.testing.assert_close(found, as_pillow_sees(data), rtol=0, atol=1)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # it has 600
    with pytest.raises(ValueError, match="too large to be decoded: Image size"):
        decode_image(encode(gradient(), "PNG"))


def test_of_sixteen_bits_the_upper_eight_are_kept():
    # Pillow's own conversion would cut all above 255 to white. 5000 = 19 x 256 + 136.
    data = encode(Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)), "PNG")
    assert decode_image(data).tolist() == [[[19] * 4] * 4] * 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind):
    first, second = gradient(), Image.new("RGB", (30, 20), "red")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], duration=100, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    torch.testing.assert_close(
        decode_image(data), torch.from_numpy(np.array(first)).permute(2, 0, 1)
    )


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9.0) + np.cos(y / 7.0), np.sin((x + y) / 11.0), np.cos(x / 15.0)]
    return Image.fromarray(np.stack([100 * wave / 2 + 128 for wave in waves], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("least_size", "expected"),
    [
        ((100, 150), (100, 150)),  # exactly half
        ((101, 150), (200, 300)),
        ((100, 151), (200, 300)),
        ((99, 149), (100, 150)),
        ((50, 75), (50, 75)),
        ((25, 30), (25, 38)),  # an eighth, rounded up
        ((1, 1), (25, 38)),
        ((400, 600), (200, 300)),  # never larger than stored
    ],
)
def test_a_jpeg_of_at_least_twice_the_size_decodes_smaller(least_size, expected):
    data = encode(smooth(200, 300), "JPEG", quality=95)
    image = decode_image(data, least_size)
    assert image.shape == (3, *expected)
    assert image.stride()[0] == 1  # channels_last
    whole = decode_image(data)
    if expected != (200, 300):
        extent = decoded_extent((200, 300), expected)
        small = resize_image(image, (20, 30), extent).float()
        assert (small - resize_image(whole, (20, 30)).float()).abs().mean() < 1.5


def test_rows_that_are_decoded_in_part_count_in_part():
    assert decoded_extent((427, 640), (107, 160)) == (106.75, 160)
    assert decoded_extent((64, 64), (64, 64)) == (64, 64)


def test_other_files_are_never_decoded_smaller():
    for kind in ("PNG", "WEBP"):
        assert decode_image(encode(smooth(64, 64), kind), (8, 8)).shape == (3, 64, 64)
    assert decode_image(encode(smooth(64, 64).convert("CMYK"), "JPEG"), (8, 8)).shape[1] == 64


def test_a_jpeg_that_is_cut_off_is_refused_at_any_size():
    data = encode(smooth(200, 300), "JPEG")
    with pytest.raises(ValueError, match=r"."):
        decode_image(data[: len(data) * 2 // 3], (20, 30))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_stored_size_is_read_from_the_header(kind):
    assert stored_size(encode(gradient(), kind)) == (20, 30)
    with pytest.raises(ValueError, match=r"."):
        stored_size(b"not an image")


def test_real_photographs_decode_as_pillow_has_them(coco_dir):
    # The first ones and the grayscale one.
    paths = sorted((coco_dir / "train2017").glob("*.jpg"))[:8]
    for path in [*paths, coco_dir / "train2017" / "000000000086.jpg"]:
        data = path.read_bytes()
        difference = (decode_image(data).int() - as_pillow_sees(data).int()).abs()
        assert difference.max() <= 1, path  # both are libjpeg-turbo, of maybe different versions
