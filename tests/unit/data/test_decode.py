"""Image files to pixels: as stored, always RGB, or a clear refusal."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet.data.decode import decode_image, decoded_extent, stored_size
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
