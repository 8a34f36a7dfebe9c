"""What detectron2 computes in Mask R-CNN R-50, by its own names and formulas, from its code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from tests.unit.weights import published_layouts as published


def run(state: dict[str, Tensor], name: str, x: Tensor, **options: object) -> Tensor:
    """A convolution of detectron2 with its frozen normalization, if it has one."""
    x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)
    if f"{name}.norm.weight" not in state:
        return x
    parts = (
        state[f"{name}.norm.{kind}"][:, None, None]
        for kind in ("weight", "bias", "running_mean", "running_var")
    )
    scale, shift, mean, variance = parts
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def detectron2_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """P2 to P5 of an R-50 with stride in the 1x1 convolutions, by detectron2's names."""
    body = "backbone.bottom_up."
    x = F.relu(run(state, f"{body}stem.conv1", x, stride=2, padding=3))
    x = F.max_pool2d(x, 3, 2, 1)
    levels = []
    for stage, count in enumerate(published.DEPTHS[50], start=2):
        for block in range(count):
            name = f"{body}res{stage}.{block}"
            stride = 2 if block == 0 and stage > 2 else 1
            y = F.relu(run(state, f"{name}.conv1", x, stride=stride))
            y = F.relu(run(state, f"{name}.conv2", y, padding=1))
            y = run(state, f"{name}.conv3", y)
            x = F.relu(y + (run(state, f"{name}.shortcut", x, stride=stride) if block == 0 else x))
        levels.append(x)
    merged, pyramid = None, []
    for level in (5, 4, 3, 2):
        lateral = run(state, f"backbone.fpn_lateral{level}", levels[level - 2])
        merged = lateral if merged is None else lateral + F.interpolate(merged, scale_factor=2)
        pyramid.insert(0, run(state, f"backbone.fpn_output{level}", merged, padding=1))
    return pyramid


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def decoded(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """detectron2's Box2BoxTransform.apply_deltas."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    centers = boxes[:, :2] + 0.5 * sizes
    dx, dy, dw, dh = (deltas / deltas.new_tensor(weights)).unbind(1)
    centers = centers + torch.stack([dx, dy], dim=1) * sizes
    sizes = torch.stack([dw, dh], dim=1).clamp(max=math.log(1000 / 16)).exp() * sizes
    return torch.cat([centers - 0.5 * sizes, centers + 0.5 * sizes], dim=1)


def clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def detectron2_pooled(
    pyramid: list[Tensor], boxes: Tensor, size: int, sampling_ratio: int = 0
) -> Tensor:
    """Its ROIPooler with ROIAlignV2; its own sampling ratio is 0, as many points as are needed."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    levels = (4 + torch.log2(areas.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).int() - 2
    pooled = boxes.new_zeros(len(boxes), pyramid[0].shape[1], size, size)
    for level in range(4):
        rows = torch.where(levels == level)[0]
        pooled[rows] = torchvision.ops.roi_align(
            pyramid[level], [boxes[rows]], size, 0.25 / 2**level, sampling_ratio, aligned=True
        )
    return pooled


def detectron2_proposals(state: dict[str, Tensor], pyramid: list[Tensor]) -> Tensor:
    """Its RPN: anchors, the best 40 of each level, NMS within a level, the best 30 of all."""
    name, found = "proposal_generator.rpn_head.", []
    levels = [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]
    for number, features in enumerate(levels):
        hidden = F.relu(run(state, f"{name}conv", features, padding=1))
        logits = run(state, f"{name}objectness_logits", hidden).permute(0, 2, 3, 1).flatten()
        deltas = run(state, f"{name}anchor_deltas", hidden).permute(0, 2, 3, 1).reshape(-1, 4)
        rows, columns = torch.meshgrid(
            *(4 * 2**number * torch.arange(side).double() for side in features.shape[2:]),
            indexing="ij",
        )
        shifts = torch.stack([columns, rows, columns, rows], dim=-1).view(-1, 1, 4)
        area, cells = (32.0 * 2**number) ** 2, []
        for ratio in (0.5, 1.0, 2.0):
            w = math.sqrt(area / ratio)
            cells.append([-w / 2, -ratio * w / 2, w / 2, ratio * w / 2])
        anchors = (shifts + shifts.new_tensor(cells)).view(-1, 4)
        best = logits.topk(min(40, len(logits))).indices
        boxes = clipped(decoded(deltas[best], anchors[best], (1, 1, 1, 1)), 64, 96)
        found.append((boxes, logits[best], torch.full((len(best),), number)))
    boxes, scores, groups = map(torch.cat, zip(*found, strict=True))
    full = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, groups = boxes[full], scores[full], groups[full]
    return boxes[torchvision.ops.batched_nms(boxes, scores, groups, 0.7)[:30]]
