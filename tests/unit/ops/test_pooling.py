from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from bigdet.ops.pooling import pyramid_levels, roi_align, tabulate

STRIDES = [4, 8, 16, 32]


def one_level(feature: Tensor) -> Tensor:
    return feature.view(1, 1, *feature.shape)


@pytest.mark.parametrize(("aligned", "first", "down"), [(True, 4.5, 2.5), (False, 7.5, 2.5)])
def test_roi_align_gives_the_reference_grids(aligned: bool, first: float, down: float) -> None:
    # detectron2's test of ROIAlign: arange(25) as 5x5, box (1, 1, 3, 3), 4x4 bins of half a cell.
    feature = torch.arange(25, dtype=torch.float64).view(5, 5)
    table = tabulate([one_level(feature)], [1])
    box = torch.tensor([[1.0, 1.0, 3.0, 3.0]], dtype=torch.float64)
    pooled = roi_align(table, box, torch.tensor([0]), 4, aligned)
    steps = torch.arange(4, dtype=torch.float64)
    expected = first + down * steps[:, None] + 0.5 * steps
    torch.testing.assert_close(pooled[0, 0], expected)


def random_boxes(number: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(number, 2, 2, generator=generator, dtype=torch.float64) * 800 - 150
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    special = [
        [-90.0, -90.0, 420.0, 540.0],  # more than everything
        [10.0, 10.0, 10.0, 10.0],  # no area
        [-100.0, -100.0, -50.0, -50.0],  # outside
        [300.0, 440.0, 320.0, 448.0],  # at the last corner
        [31.0, 17.0, 33.0, 19.0],  # smaller than a cell
    ]
    return torch.cat([boxes, torch.tensor(special, dtype=torch.float64)])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("output_size", "ratio"), [(7, 2), (14, 2), (7, 0), (14, 0), (7, 3)])
def test_roi_align_equals_torchvisions_level_by_level(
    aligned: bool, output_size: int, ratio: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(2, 3, 448 // s, 320 // s, generator=generator, dtype=torch.float64)
        for s in STRIDES
    ]
    features = [feature.requires_grad_() for feature in features]
    boxes = random_boxes(200, generator)
    images = torch.randint(0, 2, (len(boxes),), generator=generator)
    pooled = roi_align(tabulate(features, STRIDES), boxes, images, output_size, aligned, ratio)
    assert pooled.is_contiguous(memory_format=torch.channels_last)

    levels = pyramid_levels(boxes, STRIDES)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    expected = torch.zeros_like(pooled)
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        rows = (levels == level).nonzero().squeeze(1)
        rois = torch.cat([images[rows, None].double(), boxes[rows]], dim=1)
        part = torchvision_roi_align(feature, rois, output_size, 1 / stride, ratio, aligned)
        expected = expected.index_put((rows,), part)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)

    direction = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((pooled * direction).sum(), features)
    wanted = torch.autograd.grad((expected * direction).sum(), features)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_regions_are_pooled_from_the_level_of_their_size() -> None:
    # FPN, equation 1: 224 pixels from P4, half of it from P3, a quarter from P2, double from P5.
    sides = torch.tensor([223.0, 224.0, 111.0, 112.0, 447.0, 448.0, 2000.0, 1.0, 0.0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], dim=1)
    assert pyramid_levels(boxes, STRIDES).tolist() == [1, 2, 0, 1, 2, 3, 3, 0, 0]


def test_roi_align_of_no_regions_is_empty_and_has_a_gradient_of_zero() -> None:
    feature = torch.randn(1, 2, 8, 8, requires_grad=True)
    pooled = roi_align(tabulate([feature], [4]), torch.zeros(0, 4), torch.zeros(0).long(), 7)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()
    assert feature.grad is not None
    assert not feature.grad.any()


def test_roi_align_adds_up_bfloat16_gradients_in_single_precision() -> None:
    # 300 regions on one cell: a bfloat16 sum of ones stops growing at 256.
    feature = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).expand(300, 4)
    pooled = roi_align(tabulate([feature], [1]), boxes, torch.zeros(300).long(), 4)
    assert pooled.dtype == torch.bfloat16
    pooled.sum().backward()
    assert feature.grad is not None
    # All weights together are 300 regions x 16 bins, spread over 16 cells.
    assert abs(feature.grad.float().sum().item() / (300 * 16) - 1) < 0.01


def test_adaptive_sampling_takes_a_point_for_each_cell_of_a_bin() -> None:
    # Rows of 12 cells with the values 0 to 11. Two bins over x = 0 to 12: each is 6 cells wide, so
    # 6 points, at the centers 0.5 to 5.5: values 0 to 5, mean 2.5; then 6 to 11, mean 8.5. One
    # point each for 0 to 1 and 1 to 2: 0 and 1. Three for 0 to 2.5, at 2.5 x (1, 3, 5) / 6: 0.41667
    # (value 0, at the border), 1.25 (0.75), 2.08333 (1.58333): mean 0.77778. Then the center, 3.75.
    feature = one_level(torch.arange(12, dtype=torch.float64).expand(12, 12))
    boxes = [[0.0, 0.0, 12.0, 12.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 5.0, 5.0]]
    boxes = torch.tensor(boxes, dtype=torch.float64)
    images = torch.zeros(3, dtype=torch.int64)
    pooled = roi_align(tabulate([feature], [1]), boxes, images, 2, sampling_ratio=0)
    expected = torch.tensor([[2.5, 8.5], [0.0, 1.0], [0.777778, 3.25]], dtype=torch.float64)
    torch.testing.assert_close(pooled[:, 0, 0], expected, rtol=0, atol=1e-6)


def test_adaptive_sampling_keeps_the_type_and_takes_no_regions() -> None:
    feature = torch.ones(1, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    table = tabulate([feature], [4])
    boxes = torch.tensor([[0.0, 0.0, 30.0, 9.0]])
    pooled = roi_align(table, boxes, torch.zeros(1).long(), 7, sampling_ratio=0)
    assert pooled.dtype == torch.bfloat16
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    none = roi_align(table, torch.zeros(0, 4), torch.zeros(0).long(), 7, sampling_ratio=0)
    assert none.shape == (0, 2, 7, 7)
    (pooled.sum() + none.sum()).backward()
    assert feature.grad is not None
    assert feature.grad.sum().item() == pytest.approx(2 * 49, rel=0.01)
