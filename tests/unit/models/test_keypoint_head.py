from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigdet.config.heads import KeypointConfig
from bigdet.models.heads.box import Regions
from bigdet.models.heads.keypoint import (
    KeypointHead,
    find_keypoints,
    keypoint_cells,
    select_with_keypoints,
)
from bigdet.models.heads.positives import Positives
from bigdet.models.norms import Kind

SIZE = 56
BOX = [10.0, 20.0, 66.0, 132.0]  # 56 wide, 112 high: a cell is one pixel wide and two high


def head_of(norm: Kind = "none", width: int = 32, num_keypoints: int = 2) -> KeypointHead:
    torch.manual_seed(0)
    config = KeypointConfig(num_keypoints=num_keypoints, width=width)
    return KeypointHead(norm, 8, config, num_classes=3)


def test_cells_of_keypoints_are_worked_out_by_hand() -> None:
    points = [
        ([10.0, 20.0, 2.0], 0),  # the upper left corner
        ([12.9, 25.9, 1.0], 2 * SIZE + 2),  # hidden, but labeled
        ([66.0, 132.0, 2.0], SIZE * SIZE - 1),  # the lower right corner belongs to the last cell
        ([12.9, 25.9, 0.0], None),  # not labeled
        ([9.9, 25.0, 2.0], None),  # left of the region
        ([12.0, 132.1, 2.0], None),  # below it
    ]
    keypoints = torch.tensor([[point for point, _ in points]])
    cells, is_valid = keypoint_cells(keypoints, torch.tensor([BOX]))
    assert is_valid[0].tolist() == [cell is not None for _, cell in points]
    assert cells[0].tolist() == [cell or 0 for _, cell in points]


def regions_of(is_positive: list[bool], rows: list[int], boxes: list[list[float]]) -> Regions:
    tensor = torch.tensor([boxes])
    return Regions(
        boxes=tensor,
        labels=torch.ones(1, len(rows), dtype=torch.int64),
        is_valid=torch.ones(1, len(rows), dtype=torch.bool),
        is_positive=torch.tensor([is_positive]),
        object_boxes=tensor,
        object_rows=torch.tensor([rows]),
    )


def test_regions_are_taken_where_a_keypoint_can_be_learned() -> None:
    # Object 0 has a labeled keypoint, object 1 has none.
    keypoints = torch.tensor([[[12.0, 25.0, 1.0]], [[12.0, 25.0, 0.0]]])
    away = [30.0, 20.0, 66.0, 132.0]  # does not hold it
    regions = regions_of([True, True, True, False], [0, 1, 0, 0], [BOX, BOX, away, BOX])
    chosen = select_with_keypoints(regions, keypoints, num_classes=3)
    assert chosen.is_valid.sum() == 1
    assert chosen.boxes[0].tolist() == BOX
    assert chosen.object_rows[0] == 0


def positives_of(is_valid: list[bool]) -> Positives:
    count = len(is_valid)
    return Positives(
        boxes=torch.tensor([BOX] * count),
        images=torch.zeros(count, dtype=torch.int64),
        labels=torch.zeros(count, dtype=torch.int64),
        object_rows=torch.zeros(count, dtype=torch.int64),
        is_valid=torch.tensor(is_valid),
    )


def test_the_loss_is_the_mean_over_keypoints_that_can_be_learned() -> None:
    # Silent maps: log(56 x 56) each. The first keypoint's map in region 0 raises the right cell by
    # 1: log(56 x 56 - 1 + e) - 1. The second keypoint is not labeled, the last region not valid.
    keypoints = torch.tensor([[[12.5, 25.0, 2.0], [12.5, 25.0, 0.0]]])
    logits = torch.zeros(3, 2, SIZE, SIZE)
    logits[0, 0, 2, 2] = 1.0
    logits[:, 1] = torch.randn(3, SIZE, SIZE)
    logits[2] = 7.0 * torch.randn(2, SIZE, SIZE)
    losses = head_of().losses(logits, positives_of([True, True, False]), keypoints)
    silent, raised = math.log(SIZE**2), math.log(SIZE**2 - 1 + math.e) - 1
    assert losses["keypoint"].item() == pytest.approx((silent + raised) / 2, rel=1e-6)


def test_without_any_keypoint_the_loss_is_zero_and_touches_every_parameter() -> None:
    head = head_of()
    for keypoints in (torch.zeros(0, 2, 3), torch.zeros(1, 2, 3)):
        losses = head.losses(
            head(torch.randn(32, 8, 14, 14)), positives_of([False] * 32), keypoints
        )
        assert losses["keypoint"] == 0
        losses["keypoint"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("norm", ["none", "gn"])
def test_the_layers_are_eight_convolutions_and_a_transposed_one(norm: Kind) -> None:
    # With gn, which torchvision does not have: 8 times scale and shift, no biases of convolutions.
    head = head_of(norm)
    weights = 8 * 32 * 9 + 7 * 32 * 32 * 9 + 32 * 2 * 16 + 2
    per_layer = 2 * 32 if norm == "gn" else 32
    assert sum(p.numel() for p in head.parameters()) == weights + 8 * per_layer
    assert head(torch.randn(3, 8, 14, 14)).shape == (3, 2, SIZE, SIZE)
    assert head(torch.randn(0, 8, 14, 14)).shape == (0, 2, SIZE, SIZE)


def test_group_normalization_makes_the_maps_blind_to_scale_and_shift_of_the_features() -> None:
    # A constant factor on all features is divided out after the first convolution.
    head = head_of("gn")
    pooled = torch.randn(2, 8, 14, 14, dtype=torch.float64)
    head = head.double()
    torch.testing.assert_close(head(pooled), head(1000.0 * pooled), rtol=1e-4, atol=1e-4)


def test_weights_begin_as_the_recipes_say() -> None:
    head = head_of(width=64, num_keypoints=17)
    for number, layer in enumerate(head.convs):
        expected = (2 / (64 * 9)) ** 0.5  # MSRA: variance 2 / fan-out
        torch.testing.assert_close(layer.conv.weight.std().item(), expected, rtol=0.05, atol=0)
        assert not layer.conv.bias.any(), number
    # torch counts the fan-out of a transposed convolution in its first dimension, the inputs.
    expected = (2 / (64 * 16)) ** 0.5
    torch.testing.assert_close(head.deconv.weight.std().item(), expected, rtol=0.05, atol=0)
    assert not head.deconv.bias.any()


def peak_at(row: int, column: int) -> Tensor:
    """A smooth hill on the grid: what a trained head predicts."""
    places = torch.arange(SIZE, dtype=torch.float64)
    return 10 - ((places[:, None] - row) ** 2 + (places - column) ** 2) / 4


def test_peaks_are_found_in_pixels_of_the_box() -> None:
    # A box of 56 x 112: cell (row 30, column 7) covers pixels 7 to 8 across and 60 to 62 down; of
    # the two rows the bicubic hill is equally high in both, so the center may be in either.
    maps = torch.stack([peak_at(30, 7), peak_at(0, 55)])[None]
    found = find_keypoints(maps, torch.tensor([BOX], dtype=torch.float64))
    assert found.shape == (1, 2, 3)
    x, y, score = found[0, 0].tolist()
    assert x == pytest.approx(10 + 7.5)
    assert y in (pytest.approx(20 + 60.5), pytest.approx(20 + 61.5))
    assert score == pytest.approx(10, abs=0.1)
    assert found[0, 1, :2].tolist() == pytest.approx([10 + 55.5, 20 + 0.5])
    assert find_keypoints(maps[:0], torch.zeros(0, 4)).shape == (0, 2, 3)


def test_a_box_without_area_is_one_pixel() -> None:
    empty = torch.tensor([[5.0, 6.0, 5.0, 6.0]], dtype=torch.float64)
    found = find_keypoints(peak_at(3, 3)[None, None], empty)
    assert found[0, 0, :2].tolist() == [5.5, 6.5]


@pytest.mark.parametrize(("min_visible", "is_heard"), [(0, True), (2, True), (3, False)])
def test_few_visible_keypoints_teach_nothing(min_visible: int, is_heard: bool) -> None:
    # Two valid regions on an object with one labeled keypoint: two to learn from.
    keypoints = torch.tensor([[[12.5, 25.0, 2.0], [12.5, 25.0, 0.0]]])
    head = KeypointHead("none", 8, KeypointConfig(num_keypoints=2, min_visible=min_visible), 3)
    logits = torch.zeros(3, 2, SIZE, SIZE, requires_grad=True)
    loss = head.losses(logits, positives_of([True, True, False]), keypoints)["keypoint"]
    assert loss.item() == (pytest.approx(math.log(SIZE**2)) if is_heard else 0)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad.any()) == is_heard
