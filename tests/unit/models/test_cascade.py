from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdet.config.heads import CascadeConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.assign import Objects, pad_objects
from bigdet.models.build import build_detector
from bigdet.models.conventions import Conventions
from bigdet.models.heads.box import BoxHead, Regions
from bigdet.models.heads.cascade import CascadeHead, spread_over_stages
from bigdet.models.heads.rpn import Proposals
from bigdet.models.weights import load_parts
from bigdet.structures import Targets

K = 2
A = [0.0, 0.0, 10.0, 10.0]  # the object, of class 1
P, Q = [0.0, 0.0, 5.5, 10.0], [0.0, 0.0, 6.5, 10.0]  # IoU 0.55 and 0.65 with it
SIZES = torch.tensor([[64, 64]])
ONE = torch.ones(1)


def cascade_of(
    gradients: str = "detectron2", is_class_agnostic: bool = True, **config: Any
) -> CascadeHead:
    torch.manual_seed(0)
    own = {"class_agnostic": is_class_agnostic, "rois_per_image": 8, "positive_fraction": 1.0}
    roi = RoiConfig(**own | config)
    model = ModelConfig(detector="cascade_rcnn", backbone="resnet18", fc_width=8, roi=roi)
    make_head = partial(BoxHead, model, "none", 4, K, Conventions())
    return CascadeHead(make_head, CascadeConfig(gradients=gradients))


def answer(head: CascadeHead, stage: int, deltas: Tensor, logits: Tensor | None = None) -> None:
    """Let a stage say the same for every region: deltas ``(D, 4)``, logits ``(K + 1,)``."""
    logits = torch.zeros(K + 1) if logits is None else logits

    def forward(pooled: Tensor) -> tuple[Tensor, Tensor]:
        return logits.expand(len(pooled), -1), deltas.expand(len(pooled), -1, -1)

    head.stages[stage].forward = forward


def silent(head: CascadeHead) -> CascadeHead:
    for stage in range(3):
        answer(head, stage, torch.zeros(1, 4))
    return head


def pool(boxes: Tensor) -> Tensor:
    return torch.zeros(boxes.shape[0] * boxes.shape[1], 4, 7, 7)


def proposals_of(boxes: list[list[float]]) -> Proposals:
    return Proposals(torch.tensor([boxes]), torch.ones(1, len(boxes), dtype=torch.bool))


def objects_of(boxes: list[list[float]]) -> Objects:
    targets = Targets(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.ones(len(boxes), dtype=torch.int64),
        is_crowd=torch.zeros(len(boxes), dtype=torch.bool),
        offsets=torch.tensor([0, len(boxes)]),
    )
    return pad_objects(targets, torch.float32)


def regions_of_stages(head: CascadeHead, monkeypatch: pytest.MonkeyPatch) -> list[Regions]:
    """The regions that each stage was trained on, filled in as it runs."""
    seen = []
    original = BoxHead.losses

    def losses(stage: BoxHead, logits: Tensor, deltas: Tensor, regions: Regions):
        seen.append(regions)
        return original(stage, logits, deltas, regions)

    monkeypatch.setattr(BoxHead, "losses", losses)
    return seen


@pytest.mark.parametrize(
    ("gradients", "weights"), [("detectron2", [1, 1, 1]), ("mmdet", [1, 0.5, 0.25])]
)
def test_losses_of_silent_stages_are_worked_out_by_hand(
    gradients: str, weights: list[float]
) -> None:
    # Three regions: the object's own box, P and Q. The object is 10 wide with its center at 5:
    #   from P, 5.5 wide at 2.75: dx = 2.25 / 5.5 = 0.409091, dw = log(10 / 5.5) = 0.597837
    #   from Q, 6.5 wide at 3.25: dx = 1.75 / 6.5 = 0.269231, dw = log(10 / 6.5) = 0.430783
    # Stage 1 (IoU 0.5; weights 10 and 5): P 4.09091 + 2.989185, Q 2.69231 + 2.153915
    # Stage 2 (0.6; 20 and 10): Q alone, 5.384615 + 4.307829. Stage 3 (0.7): the own box alone, 0.
    losses, _ = silent(cascade_of(gradients)).train_on(
        pool, proposals_of([P, Q]), objects_of([A]), ONE, SIZES
    )
    expected = [11.926317 / 3, 9.692444 / 3, 0.0]
    for number, (weight, box_loss) in enumerate(zip(weights, expected, strict=True), start=1):
        assert losses[f"stage{number}_box_class"].item() == pytest.approx(weight * math.log(3))
        assert losses[f"stage{number}_box_delta"].item() == pytest.approx(weight * box_loss)
    assert len(losses) == 6


def test_each_stage_works_on_the_boxes_of_the_one_before_in_its_own_units() -> None:
    # dx = 1, 2, 3 with the weights 10, 20, 30 is a tenth of the width each: one pixel.
    head = cascade_of(score_threshold=0.01)
    scores = [[0.9, 0.05], [0.6, 0.1], [0.3, 0.3]]  # means: 0.6 and 0.15
    for number, row in enumerate(scores):
        logits = torch.tensor([*row, 1 - sum(row)]).log()
        answer(head, number, torch.tensor([[number + 1.0, 0.0, 0.0, 0.0]]), logits)
    pooled = []

    def recording(boxes: Tensor) -> Tensor:
        pooled.append(boxes[0, 0].tolist())
        return pool(boxes)

    found = head.find(recording, proposals_of([A]), SIZES)
    seen = [[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [2.0, 0.0, 12.0, 10.0]]
    torch.testing.assert_close(pooled, seen)
    torch.testing.assert_close(found.boxes, torch.tensor([[3.0, 0.0, 13.0, 10.0]] * 2))
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.15]))
    assert found.labels.tolist() == [0, 1]


def test_detectron2_keeps_all_regions_and_mmdet_adds_the_objects_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Stage 1 moves all to the right by a tenth of their width, the object's own box to IoU 9 / 11.
    moved = {(1.0, 0.0, 11.0, 10.0), (0.55, 0.0, 6.05, 10.0), (0.65, 0.0, 7.15, 10.0)}
    for gradients, expected in (
        ("detectron2", moved),
        ("mmdet", (moved - {(1.0, 0.0, 11.0, 10.0)}) | {tuple(A)}),
    ):
        head = silent(cascade_of(gradients))
        answer(head, 0, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        with monkeypatch.context() as patch:
            seen = regions_of_stages(head, patch)
            head.train_on(pool, proposals_of([P, Q]), objects_of([A]), ONE, SIZES)
        boxes = seen[1].boxes[seen[1].is_valid]
        assert {tuple(round(edge, 4) for edge in box) for box in boxes.tolist()} == expected
        assert len(boxes) == 3


def test_later_stages_ask_for_more_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    head = silent(cascade_of())
    seen = regions_of_stages(head, monkeypatch)
    _, last = head.train_on(pool, proposals_of([P, Q]), objects_of([A]), ONE, SIZES)
    assert [regions.is_positive.sum().item() for regions in seen] == [3, 2, 1]
    assert [(regions.labels == 1).sum().item() for regions in seen] == [3, 2, 1]
    assert last.boxes[last.is_positive].tolist() == [A]


def test_a_third_of_the_gradient_reaches_the_features_and_all_of_it_the_heads() -> None:
    gradients = {}
    for kind in ("detectron2", "mmdet"):
        head = cascade_of(kind)
        features = torch.randn(8, 4, 7, 7, generator=torch.Generator().manual_seed(1))
        features.requires_grad_()
        losses, _ = head.train_on(
            lambda boxes, features=features: 1.0 * features[: boxes.shape[1]],
            proposals_of([P, Q]),
            objects_of([A]),
            ONE,
            SIZES,
        )
        losses["stage1_box_class"].backward()
        gradients[kind] = (features.grad, head.stages[0].classifier.weight.grad)
    (scaled, own), (whole, other) = gradients["detectron2"], gradients["mmdet"]
    assert whole.abs().max() > 0
    torch.testing.assert_close(scaled, whole / 3)
    torch.testing.assert_close(own, other)


def test_further_heads_get_at_most_a_samples_worth_of_positives() -> None:
    # All 8 regions become positive; a sample may have a quarter of 8.
    head = silent(cascade_of(positive_fraction=0.25, rois_per_image=8))
    proposals = proposals_of([[0.0, 0.0, 10.0, 9.0 + step / 10] for step in range(8)])
    losses, regions = head.train_on(pool, proposals, objects_of([A]), ONE, SIZES)
    assert regions.is_positive.sum() == 2
    assert all(loss.isfinite() for loss in losses.values())


def test_regions_that_lose_their_area_or_are_no_numbers_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for delta in (-1e4, math.nan, math.inf):  # out of the image to the left, or nowhere
        head = silent(cascade_of())
        answer(head, 0, torch.tensor([[delta, 0.0, 0.0, 0.0]]))
        with monkeypatch.context() as patch:
            seen = regions_of_stages(head, patch)
            losses, _ = head.train_on(pool, proposals_of([P]), objects_of([A]), ONE, SIZES)
        assert not seen[1].is_valid.any()
        assert losses["stage2_box_class"] == losses["stage3_box_delta"] == 0
        found = head.find(pool, proposals_of([P]), SIZES)
        assert len(found.boxes) == 0


@pytest.mark.parametrize("gradients", ["detectron2", "mmdet"])
def test_without_objects_all_box_losses_are_zero(gradients: str) -> None:
    head = cascade_of(gradients)
    losses, regions = head.train_on(pool, proposals_of([P, Q]), objects_of([]), ONE, SIZES)
    assert not regions.is_positive.any()
    for number in (1, 2, 3):
        assert losses[f"stage{number}_box_delta"] == 0
        assert losses[f"stage{number}_box_class"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_class_specific_stages_follow_their_best_class() -> None:
    head = cascade_of(is_class_agnostic=False)
    deltas = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0]])  # 1 and 2 pixels
    logits = torch.tensor([0.0, 1.0, 5.0])  # class 1; the background is none
    boxes = torch.tensor([[A]])
    refined = head.stages[0].refine(logits[None], deltas[None], boxes, SIZES)
    torch.testing.assert_close(refined.boxes, torch.tensor([[[2.0, 0.0, 12.0, 10.0]]]))


def config_of(detector: str, is_class_agnostic: bool | None) -> ModelConfig:
    return ModelConfig(
        detector=detector,
        backbone="resnet10",
        width=8,
        fc_width=16,
        box_head="4conv1fc",
        rpn=RpnConfig(train_proposals=20),
        roi=RoiConfig(class_agnostic=is_class_agnostic),
    )


@pytest.mark.parametrize("is_class_agnostic", [False, True])
def test_a_plain_box_head_becomes_every_stage_of_a_cascade(is_class_agnostic: bool) -> None:
    plain = build_detector(config_of("mask_rcnn", is_class_agnostic), K)
    cascade = build_detector(config_of("cascade_mask_rcnn", is_class_agnostic), K)
    tensors = spread_over_stages(plain.state_dict())
    parts = ["backbone", "fpn", "rpn", "box_head", "mask_head"]
    rows = load_parts(cascade, tensors, parts, "here")
    assert rows[3].parameters == 3 * sum(p.numel() for p in plain.box_head.parameters())
    pooled = torch.randn(5, 8, 7, 7)
    expected = plain.box_head(pooled)
    for stage in cascade.box_head.stages:
        torch.testing.assert_close(stage(pooled), expected, rtol=0, atol=0)
    assert spread_over_stages(cascade.state_dict()).keys() == cascade.state_dict().keys()


def test_agnostic_stages_do_not_take_a_class_specific_head() -> None:
    plain = build_detector(config_of("mask_rcnn", None), K)
    cascade = build_detector(config_of("cascade_mask_rcnn", None), K)
    with pytest.raises(ValueError, match=r"of another shape \(box_head.stages.0.regressor.bias"):
        load_parts(cascade, spread_over_stages(plain.state_dict()), ["box_head"], "here")
