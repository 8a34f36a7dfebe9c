from __future__ import annotations

import torch
from torchvision.ops import batched_nms

from bigdet.ops.nms import best_of_groups, grouped_nms

# IoU of the first two: 9 x 10 / (2 x 100 - 90) = 0.818.
BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 30.0, 30.0]])


def test_nms_drops_the_lower_score_of_two_overlapping_boxes() -> None:
    kept = grouped_nms(
        BOXES, torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3, dtype=torch.long), 1, 0.7
    )
    assert kept.tolist() == [False, True, True]


def test_nms_keeps_boxes_that_overlap_less_than_the_threshold() -> None:
    kept = grouped_nms(
        BOXES, torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3, dtype=torch.long), 1, 0.9
    )
    assert kept.all()


def test_nms_keeps_boxes_of_other_groups() -> None:
    kept = grouped_nms(BOXES, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 4, 0]), 5, 0.7)
    assert kept.all()


def test_nms_leaves_out_minus_infinity_which_drops_nothing_either() -> None:
    scores = torch.tensor([0.5, -torch.inf, 0.1])
    kept = grouped_nms(BOXES, scores, torch.zeros(3, dtype=torch.long), 1, 0.7)
    assert kept.tolist() == [True, False, True]


def test_nms_of_no_boxes_keeps_none() -> None:
    kept = grouped_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 3, 0.5)
    assert kept.tolist() == []


def test_nms_equals_torchvisions_on_many_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 50
    sides = torch.rand(500, 2, generator=generator, dtype=torch.float64) * 50
    boxes = torch.cat([corners, corners + sides], dim=1)
    scores = torch.rand(500, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 7, (500,), generator=generator)
    kept = grouped_nms(boxes, scores, groups, 7, 0.4)
    expected = batched_nms(boxes, scores, groups, 0.4)
    assert kept.nonzero().squeeze(1).tolist() == sorted(expected.tolist())
    assert 50 < len(expected) < 450


def test_the_best_of_each_group_come_group_after_group() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7])
    groups = torch.tensor([2, 0, 2, 2, 2])
    assert best_of_groups(scores, groups, 3, 2).tolist() == [1, 4, 2]
    assert best_of_groups(scores[:0], groups[:0], 3, 2).tolist() == []
