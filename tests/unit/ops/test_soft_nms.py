"""Soft-NMS against the pseudo-code of its paper (Bodla et al. 2017, figure 3), box by box."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from bigdet.ops.nms import grouped_nms, soft_nms

Kind = Literal["linear", "gaussian"]


def reference(boxes: Tensor, scores: Tensor, kind: Kind, iou: float, sigma: float) -> list[float]:
    """The pseudo-code for one class of one image: B, S; D with its scores."""
    left = {row: float(score) for row, score in enumerate(scores) if score > -math.inf}
    taken: dict[int, float] = {}
    while left:
        best = max(left, key=lambda row: left[row])  # the first of equal ones
        taken[best] = left.pop(best)
        for row in left:
            overlap = float(box_iou(boxes[best][None], boxes[row][None]))
            if kind == "gaussian":
                left[row] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= iou:
                left[row] *= 1 - overlap
    return [taken.get(row, -math.inf) for row in range(len(boxes))]


def crowd(number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, scores of which many are equal, and groups."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator, dtype=torch.float64) * 30
    sides = torch.rand(number, 2, generator=generator, dtype=torch.float64) * 40 + 5
    scores = torch.randint(1, 20, (number,), generator=generator).double() / 20
    return torch.cat([corners, corners + sides], dim=1), scores, torch.arange(number) % 7


KINDS: list[tuple[Kind, float, float]] = [
    ("linear", 0.3, 0.5), ("linear", 0.6, 0.5), ("gaussian", 0.3, 0.5), ("gaussian", 0.3, 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "iou", "sigma"), KINDS)
def test_scores_are_those_of_the_papers_pseudo_code_group_by_group(
    kind: Kind, iou: float, sigma: float
) -> None:
    boxes, scores, groups = crowd(150)
    groups[groups == 5] = 6  # a group without boxes
    scores[::11] = -math.inf
    found = soft_nms(boxes, scores, groups, 9, kind, iou, sigma, 150)
    expected = torch.empty_like(scores)
    for group in range(9):
        rows = (groups == group).nonzero().squeeze(1)
        of_group = reference(boxes[rows], scores[rows], kind, iou, sigma)
        expected[rows] = torch.tensor(of_group, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    lowered = (found < scores).sum()
    assert lowered > 10  # the boxes do overlap
    assert (found == -math.inf).sum() == (scores == -math.inf).sum()


@pytest.mark.parametrize(("kind", "iou", "sigma"), KINDS)
def test_a_limit_keeps_the_best_of_each_group(kind: Kind, iou: float, sigma: float) -> None:
    boxes, scores, groups = crowd(100, seed=1)
    whole = soft_nms(boxes, scores, groups, 7, kind, iou, sigma, 100)
    found = soft_nms(boxes, scores, groups, 7, kind, iou, sigma, 4)
    for group in range(7):
        mine, all_of_them = found[groups == group], whole[groups == group]
        assert (mine > -math.inf).sum() == 4
        assert mine.sort(descending=True).values[:4].tolist() == (
            all_of_them.sort(descending=True).values[:4].tolist()
        )


def test_of_equal_boxes_with_equal_scores_the_first_keeps_its_own() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(3, 1)
    scores, groups = torch.tensor([0.5, 0.5, 0.5]), torch.zeros(3, dtype=torch.long)
    # They overlap by 1: linear leaves 1 - 1 of the others, Gaussian exp(-1 / 0.5), then its square.
    assert soft_nms(boxes, scores, groups, 1, "linear", 0.5, 0.5, 9).tolist() == [0.5, 0.0, 0.0]
    found = soft_nms(boxes, scores, groups, 1, "gaussian", 0.5, 0.5, 9)
    assert found.tolist() == pytest.approx([0.5, 0.5 * math.exp(-2), 0.5 * math.exp(-4)])


def test_an_overlap_of_exactly_the_threshold_counts() -> None:
    # 10 x 10 and its half: IoU 0.5.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 5.0, 10.0]])
    scores, groups = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.long)
    found = soft_nms(boxes, scores, groups, 1, "linear", 0.5, 0.5, 9)
    assert found.tolist() == pytest.approx([0.9, 0.4])
    assert soft_nms(boxes, scores, groups, 1, "linear", 0.51, 0.5, 9).tolist() == scores.tolist()


def test_no_boxes_and_none_that_counts() -> None:
    nothing = torch.zeros(0)
    assert soft_nms(
        nothing.view(0, 4), nothing, nothing.long(), 3, "linear", 0.5, 0.5, 9
    ).shape == (0,)
    out = torch.full((2,), -math.inf)
    found = soft_nms(
        torch.zeros(2, 4), out, torch.zeros(2, dtype=torch.long), 3, "linear", 0.5, 0.5, 9
    )
    assert found.tolist() == [-math.inf, -math.inf]


def test_what_hard_nms_keeps_has_its_score_still() -> None:
    boxes, scores, groups = crowd(150, seed=2)
    kept = grouped_nms(boxes, scores, groups, 7, 0.4)
    found = soft_nms(boxes, scores, groups, 7, "linear", 0.4, 0.5, 150)
    best = torch.stack([scores[groups == g].max() for g in range(7)])
    assert torch.equal(torch.stack([found[groups == g].max() for g in range(7)]), best)
    assert (found[~kept] < scores[~kept]).all()
