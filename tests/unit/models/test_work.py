"""Multiply-adds of one forward pass, counted on the meta device, against published ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigdet.config.model import ModelConfig
from bigdet.models.build import build_detector


def build(**options: Any) -> Any:
    with torch.device("meta"):
        return build_detector(ModelConfig(**options), 80).eval()


def gmac(work: Callable[[], Any]) -> float:
    """Billions of multiply-adds; torch counts two operations for each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops() / 2e9


def dense_parts(model: Any, height: int, width: int) -> list[float]:
    """Backbone, FPN and RPN head on one image."""
    images = torch.empty(1, 3, height, width, device="meta")
    features = model.backbone(images)
    levels = model.fpn(features)
    return [
        gmac(lambda: model.backbone(images)),
        gmac(lambda: model.fpn(features)),
        gmac(lambda: model.rpn(levels, model.strides, (height, width))),
    ]


def head_parts(model: Any, num_boxes: int, num_masks: int) -> list[float]:
    boxes = torch.empty(num_boxes, 256, 7, 7, device="meta")
    masks = torch.empty(num_masks, 256, 14, 14, device="meta")
    labels = torch.zeros(num_masks, dtype=torch.int64, device="meta")
    return [gmac(lambda: model.box_head(boxes)), gmac(lambda: model.mask_head(masks, labels))]


def test_mask_rcnn_r50_at_1280_by_800_is_as_much_work_as_published() -> None:
    model = build(detector="mask_rcnn", backbone="resnet50")
    total = sum(dense_parts(model, 800, 1280)) + sum(head_parts(model, 1000, 100))
    # Published: 259. Ours computes the mask logits of one class and not of 80: 100 regions
    # x 28 x 28 x 256 x 79 = 1.6 less.
    assert total == pytest.approx(259, rel=0.01)
    assert total + 1.6 == pytest.approx(259, rel=0.005)


@pytest.mark.parametrize(
    ("backbone", "size", "expected"),
    [
        ("resnet50", (800, 1344), [87.6, 60.9, 53.1]),  # backbone, FPN, RPN
        ("resnet101", (800, 1344), [167.1, 60.9, 53.1]),
        ("resnext101_32x8d", (800, 1344), [351.7, 60.9, 53.1]),
        ("resnext152_32x8d", (800, 1344), [522.5, 60.9, 53.1]),
        ("resnet50", (448, 448), [16.3, 11.4, 9.9]),
        (
            "resnet50",
            (800, 800),
            [52.1, 36.2, 31.6],
        ),  # together detectron2's 119.9 with the step in 3x3
    ],
)
def test_the_dense_parts_are_as_much_work_as_published(
    backbone: str, size: tuple[int, int], expected: list[float]
) -> None:
    model = build(detector="faster_rcnn", backbone=backbone)
    assert dense_parts(model, *size) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("box_head", "expected"), [("2fc", 7.3), ("4conv1fc", 66.0)])
def test_heads_are_as_much_work_as_published(box_head: str, expected: float) -> None:
    model = build(detector="mask_rcnn", backbone="resnet10", box_head=box_head)
    box, mask = head_parts(model, 512, 128)
    assert box == pytest.approx(expected, rel=0.01)
    # 128 regions x 28 x 28 x 256 x 79 of the other classes = 2.03.
    assert mask + 2.03 == pytest.approx(67.8, rel=0.005)


def test_swin_t_is_as_much_work_as_its_readme_says() -> None:
    model = build(detector="mask_rcnn", backbone="swin_t", norm="none")
    total = sum(dense_parts(model, 800, 1280)) + sum(head_parts(model, 1000, 100))
    # 267, without what its counter leaves out: attention within windows, and the padding of C3 to
    # C5 to whole windows.
    assert total == pytest.approx(267, rel=0.04)
