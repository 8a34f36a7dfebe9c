"""Which object each anchor or region belongs to, and which of them are trained on.

Letters: B images, A anchors or regions of one image, G objects of one image (padded), M objects of
all images, S sample slots of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdet.ops.boxes import box_areas, pairwise_intersections, pairwise_iou
from bigdet.ops.devices import is_gpu
from bigdet.structures import Targets

# Overlaps computed at once; a crowded image (300 objects, 268,569 anchors) has 80 million, and
# several temporaries of each. On a GPU 64 MB of fp32; on a CPU what its cache holds, which is four
# times as fast.
CHUNK, CPU_CHUNK = 2**24, 2**20

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Objects:
    """The objects of a group of images, padded to the largest number in one image.

    Attributes:
        boxes: ``(B, G, 4)``; 0 in empty slots.
        labels: ``(B, G)`` int64.
        rows: ``(B, G)`` int64, place in the flat targets.
        is_object: ``(B, G)`` bool: neither empty nor a crowd.
        is_crowd: ``(B, G)`` bool.
    """

    boxes: Tensor
    labels: Tensor
    rows: Tensor
    is_object: Tensor
    is_crowd: Tensor


def pad_objects(targets: Targets, dtype: torch.dtype) -> Objects:
    """Arrange flat targets by image; G is at least 1.

    Args:
        targets: M objects of B images.
        dtype: type of the boxes.
    """
    counts = targets.offsets.diff()
    most = int(counts.max()) if targets.most is None else targets.most
    num_objects = max(most, 1)
    slots = torch.arange(num_objects, device=counts.device)
    is_filled = slots < counts[:, None]  # (B, G)
    rows = torch.where(is_filled, targets.offsets[:-1, None] + slots, 0)
    # One empty object more, so that there is something to read when there are none at all.
    boxes = torch.nn.functional.pad(targets.boxes.to(dtype), (0, 0, 0, 1))[rows]
    labels = torch.nn.functional.pad(targets.labels, (0, 1))[rows]
    crowd = torch.nn.functional.pad(targets.is_crowd, (0, 1))[rows]
    return Objects(
        boxes=torch.where(is_filled[..., None], boxes, 0),
        labels=torch.where(is_filled, labels, 0),
        rows=rows,
        is_object=is_filled & ~crowd,
        is_crowd=is_filled & crowd,
    )


def match(
    objects: Objects,
    boxes: Tensor,
    keep_best: bool,
    lowest_iou: float = 0.0,
    is_usable: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the object that each box overlaps most.

    Args:
        objects: of B images.
        boxes: ``(A, 4)`` for all images or ``(B, A, 4)``.
        keep_best: also find the boxes that overlap some object more than every other box does,
            ties included, so that every object has one (two passes).
        lowest_iou: a box that overlaps its object by less than this is not its best.
        is_usable: ``(B, A)`` bool, the boxes that may be an object's best. None: all.

    Returns:
        ``(B, A)`` IoU with the best object (0 without any), ``(B, A)`` int64 its slot, and
        ``(B, A)`` bool, whether the box is some object's best.
    """
    chunks = torch.split(boxes, _chunk_size(objects.is_object), dim=-2)
    overlaps = [_overlaps(objects, chunk) for chunk in chunks] if len(chunks) == 1 else None
    masks = None if is_usable is None else torch.split(is_usable[:, None], chunks[0].shape[-2], -1)

    def usable(iou: Tensor, position: int) -> Tensor:
        return iou if masks is None else iou * masks[position]

    best, slots, tops = [], [], []
    for position, chunk in enumerate(chunks):
        iou = overlaps[position] if overlaps else _overlaps(objects, chunk)
        value, slot = iou.max(dim=1)
        best.append(value)
        slots.append(slot)
        if keep_best:
            tops.append(usable(iou, position).amax(dim=2))
    value, slot = torch.cat(best, dim=1), torch.cat(slots, dim=1)
    if not keep_best:
        return value, slot, torch.zeros_like(value, dtype=torch.bool)
    top = torch.stack(tops).amax(dim=0)  # (B, G)
    is_enough = (top > 0) & (top >= lowest_iou)
    top = torch.where(is_enough, top, 2.0).unsqueeze(2)  # no box's IoU is 2
    is_top = [
        (
            usable(overlaps[position] if overlaps else _overlaps(objects, chunk), position) == top
        ).any(dim=1)
        for position, chunk in enumerate(chunks)
    ]
    return value, slot, torch.cat(is_top, dim=1)


def _chunk_size(slots: Tensor) -> int:
    """Give how many boxes are compared at once with the objects of ``(B, G)`` slots."""
    return max((CHUNK if is_gpu(slots.device) else CPU_CHUNK) // slots.numel(), 1)


def _overlaps(objects: Objects, boxes: Tensor) -> Tensor:
    """Give the IoU ``(B, G, A)`` of objects and boxes; crowds and empty slots have 0."""
    return pairwise_iou(objects.boxes, boxes).mul_(objects.is_object[..., None])


def crowd_parts(objects: Objects, boxes: Tensor) -> Tensor:
    """Give the largest part of each box's area that lies in one crowd.

    Args:
        objects: of B images.
        boxes: ``(B, A, 4)``.

    Returns:
        ``(B, A)`` in [0, 1].
    """
    parts = []
    for chunk in torch.split(boxes, _chunk_size(objects.is_crowd), dim=1):
        shared = pairwise_intersections(objects.boxes, chunk).mul_(objects.is_crowd[..., None])
        parts.append(shared.amax(dim=1) / box_areas(chunk).clamp(min=1e-6))
    return torch.cat(parts, dim=1)


def label_anchors(
    iou: Tensor, is_best: Tensor, negative_iou: float = 0.3, positive_iou: float = 0.7
) -> Tensor:
    """Label anchors: positive from an IoU on or as an object's best, negative below another.

    Args:
        iou: ``(B, A)`` with the best object.
        is_best: ``(B, A)`` bool, the anchor is some object's best.
        negative_iou: in [0, 1]; by default the RPN's.
        positive_iou: in [0, 1].

    Returns:
        ``(B, A)`` int8: POSITIVE, NEGATIVE or IGNORED.
    """
    labels = torch.full_like(iou, IGNORED, dtype=torch.int8)
    labels.masked_fill_(iou < negative_iou, NEGATIVE)
    return labels.masked_fill_((iou >= positive_iou) | is_best, POSITIVE)


@dataclass(frozen=True)
class Sample:
    """Anchors or regions drawn for the loss.

    Attributes:
        index: ``(B, S)`` int64, which of the A.
        is_valid: ``(B, S)`` bool; False in empty slots.
        is_positive: ``(B, S)`` bool.
    """

    index: Tensor
    is_valid: Tensor
    is_positive: Tensor


def draw_sample(labels: Tensor, num_slots: int, positive_fraction: float) -> Sample:
    """Draw a fixed number of slots per image at random; positives come first.

    At most ``positive_fraction`` of the slots take positives, negatives fill the rest, and slots
    stay empty where both run out. Random numbers come from torch's generator of the device.

    Args:
        labels: ``(B, A)`` POSITIVE, NEGATIVE or IGNORED.
        num_slots: S, or A where that is less.
        positive_fraction: in [0, 1].
    """
    most_positives = min(int(num_slots * positive_fraction), labels.shape[1])
    num_slots = min(num_slots, labels.shape[1])
    # Keys in [1, 2) for candidates, 0 for others: the largest are a random choice of candidates.
    keys = torch.rand(labels.shape, device=labels.device) + 1
    positive_keys, positives = (keys * (labels == POSITIVE)).topk(most_positives, dim=1)
    negative_keys, negatives = (keys * (labels == NEGATIVE)).topk(num_slots, dim=1)
    has_positive, has_negative = positive_keys > 0, negative_keys > 0
    # Candidates in order of preference; the first S that exist are taken.
    index = torch.cat([positives, negatives], dim=1)
    exists = torch.cat([has_positive, has_negative], dim=1)
    order = torch.argsort(exists, dim=1, descending=True, stable=True)[:, :num_slots]
    return Sample(
        index=index.gather(1, order),
        is_valid=exists.gather(1, order),
        is_positive=exists.gather(1, order) & (order < most_positives),
    )
