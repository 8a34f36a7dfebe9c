"""Box head: classes and refined boxes of regions (Fast R-CNN), their training and decoding.

Letters: P proposals of one image, S sampled regions of one image, N regions of all images, K
classes.

The background is class K, the last. The first fully connected layer reads a region's features in
the order height, width, channels, which is how they lie in memory. Weights of torchvision,
detectron2 and mmdetection have the background first (torchvision) and read channels, height, width,
so importing permutes the rows of the classifier and the columns of that layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigdet.config.schema import BoxHead as Kind
from bigdet.config.schema import RoiConfig
from bigdet.models.assign import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    Objects,
    crowd_parts,
    draw_sample,
    match,
)
from bigdet.models.conventions import Conventions
from bigdet.models.heads.detections import FlatDetections, best_detections
from bigdet.models.heads.rpn import Proposals
from bigdet.models.losses import at_least_fp32, class_losses, delta_losses, masked_mean
from bigdet.models.norms import Kind as Norm
from bigdet.models.norms import conv_norm
from bigdet.ops.boxes import decode_deltas, encode_deltas

POOLED_SIZE = 7
DELTA_WEIGHTS = (10.0, 5.0)  # of shifts and scales
NUM_LAYERS = {"2fc": (0, 2), "4conv1fc": (4, 1)}  # convolutions, fully connected layers


@dataclass(frozen=True)
class Regions:
    """Regions drawn for the box loss.

    Attributes:
        boxes: ``(B, S, 4)``.
        labels: ``(B, S)`` int64 in ``0..K``; K is background.
        is_valid: ``(B, S)`` bool; False in empty slots and in images of weight 0.
        is_positive: ``(B, S)`` bool, on an object.
        object_boxes: ``(B, S, 4)`` the box of that object.
        object_rows: ``(B, S)`` int64, its place in the flat targets.
    """

    boxes: Tensor
    labels: Tensor
    is_valid: Tensor
    is_positive: Tensor
    object_boxes: Tensor
    object_rows: Tensor


class BoxHead(nn.Module):
    """Convolutions (4 or none), fully connected layers, then class logits and deltas per class."""

    def __init__(
        self,
        kind: Kind,
        norm: Norm,
        width: int,
        fc_width: int,
        num_classes: int,
        config: RoiConfig,
        conventions: Conventions,
    ) -> None:
        """Build for pooled features of ``width`` channels.

        Convolutions MSRA, fully connected layers Xavier, classes N(0, 0.01), deltas N(0, 0.001).
        """
        super().__init__()
        self.config = config
        self.conventions = conventions
        self.num_classes = num_classes
        num_convs, num_fcs = NUM_LAYERS[kind]
        self.convs = nn.Sequential(
            *[conv_norm(width, width, 3, norm, relu=True) for _ in range(num_convs)]
        )
        inputs = [width * POOLED_SIZE**2] + [fc_width] * (num_fcs - 1)
        fcs = [nn.Linear(size, fc_width) for size in inputs]
        self.fcs = nn.ModuleList(fcs)
        self.classifier = nn.Linear(fc_width, num_classes + 1)
        self.regressor = nn.Linear(fc_width, 4 * num_classes)
        for layer in fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's XavierFill, fan-in
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.regressor.weight, std=0.001)
        for layer in [*fcs, self.classifier, self.regressor]:
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Give class logits ``(N, K + 1)`` and deltas ``(N, K, 4)`` of ``(N, C, 7, 7)``."""
        hidden = self.convs(pooled).permute(0, 2, 3, 1).flatten(1)
        for layer in self.fcs:
            hidden = torch.relu_(layer(hidden))
        deltas = self.regressor(hidden).view(-1, self.num_classes, 4)
        return at_least_fp32(self.classifier(hidden)), at_least_fp32(deltas)

    @torch.no_grad()
    def sample(self, proposals: Proposals, objects: Objects, weights: Tensor) -> Regions:
        """Draw the regions to train on from the proposals and the objects' own boxes.

        Args:
            proposals: of B images.
            objects: what is in them.
            weights: ``(B,)`` 0 for an image that counts nothing.
        """
        boxes = torch.cat([proposals.boxes, objects.boxes], dim=1)  # (B, P + G, 4)
        exists = torch.cat([proposals.is_valid, objects.is_object], dim=1)
        iou, slots, _ = match(objects, boxes, keep_best=False)
        labels = torch.full_like(iou, NEGATIVE, dtype=torch.int8)
        if self.conventions.crowd_coverage is not None:
            in_crowd = crowd_parts(objects, boxes) > self.conventions.crowd_coverage
            labels.masked_fill_(in_crowd, IGNORED)
        labels.masked_fill_(iou >= self.config.positive_iou, POSITIVE)
        labels.masked_fill_(~exists, IGNORED)
        drawn = draw_sample(labels, self.config.rois_per_image, self.config.positive_fraction)

        slots = slots.gather(1, drawn.index)
        is_counted = (weights > 0)[:, None]
        is_positive = drawn.is_positive & is_counted
        index = drawn.index[..., None].expand(-1, -1, 4)
        return Regions(
            boxes=boxes.gather(1, index),
            labels=torch.where(is_positive, objects.labels.gather(1, slots), self.num_classes),
            is_valid=drawn.is_valid & is_counted,
            is_positive=is_positive,
            object_boxes=objects.boxes.gather(1, slots[..., None].expand_as(index)),
            object_rows=objects.rows.gather(1, slots),
        )

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions) -> dict[str, Tensor]:
        """Give the losses of sampled regions, as means over the valid ones.

        Args:
            logits: ``(N, K + 1)``, N = B x S.
            deltas: ``(N, K, 4)``.
            regions: what was sampled.
        """
        labels, is_positive = regions.labels.flatten(), regions.is_positive.flatten()
        is_valid = regions.is_valid.flatten()
        targets = encode_deltas(regions.object_boxes, regions.boxes, DELTA_WEIGHTS).flatten(0, 1)
        own = labels.clamp(max=self.num_classes - 1)[:, None, None].expand(-1, 1, 4)
        own_deltas = deltas.gather(1, own).squeeze(1)  # (N, 4) of the object's class
        box_losses = delta_losses(own_deltas, targets, is_positive, self.conventions.box_beta)
        count = is_valid.sum()
        return {
            "box_class": masked_mean(class_losses(logits, labels), is_valid, count),
            "box_delta": masked_mean(box_losses, is_positive, count),
        }

    @torch.no_grad()
    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: Proposals, image_sizes: Tensor
    ) -> FlatDetections:
        """Turn predictions for all proposals into detections.

        Args:
            logits: ``(N, K + 1)``, N = B x P.
            deltas: ``(N, K, 4)``.
            proposals: of B images.
            image_sizes: ``(B, 2)`` height, width.
        """
        num_images, num_proposals = proposals.is_valid.shape
        num_classes = self.num_classes
        probabilities = logits.softmax(dim=-1)[:, :-1]
        probabilities = probabilities.reshape(num_images, num_proposals, num_classes)
        # Not a number is not above the threshold either.
        is_candidate = probabilities > self.config.score_threshold
        is_candidate &= proposals.is_valid[..., None]
        images, regions, labels = is_candidate.nonzero(as_tuple=True)
        scores = probabilities[images, regions, labels]
        boxes = decode_deltas(
            deltas[images * num_proposals + regions, labels],
            proposals.boxes[images, regions],
            DELTA_WEIGHTS,
        )
        return best_detections(
            FlatDetections(images, boxes, scores, labels), image_sizes, num_classes, self.config
        )
