from __future__ import annotations

import math

import torch

from bigdet.ops.boxes import (
    box_areas,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    pairwise_intersections,
    pairwise_iou,
    scale_boxes,
)

ONES = (1.0, 1.0)
DETECTRON = (10.0, 5.0)


def test_areas_have_continuous_edges() -> None:
    # 3 wide and 2 high: 6, not (3 + 1) x (2 + 1).
    assert box_areas(torch.tensor([[1.0, 1.0, 4.0, 3.0]])).tolist() == [6.0]


def test_iou_of_half_overlapping_unit_squares_is_a_third() -> None:
    first = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    # Half of it in common: 0.5 / 1.5. The same box: 1. Touching edges: 0.
    second = torch.tensor([[0.5, 0.0, 1.5, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 2.0, 1.0]])
    expected = torch.tensor([[1 / 3, 1.0, 0.0]])
    torch.testing.assert_close(pairwise_iou(first, second), expected)
    torch.testing.assert_close(
        pairwise_intersections(first, second), torch.tensor([[0.5, 1.0, 0.0]])
    )


def test_iou_of_empty_boxes_is_zero_and_not_nan() -> None:
    empty = torch.zeros(1, 4)
    assert pairwise_iou(empty, empty).tolist() == [[0.0]]


def test_iou_broadcasts_boxes_of_all_images_over_shared_anchors() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0]], [[0.0, 0.0, 4.0, 4.0]]])  # (2, 1, 4)
    anchors = torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])
    expected = torch.tensor([[[1.0, 0.0, 0.5]], [[0.25, 0.25, 0.5]]])
    torch.testing.assert_close(pairwise_iou(boxes, anchors), expected)


def test_iou_of_no_boxes_has_no_rows() -> None:
    assert pairwise_iou(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert pairwise_iou(torch.ones(3, 4), torch.zeros(0, 4)).shape == (3, 0)


def test_clip_uses_the_size_of_each_box_own_image() -> None:
    box = [-5.0, -5.0, 100.0, 100.0]
    clipped = clip_boxes(torch.tensor([[box], [box]]), torch.tensor([[40, 60], [80, 20]]))
    assert clipped.tolist() == [[[0.0, 0.0, 60.0, 40.0]], [[0.0, 0.0, 20.0, 80.0]]]


def test_scale_moves_boxes_to_the_original_size_and_clips() -> None:
    # Twice as wide, half as high.
    boxes = scale_boxes(torch.tensor([[1.0, 4.0, 3.0, 9.0]]), (8, 10), (4, 20))
    assert boxes.tolist() == [[2.0, 2.0, 6.0, 4.0]]


def test_encode_gives_detectrons_reference_values() -> None:
    # torchvision's BoxCoder, weights 10, 10, 5, 5.
    anchors = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7.0, 8.0]])
    boxes = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0]])
    expected = torch.tensor(
        [[0.0, 0.294117, -0.911608, 0.812595], [-1.382978, -2.272727, -0.806341, -1.592268]]
    )
    torch.testing.assert_close(
        encode_deltas(boxes, anchors, DETECTRON), expected, rtol=0, atol=2e-6
    )


def test_decode_moves_by_anchor_sizes_and_scales_about_the_center() -> None:
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 wide, 40 high, center (20, 40)
    deltas = torch.tensor([[0.5, -0.25, math.log(2.0), 0.0]])
    expected = torch.tensor([[10.0, 10.0, 50.0, 50.0]])  # center (30, 30), 40 wide, 40 high
    torch.testing.assert_close(decode_deltas(deltas, anchor, ONES), expected)


def test_decode_undoes_encode() -> None:
    anchors = torch.tensor([[1.0, 2.0, 11.0, 7.0]], dtype=torch.float64)
    boxes = torch.tensor([[3.0, 1.0, 5.0, 17.0]], dtype=torch.float64)
    deltas = encode_deltas(boxes, anchors, DETECTRON)
    torch.testing.assert_close(decode_deltas(deltas, anchors, DETECTRON), boxes)


def test_decode_bounds_the_growth_of_a_box() -> None:
    # The scale stops at exp(log(1000/16)) = 62.5 about the center (5, 5).
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[0.0, 0.0, 50.0, 50.0]])
    expected = torch.tensor([[-307.5, -307.5, 317.5, 317.5]])
    torch.testing.assert_close(decode_deltas(deltas, anchor, ONES), expected)


def test_decode_of_no_boxes_is_empty() -> None:
    assert decode_deltas(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), ONES).shape == (2, 0, 4)
