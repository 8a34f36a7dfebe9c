from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from bigdet.ops.masks import paste_mask, sample_masks
from bigdet.structures import Masks


def ellipse_masks() -> tuple[Masks, Tensor]:
    """Two ellipses on a canvas of 40 x 50: packed, and as full bitmaps."""
    canvas = torch.zeros(2, 40, 50, dtype=torch.uint8)
    y, x = torch.arange(40)[:, None] + 0.5, torch.arange(50) + 0.5
    canvas[0] = ((x - 15) / 10) ** 2 + ((y - 20) / 14) ** 2 <= 1
    canvas[1] = ((x - 33) / 9) ** 2 + ((y - 12) / 6) ** 2 <= 1
    windows = [(5, 6, 25, 34), (24, 6, 42, 18)]
    crops = [canvas[i, y0:y1, x0:x1].flatten() for i, (x0, y0, x1, y1) in enumerate(windows)]
    masks = Masks(
        bits=torch.cat(crops),
        offsets=torch.tensor([0, len(crops[0]), len(crops[0]) + len(crops[1])]),
        origins=torch.tensor([(x0, y0) for x0, y0, _, _ in windows]),
        sizes=torch.tensor([(y1 - y0, x1 - x0) for x0, y0, x1, y1 in windows]),
    )
    return masks, canvas


def test_sampling_a_crop_on_its_own_pixels_gives_it_back() -> None:
    masks, canvas = ellipse_masks()
    box = torch.tensor([[5.0, 6.0, 25.0, 26.0]])  # 20 x 20 pixels, 20 points: their centers
    sampled = sample_masks(masks, torch.tensor([0]), box, 20)
    assert torch.equal(sampled[0], canvas[0, 6:26, 5:25].float())


def test_sampling_equals_one_roi_align_point_per_bin_on_the_full_bitmap() -> None:
    masks, canvas = ellipse_masks()
    boxes = torch.tensor(
        [[3.2, 4.1, 27.9, 38.3], [8.0, 9.0, 14.0, 12.0], [20.5, 1.0, 49.0, 30.0], [26, 7, 39, 17]]
    ).double()
    objects = torch.tensor([0, 0, 1, 1])
    sampled = sample_masks(masks, objects, boxes, 28)
    rois = torch.cat([objects[:, None].double(), boxes], dim=1)
    expected = roi_align(canvas[:, None].double(), rois, 28, 1.0, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(sampled, expected[:, 0], rtol=0, atol=1e-12)
    assert 0.2 < (sampled[0] >= 0.5).double().mean() < 0.8


def test_sampling_outside_the_crop_and_without_a_mask_gives_zero() -> None:
    masks, _ = ellipse_masks()
    none = Masks(
        bits=masks.bits,
        offsets=torch.cat([masks.offsets, masks.offsets[-1:]]),
        origins=torch.cat([masks.origins, torch.zeros(1, 2, dtype=torch.int64)]),
        sizes=torch.cat([masks.sizes, torch.zeros(1, 2, dtype=torch.int64)]),
    )
    boxes = torch.tensor([[30.0, 30.0, 40.0, 40.0], [0.0, 0.0, 9.0, 9.0]])
    assert not sample_masks(none, torch.tensor([0, 2]), boxes, 28).any()


def test_sampling_for_no_regions_is_empty() -> None:
    masks, _ = ellipse_masks()
    sampled = sample_masks(masks, torch.zeros(0).long(), torch.zeros(0, 4), 28)
    assert sampled.shape == (0, 28, 28)


def iou(first: Tensor, second: Tensor) -> float:
    return ((first & second).sum() / (first | second).sum()).item()


@pytest.mark.parametrize("number", [0, 1])
def test_a_mask_sampled_on_a_box_and_pasted_back_is_the_mask(number: int) -> None:
    masks, canvas = ellipse_masks()
    windows = torch.cat([masks.origins, masks.origins + masks.sizes.flip(1)], dim=1)
    box = windows[number].float() + torch.tensor([-1.3, -0.6, 1.2, 0.8])
    prob = sample_masks(masks, torch.tensor([number]), box[None], 28)[0]
    assert iou(paste_mask(prob, box, 40, 50), canvas[number].bool()) > 0.94


def test_pasting_fills_exactly_the_pixels_whose_centers_lie_in_the_box() -> None:
    # Columns 2.4 to 5.6 hold the centers 2.5, 3.5, 4.5, 5.5; lines 1 to 3 hold 1.5 and 2.5. At
    # the border a full mask falls off to one half, so only pixels further in are certain.
    mask = paste_mask(torch.ones(28, 28), torch.tensor([2.4, 1.0, 5.6, 3.0]), 6, 8)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:3, 2:6] = True
    assert torch.equal(mask, expected)


def test_pasting_is_close_to_torchvisions() -> None:
    # torchvision rounds boxes to whole pixels: masks agree but for a rim of a pixel.
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 1, 5, 5, generator=generator)
    prob = torch.nn.functional.interpolate(low, size=(28, 28), mode="bicubic").clamp(0, 1)[0, 0]
    box = torch.tensor([20.3, 31.8, 141.1, 160.4])
    mine = paste_mask(prob, box, 200, 180)
    theirs = paste_masks_in_image(prob[None, None], box[None], (200, 180))[0, 0] >= 0.5
    assert iou(mine, theirs) > 0.94


@pytest.mark.parametrize(
    "box",
    [[5.0, 5.0, 5.0, 9.0], [-9.0, -9.0, -2.0, -2.0], [60.0, 3.0, 70.0, 9.0], [3, 3, 3.2, 3.2]],
)
def test_pasting_an_empty_or_outside_box_sets_nothing(box: list[float]) -> None:
    assert not paste_mask(torch.ones(28, 28), torch.tensor(box), 40, 50).any()


def test_pasting_cuts_the_mask_at_the_image() -> None:
    mask = paste_mask(torch.ones(28, 28), torch.tensor([-10.0, -10.0, 100.0, 100.0]), 7, 9)
    assert mask.shape == (7, 9)
    assert mask.all()
