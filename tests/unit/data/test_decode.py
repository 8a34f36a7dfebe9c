"""Image files to pixels: as stored, always RGB, or a clear refusal."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet.data.decode import decode_image


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


def test_sixteen_bits_are_refused_rather_than_cut_to_white():
    data = encode(Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)), "PNG")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_image(data)


def test_real_photographs_decode_as_pillow_has_them(coco_dir):
    # The first ones and the grayscale one.
    paths = sorted((coco_dir / "train2017").glob("*.jpg"))[:8]
    for path in [*paths, coco_dir / "train2017" / "000000000086.jpg"]:
        data = path.read_bytes()
        difference = (decode_image(data).int() - as_pillow_sees(data).int()).abs()
        assert difference.max() <= 1, path  # both are libjpeg-turbo, of maybe different versions
