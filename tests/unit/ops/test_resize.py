"""Sizes as torchvision has them, pixels as Pillow has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bigdet.ops import resize, sizes


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        (
            (480, 640),
            (800, 1066),
        ),  # 640 x 800 / 480 = 1066.7; a part of a pixel is dropped, as by torchvision
        ((427, 640), (800, 1199)),
        ((640, 1280), (666, 1333)),  # 640 * 1333 / 1280 = 666.5
        ((1280, 640), (1333, 666)),
        ((800, 800), (800, 800)),
        ((1, 4000), (1, 1333)),  # 1333 / 4000 of a pixel is still one pixel
    ],
)
def test_short_side_800_and_long_side_at_most_1333(original, expected):
    assert sizes.eval_size(*original, 800, 1333) == expected


def test_the_short_side_is_never_a_pixel_off():
    # In float arithmetic short * (800 / short) is below 800 for some, and rounds down to 799.
    assert any(int(short * (800 / short)) == 799 for short in range(160, 2000))
    assert all(sizes.eval_size(short, 2000, 800, 10_000)[0] == 800 for short in range(160, 2000))


def test_direct_brings_the_long_side_to_the_size():
    assert sizes.eval_size(480, 640, 448, 448) == (336, 448)
    assert sizes.eval_size(640, 480, 448, 448) == (448, 336)


@pytest.mark.parametrize("size", [(30, 40), (100, 77), (33, 150), (61, 90)])
def test_resized_pixels_equal_pillow_to_one_grey_level(size):
    pixels = torch.randint(0, 256, (61, 90, 3), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    found = resize.resize_image(pixels.permute(2, 0, 1), size)
    picture = Image.fromarray(pixels.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert found.shape == (3, *size)
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("is_channels_last", [True, False])
def test_the_result_is_in_channels_last_memory(is_channels_last):
    image = torch.zeros((3, 10, 20), dtype=torch.uint8)
    if is_channels_last:
        image = torch.zeros((10, 20, 3), dtype=torch.uint8).permute(2, 0, 1)
    assert resize.resize_image(image, (5, 8)).stride() == (1, 8 * 3, 3)


def test_a_crop_of_an_image_can_be_resized():
    image = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3).permute(2, 0, 1)
    crop = image[:, 1:3, 1:3]
    torch.testing.assert_close(
        resize.resize_image(crop, (6, 6)), resize.resize_image(crop.clone(), (6, 6))
    )


def test_an_image_of_the_right_size_is_left_alone():
    image = torch.zeros((3, 10, 20), dtype=torch.uint8)
    assert resize.resize_image(image, (10, 20)) is image


def test_an_image_of_which_a_part_counts_is_resized_as_that_part():
    # 8 columns in steps of 10, of which 7.5 count, become 3: their centers are at 1.25, 3.75 and
    # 6.25 columns. A column weighs 1 - distance / 2.5: for the first new one the columns 0 to 3
    # weigh 0.7, 0.9, 0.5 and 0.1: 22 / 2.2 = 10; the second is between 30 and 40, nearer to 30;
    # for the last one the columns 4 to 7 weigh 0.3, 0.7, 0.9, 0.5: 136 / 2.4 = 56.7.
    ramp = (torch.arange(8, dtype=torch.uint8) * 10).expand(3, 4, 8)
    found = resize.resize_image(ramp, (4, 3), (4, 7.5))
    assert found.shape == (3, 4, 3)
    torch.testing.assert_close(
        found[0, 0].float(), torch.tensor([10, 32.5, 56.7]), atol=0.6, rtol=0
    )
    whole = resize.resize_image(ramp, (4, 3), (4, 8))
    torch.testing.assert_close(whole, resize.resize_image(ramp, (4, 3)))
    for size in range(1, 64):  # never a pixel short
        image = torch.zeros((3, 64, 64), dtype=torch.uint8)
        assert resize.resize_image(image, (size, size), (63.125, 63.5)).shape == (3, size, size)
