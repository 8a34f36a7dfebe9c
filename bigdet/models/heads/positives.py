"""The regions on objects that a mask or keypoint head is trained on.

Letters: N regions of all images, S sampled regions of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdet.models.heads.box import Regions
from bigdet.ops.devices import is_gpu

BUCKET, CPU_BUCKET = 32, 8
"""On a CPU the time grows with the slots, so a smaller bucket wastes less."""


def pad_to_bucket(count: int, device: torch.device) -> int:
    """Round a number of regions up to a full bucket; none becomes one bucket.

    So memory is allotted in few sizes, and a rank without regions runs the same modules as others.
    """
    bucket = BUCKET if is_gpu(device) else CPU_BUCKET
    return max(-(-count // bucket), 1) * bucket


@dataclass(frozen=True)
class Positives:
    """Some of the sampled regions that lie on objects.

    Attributes:
        boxes: ``(N, 4)``.
        images: ``(N,)`` int64.
        labels: ``(N,)`` int64 in ``0..K-1``.
        object_rows: ``(N,)`` int64, place of the object in the flat targets.
        is_valid: ``(N,)`` bool; False in the slots that fill a bucket.
    """

    boxes: Tensor
    images: Tensor
    labels: Tensor
    object_rows: Tensor
    is_valid: Tensor


@torch.no_grad()
def take_positives(regions: Regions, is_wanted: Tensor, num_classes: int) -> Positives:
    """Take the wanted ones of the regions on objects.

    On a GPU the slots are those for all regions on objects, whose number was asked for before the
    box head; so the host waits for no more than that.

    Args:
        regions: B x S sampled regions.
        is_wanted: ``(B, S)`` bool.
        num_classes: K.
    """
    is_taken = (regions.is_positive & is_wanted).flatten()
    known = regions.num_positives
    count = int(is_taken.sum() if known is None else known.read())
    num_slots = pad_to_bucket(count, is_taken.device)
    chosen = torch.argsort(is_taken, descending=True, stable=True)[:num_slots]
    return Positives(
        boxes=regions.boxes.flatten(0, 1)[chosen],
        images=chosen // regions.boxes.shape[1],
        labels=regions.labels.flatten()[chosen].clamp(max=num_classes - 1),
        object_rows=regions.object_rows.flatten()[chosen],
        is_valid=is_taken[chosen],
    )
