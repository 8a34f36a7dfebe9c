"""Detections of a group of images, and the choice of those that are reported.

Letters: D detections of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bigdet.ops.boxes import clip_boxes
from bigdet.ops.nms import first_of_groups, grouped_nms, soft_nms

MIN_SIDE = 1e-2  # detections of less than this many pixels are dropped


@dataclass(frozen=True)
class FlatDetections:
    """Detections of a group of images.

    Attributes:
        images: ``(D,)`` int64, rising.
        boxes: ``(D, 4)``.
        scores: ``(D,)``, falling within an image.
        labels: ``(D,)`` int64.
        counts: detections of each image. None where the host has to ask the device.
    """

    images: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: list[int] | None = None


class EvalSettings(Protocol):
    """The options that every detector has for its detections.

    Those of bigdet's have ``nms`` (``hard``, ``linear`` or ``gaussian``) and ``nms_sigma`` too.
    """

    @property
    def score_threshold(self) -> float:
        """Detections with a lower score are not reported."""

    @property
    def nms_iou(self) -> float:
        """Detections of one class that overlap a better one by more than this are dropped."""

    @property
    def detections_per_image(self) -> int:
        """At most this many detections are reported per image."""


def _cut(candidates: FlatDetections, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Cut boxes ``(D, 4)`` at their images; also return which still have an area, ``(D,)``."""
    boxes = clip_boxes(candidates.boxes, image_sizes[candidates.images])
    return boxes, boxes.isfinite().all(-1) & (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(-1)


def usable(candidates: FlatDetections, image_sizes: Tensor) -> FlatDetections:
    """Cut boxes at their images; leave out those not finite, below `MIN_SIDE`, or of score -inf."""
    boxes, is_usable = _cut(candidates, image_sizes)
    is_usable &= candidates.scores > -torch.inf
    return FlatDetections(
        candidates.images[is_usable],
        boxes[is_usable],
        candidates.scores[is_usable],
        candidates.labels[is_usable],
    )


@torch.no_grad()
def best_detections(
    candidates: FlatDetections, image_sizes: Tensor, num_classes: int, config: EvalSettings
) -> FlatDetections:
    """Cut boxes at their images, drop near duplicates within a class, keep the best of each image.

    Boxes that are not finite or smaller than `MIN_SIDE` are left out. With soft-NMS the scores of
    near duplicates fall instead, and those that fall to the threshold are left out.

    Args:
        candidates: of B images, in any order; a score of -inf leaves a box out.
        image_sizes: ``(B, 2)`` height, width.
        num_classes: K.
        config: of the detections.
    """
    images, scores, labels = candidates.images, candidates.scores, candidates.labels
    boxes, is_usable = _cut(candidates, image_sizes)
    boxes = torch.where(is_usable[:, None], boxes, 0)
    num_images = len(image_sizes)
    usable_scores = torch.where(is_usable, scores, -torch.inf)
    groups, num_groups = images * num_classes + labels, num_images * num_classes
    settings: Any = config
    kind: Any = getattr(settings, "nms", "hard")  # those of a user's own detector may lack it
    if kind == "hard":
        kept = grouped_nms(boxes, usable_scores, groups, num_groups, config.nms_iou)
    else:
        usable_scores = soft_nms(
            boxes, usable_scores, groups, num_groups, kind, config.nms_iou,
            settings.nms_sigma, config.detections_per_image,
        )  # fmt: skip
        kept = usable_scores > config.score_threshold
    scores = torch.where(kept, usable_scores, -torch.inf)
    rows, is_best = first_of_groups(scores, images, num_images, config.detections_per_image)
    is_best &= scores[rows] > -torch.inf
    counts = torch.zeros_like(image_sizes[:, 0]).index_add_(0, images[rows], is_best.long())
    in_each = counts.tolist()  # the host waits here
    rows = rows[(~is_best).sort(stable=True).indices[: sum(in_each)]]
    return FlatDetections(images[rows], boxes[rows], scores[rows], labels[rows], in_each)
