from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from bigdet.models import assign
from bigdet.models.assign import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    crowd_parts,
    draw_sample,
    label_anchors,
    match,
    pad_objects,
)
from bigdet.structures import Targets


def targets_of(boxes: list[list[list[float]]], crowds: list[list[bool]] | None = None) -> Targets:
    """Targets of images; labels count up over all."""
    flat = [box for image in boxes for box in image]
    crowd = [
        flag for image in crowds or [[False] * len(image) for image in boxes] for flag in image
    ]
    return Targets(
        boxes=torch.tensor(flat).view(-1, 4),
        labels=torch.arange(len(flat)),
        is_crowd=torch.tensor(crowd, dtype=torch.bool),
        offsets=torch.tensor([0] + [len(image) for image in boxes]).cumsum(0),
    )


A, B, C = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 40.0, 20.0], [5.0, 5.0, 9.0, 9.0]


def test_padding_lays_objects_out_by_image() -> None:
    objects = pad_objects(targets_of([[A], [], [B, C]]), torch.float64)
    zero = [0.0] * 4
    assert objects.boxes.tolist() == [[A, zero], [zero, zero], [B, C]]
    assert objects.boxes.dtype == torch.float64
    assert objects.is_object.tolist() == [[True, False], [False, False], [True, True]]
    assert objects.rows[2].tolist() == [1, 2]
    assert objects.labels[2].tolist() == [1, 2]


def test_padding_tells_crowds_from_objects() -> None:
    objects = pad_objects(targets_of([[A, B]], [[True, False]]), torch.float32)
    assert objects.is_object.tolist() == [[False, True]]
    assert objects.is_crowd.tolist() == [[True, False]]


def test_padding_without_any_object_has_one_empty_slot() -> None:
    objects = pad_objects(targets_of([[], []]), torch.float32)
    assert objects.boxes.shape == (2, 1, 4)
    assert not objects.is_object.any()


def test_match_finds_the_object_of_largest_overlap() -> None:
    objects = pad_objects(targets_of([[A, B]]), torch.float32)
    # Half of A: 50 / 100. Half of B: 200 / 400. Nothing.
    boxes = torch.tensor([[0.0, 0.0, 5.0, 10.0], [20.0, 0.0, 30.0, 20.0], [50.0, 50.0, 60.0, 60.0]])
    iou, slots, is_best = match(objects, boxes, keep_best=True)
    torch.testing.assert_close(iou, torch.tensor([[0.5, 0.5, 0.0]]))
    assert slots[0, :2].tolist() == [0, 1]
    assert is_best.tolist() == [[True, True, False]]


def test_match_gives_an_object_all_its_equally_good_anchors() -> None:
    objects = pad_objects(targets_of([[A]]), torch.float32)
    boxes = torch.tensor([[0.0, 0.0, 5.0, 10.0], [5.0, 0.0, 10.0, 10.0], [0.0, 0.0, 2.0, 10.0]])
    assert match(objects, boxes, keep_best=True)[2].tolist() == [[True, True, False]]


def test_match_never_takes_a_crowd_or_an_empty_slot() -> None:
    objects = pad_objects(targets_of([[A], [B, B]], [[True], [False, False]]), torch.float32)
    iou, _, is_best = match(objects, torch.tensor([A, [0.0, 0.0, 0.0, 0.0]]), keep_best=True)
    assert not iou[0].any()
    assert not is_best[0].any()


def test_an_object_that_no_anchor_touches_makes_none_positive() -> None:
    objects = pad_objects(targets_of([[[100.0, 100.0, 110.0, 110.0]]]), torch.float32)
    assert not match(objects, torch.tensor([A, B]), keep_best=True)[2].any()


def test_match_in_chunks_equals_match_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def boxes_of(*shape: int) -> Tensor:
        corners = torch.rand(*shape, 2, generator=generator) * 60
        return torch.cat([corners, corners + 20], dim=-1)

    objects = pad_objects(targets_of(boxes_of(2, 7).tolist()), torch.float32)
    anchors, regions = boxes_of(101), boxes_of(2, 53)
    whole = [match(objects, boxes, keep_best=True) for boxes in (anchors, regions)]
    parts = crowd_parts(objects, regions)
    monkeypatch.setattr(assign, "CPU_CHUNK", 2 * 7 * 10)
    split = [match(objects, boxes, keep_best=True) for boxes in (anchors, regions)]
    for one, other in zip(whole, split, strict=True):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first, second)
    assert torch.equal(crowd_parts(objects, regions), parts)


def test_labels_of_anchors_equal_torchvisions_matcher() -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(400, 2, generator=generator) * 80
    anchors = torch.cat([corners, corners + 10 + 30 * torch.rand(400, 2, generator=generator)], 1)
    boxes = [[10.0, 10.0, 40.0, 40.0], [50.0, 20.0, 90.0, 50.0], [0.0, 60.0, 25.0, 80.0]]
    iou, slots, is_best = match(pad_objects(targets_of([boxes]), torch.float32), anchors, True)
    labels = label_anchors(iou, is_best)[0]
    expected = Matcher(0.7, 0.3, allow_low_quality_matches=True)(
        box_iou(torch.tensor(boxes), anchors)
    )
    assert torch.equal(labels == POSITIVE, expected >= 0)
    assert torch.equal(labels == NEGATIVE, expected == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(labels == IGNORED, expected == Matcher.BETWEEN_THRESHOLDS)
    assert torch.equal(slots[0][expected >= 0], expected[expected >= 0])
    assert min((labels == kind).sum() for kind in (POSITIVE, NEGATIVE, IGNORED)) > 0


def test_labels_of_anchors_follow_the_reference_table() -> None:
    # detectron2's test of its matcher: columns are anchors. The first and third are no object's
    # best and lie between or below the thresholds; the fourth is between, but object 1's best.
    table = torch.tensor([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]])
    is_best = (table == table.amax(dim=1, keepdim=True)).any(dim=0)
    labels = label_anchors(table.amax(dim=0)[None], is_best[None])
    assert labels.tolist() == [[IGNORED, POSITIVE, NEGATIVE, POSITIVE]]


def test_crowd_part_is_the_intersection_over_the_own_area() -> None:
    objects = pad_objects(targets_of([[A, B]], [[True, False]]), torch.float32)
    # 4 x 4 wholly in the crowd A; half of 10 x 10 in it; all of B, which is no crowd.
    boxes = torch.tensor([[C, [5.0, 0.0, 15.0, 10.0], B]])
    torch.testing.assert_close(crowd_parts(objects, boxes), torch.tensor([[1.0, 0.5, 0.0]]))


def counts(labels: Tensor, slots: int, fraction: float) -> tuple[int, int]:
    sample = draw_sample(labels, slots, fraction)
    positives = sample.is_positive.sum().item()
    taken = labels.gather(1, sample.index)
    assert (taken[sample.is_positive] == POSITIVE).all()
    assert (taken[sample.is_valid & ~sample.is_positive] == NEGATIVE).all()
    chosen = sample.index[sample.is_valid]
    assert len(chosen.unique()) == len(chosen)
    return positives, sample.is_valid.sum().item() - positives


def test_a_sample_has_at_most_its_part_of_positives() -> None:
    # 4 slots, a quarter positive, of 6 negatives and 3 positives.
    labels = torch.tensor([[0, 1, 0, 0, 1, 0, 1, 0, 0]], dtype=torch.int8)
    assert counts(labels, 4, 0.25) == (1, 3)


def test_negatives_fill_the_slots_that_positives_leave() -> None:
    labels = torch.tensor([[0, 1, 0, 0, 0, 0, -1, 0, 0]], dtype=torch.int8)
    assert counts(labels, 6, 0.5) == (1, 5)


def test_slots_stay_empty_where_candidates_run_out() -> None:
    labels = torch.tensor([[0, -1, -1, -1, 1, -1]], dtype=torch.int8)
    sample = draw_sample(labels, 5, 0.5)
    assert sample.index.shape == (1, 5)
    assert sample.is_valid.tolist() == [[True, True, False, False, False]]
    assert sample.is_positive.tolist() == [[True, False, False, False, False]]
    assert sample.index[0, :2].tolist() == [4, 0]


def test_a_sample_is_a_fair_choice() -> None:
    torch.manual_seed(0)
    labels = torch.zeros(2000, 10, dtype=torch.int8)
    index = draw_sample(labels, 3, 0.5).index
    # Each of 10 is drawn by 3 of 10 rows: 600 +- 20.5 (one deviation of the binomial).
    assert ((index.flatten().bincount(minlength=10) - 600).abs() < 100).all()


def test_a_sample_takes_everything_when_there_are_slots_for_it() -> None:
    labels = torch.tensor([[1, 1, 1, 0, -1]], dtype=torch.int8)
    assert counts(labels, 1000, 0.25) == (3, 1)


@pytest.mark.parametrize("lowest", [0.0, 0.3, 0.55])
def test_an_objects_best_box_counts_from_the_lowest_overlap_on(lowest: float) -> None:
    generator = torch.Generator().manual_seed(5)
    boxes = torch.rand(40, 2, generator=generator) * 100
    boxes = torch.cat([boxes, boxes + 10 + 20 * torch.rand(40, 2, generator=generator)], dim=1)
    anchors = torch.rand(60, 2, generator=generator) * 100
    anchors = torch.cat([anchors, anchors + 25], dim=1)
    objects = pad_objects(targets_of([boxes.tolist()]), torch.float32)
    _, _, is_best = match(objects, anchors, True, lowest)
    iou = box_iou(boxes, anchors)
    expected = torch.zeros(60, dtype=torch.bool)
    for row in iou:  # mmdetection's MaxIoUAssigner: an object's best, from min_pos_iou on
        if row.max() > 0 and row.max() >= lowest:
            expected |= row == row.max()
    assert torch.equal(is_best[0], expected)
    assert 0 < expected.sum() < 40


def test_the_lowest_overlap_by_hand() -> None:
    # The object is 10 x 10; boxes of its size shifted by 4 and by 6: 60 / 140 and 40 / 160.
    near, far = [[4.0, 0.0, 14.0, 10.0]], [[6.0, 0.0, 16.0, 10.0]]
    for boxes, lowest, expected in (
        (near, 0.3, POSITIVE),
        (near, 0.5, IGNORED),
        (far, 0.3, NEGATIVE),
        (far, 0.0, POSITIVE),
    ):
        objects = pad_objects(targets_of([[A]]), torch.float32)
        iou, _, is_best = match(objects, torch.tensor(boxes), True, lowest)
        assert label_anchors(iou, is_best).tolist() == [[expected]], (boxes, lowest)


def test_the_best_box_is_looked_for_among_usable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = pad_objects(targets_of([[A]]), torch.float32)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 7.0]])
    is_usable = torch.tensor([[False, True, True]])
    for chunk in (2**20, 1):  # all at once, and one by one
        monkeypatch.setattr(assign, "CPU_CHUNK", chunk)
        iou, _, is_best = match(objects, boxes, True, 0.0, is_usable)
        assert is_best.tolist() == [[False, True, False]]
        torch.testing.assert_close(iou, torch.tensor([[0.9, 0.8, 0.7]]))  # of all boxes, as ever
