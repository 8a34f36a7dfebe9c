"""Numbers of published tests of operations that no other test here has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigdet.models.anchors import cell_anchors, grid_anchors
from bigdet.models.assign import NEGATIVE, POSITIVE, draw_sample
from bigdet.models.losses import delta_losses
from bigdet.ops.boxes import encode_deltas
from bigdet.ops.pooling import roi_align, tabulate


def pool(image: torch.Tensor, boxes: list[list[float]], size: int) -> torch.Tensor:
    """RoIAlign on one map (1, C, H, W) of stride 4, aligned."""
    table = tabulate([image.contiguous(memory_format=torch.channels_last)], [4])
    images = torch.zeros(len(boxes), dtype=torch.int64)
    return roi_align(table, torch.tensor(boxes, dtype=image.dtype), images, size, True)


def test_roi_align_of_half_an_image_is_that_of_the_whole() -> None:
    # A ramp, which averaging over 2x2 pixels leaves a ramp: then half the box on half the image
    # gives the same values.
    ys, xs = torch.meshgrid(*[torch.arange(16.0, dtype=torch.float64)] * 2, indexing="ij")
    image = (3 * xs + 5 * ys)[None, None]
    half = F.avg_pool2d(image, 2)
    box = [8.0, 12.0, 44.0, 40.0]
    whole = pool(image, [box], 4)
    assert (whole - pool(half, [[side / 2 for side in box]], 4)).abs().max() < 1e-4


def test_roi_align_equals_grid_sample() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 12, 10, dtype=torch.float64)
    box = [6.0, 10.0, 30.0, 41.0]  # pixels; cells of 4
    found = pool(image, [box], 5)
    # 10x10 points, two a side of each of 5x5 bins, in cells whose centers lie at + 0.5.
    steps = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    x = (box[0] + steps * (box[2] - box[0])) / 4
    y = (box[1] + steps * (box[3] - box[1])) / 4
    grid = torch.stack(torch.meshgrid(2 * y / 12 - 1, 2 * x / 10 - 1, indexing="ij")[::-1], -1)
    points = F.grid_sample(image, grid[None], align_corners=False)
    torch.testing.assert_close(found, F.avg_pool2d(points, 2))


def test_anchors_of_sides_32_and_64_on_a_grid_of_stride_4() -> None:
    cells = torch.stack([cell_anchors(side, [0.25, 1.0, 4.0], rounded=False) for side in (32, 64)])
    anchors = grid_anchors([(1, 2), (1, 1)], [(4, 4), (4, 4)], cells).tolist()
    assert anchors[:3] == [[-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32]]
    assert anchors[3:6] == [[-28, -8, 36, 8], [-12, -16, 20, 16], [-4, -32, 12, 32]]
    assert anchors[6] == [-64, -16, 64, 16]


@pytest.mark.parametrize(("side", "expected"), [(448, 50_127), (1024, 261_888)])
def test_anchors_of_a_square_are_as_many_as_published(side: int, expected: int) -> None:
    sizes = [(-(-side // stride),) * 2 for stride in (4, 8, 16, 32, 64)]
    cells = torch.zeros(5, 3, 4)
    assert len(grid_anchors(sizes, [(4, 4)] * 5, cells)) == expected


def test_silent_box_predictions_cost_what_detectron2_says() -> None:
    proposals = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7.0, 8.0]])
    objects = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0]])
    targets = encode_deltas(objects, proposals, (10.0, 5.0))
    losses = delta_losses(torch.zeros(2, 4), targets, torch.ones(2, dtype=torch.bool), 0.0)
    assert losses.sum().item() / 2 == pytest.approx(4.0362, abs=2e-4)


def test_smooth_l1_of_detectron2s_inputs() -> None:
    deltas, targets = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.1, 2.0, 4.5])
    for beta in (0.5, 1.0):
        losses = [
            delta_losses(
                F.pad(delta[None], (0, 3)), F.pad(target[None], (0, 3)), torch.tensor(True), beta
            ).item()
            for delta, target in zip(deltas, targets, strict=True)
        ]
        assert losses == pytest.approx([0.5 * 0.1**2 / beta, 0, 1.5 - 0.5 * beta], rel=1e-5)


def test_four_slots_with_a_quarter_of_positives_take_one_of_three_and_three_of_six() -> None:
    labels = torch.tensor([[POSITIVE] * 3 + [NEGATIVE] * 6], dtype=torch.int8)
    sample = draw_sample(labels, 4, 0.25)
    assert sample.is_positive.tolist() == [[True, False, False, False]]
    assert sample.is_valid.all()
    assert sample.index[0, 0] < 3 <= sample.index[0, 1:].min()
