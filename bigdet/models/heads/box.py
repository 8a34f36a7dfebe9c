"""Box head: classes and refined boxes of regions (Fast R-CNN), their training and decoding.

Letters: P proposals of one image, S sampled regions of one image, N regions of all images, K
classes.

The background is class K, the last. The first fully connected layer reads a region's features in
the order height, width, channels, which is their order in memory. Weights of torchvision,
detectron2 and mmdetection have the background first (torchvision) and read channels, height, width,
so importing permutes the rows of the classifier and the columns of that layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig, has_fpn, is_class_agnostic, used
from bigdet.models.activation_checkpointing import Checkpointed
from bigdet.models.assign import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    Objects,
    Sample,
    crowd_parts,
    draw_sample,
    match,
)
from bigdet.models.conventions import Conventions
from bigdet.models.heads.detections import FlatDetections, best_detections
from bigdet.models.heads.rpn import Proposals
from bigdet.models.losses import (
    at_least_fp32,
    class_losses,
    delta_losses,
    giou_losses,
    masked_mean,
)
from bigdet.models.norms import Kind as Norm
from bigdet.models.norms import conv_norm, valid_rows
from bigdet.ops.boxes import clip_boxes, decode_deltas, encode_deltas
from bigdet.ops.later import Later

POOLED_SIZE = 7
DELTA_WEIGHTS = (10.0, 5.0)  # of shifts and scales
Pool = Callable[[Tensor], Tensor]  # regions (B, S, 4) to their features (N, C, 7, 7), N = B x S
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
        num_positives: their number, on its way to the host; None where it was not asked for.
    """

    boxes: Tensor
    labels: Tensor
    is_valid: Tensor
    is_positive: Tensor
    object_boxes: Tensor
    object_rows: Tensor
    num_positives: Later | None = None

    def counted(self) -> Regions:
        """Ask a GPU for the number of positives, which the host needs after more work is queued."""
        if not self.boxes.is_cuda:
            return self
        return replace(self, num_positives=Later(self.is_positive.sum()))


class BoxHead(Checkpointed):
    """Convolutions (4 or none), fully connected layers, then class logits and deltas.

    Deltas are D per region: one for each of the K classes, or 1 for all of them.
    """

    def __init__(
        self,
        model: ModelConfig,
        norm: Norm,
        width: int,
        num_classes: int,
        conventions: Conventions,
        *,
        delta_weights: tuple[float, float] = DELTA_WEIGHTS,
        positive_iou: float | None = None,
    ) -> None:
        """Build for pooled features of ``width`` channels.

        Convolutions MSRA, fully connected layers Xavier, classes N(0, 0.01), deltas N(0, 0.001).
        Without a pyramid the fully connected layers have MSRA weights too (Kaiming normal, fan-in):
        paper 1 gives such weights to all layers of VGG, which has no normalization.

        Args:
            model: options of the layers, of training and of detection.
            norm: of the convolutions.
            width: channels of the convolutions.
            num_classes: K.
            conventions: where frameworks differ.
            delta_weights: of shifts and scales.
            positive_iou: a region on an object overlaps it by at least this. None: the config's.
        """
        super().__init__()
        self.config = config = used(model.roi)
        self.conventions = conventions
        self.num_classes = num_classes
        self.delta_weights = delta_weights
        self.positive_iou = config.positive_iou if positive_iou is None else positive_iou
        num_convs, num_fcs = NUM_LAYERS[model.box_head]
        fc_width = model.fc_width
        self.convs = nn.Sequential(
            *[conv_norm(width, width, 3, norm, relu=True) for _ in range(num_convs)]
        )
        inputs = [width * POOLED_SIZE**2] + [fc_width] * (num_fcs - 1)
        fcs = [nn.Linear(size, fc_width) for size in inputs]
        self.fcs = nn.ModuleList(fcs)
        self.classifier = nn.Linear(fc_width, num_classes + 1)
        self.regressor = nn.Linear(fc_width, 4 if is_class_agnostic(model) else 4 * num_classes)
        for layer in fcs:
            if not has_fpn(model):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            else:
                nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's XavierFill, fan-in
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.regressor.weight, std=0.001)
        for layer in [*fcs, self.classifier, self.regressor]:
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Give class logits ``(N, K + 1)`` and deltas ``(N, D, 4)`` of ``(N, C, 7, 7)``."""
        hidden = self.run(self.convs, pooled).permute(0, 2, 3, 1).flatten(1)
        for layer in self.fcs:
            hidden = torch.relu_(layer(hidden))
        deltas = self.regressor(hidden).unflatten(1, (-1, 4))
        return at_least_fp32(self.classifier(hidden)), at_least_fp32(deltas)

    def use_eval_settings(self, config: RoiConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        self.config = config

    def train_on(
        self,
        pool: Pool,
        proposals: Proposals,
        objects: Objects,
        weights: Tensor,
        image_sizes: Tensor,
    ) -> tuple[dict[str, Tensor], Regions]:
        """Give the losses of a sample of the proposals, and the sample, for further heads.

        Args:
            pool: gives the features of regions.
            proposals: of B images.
            objects: what is in them.
            weights: ``(B,)`` 0 for an image that counts nothing.
            image_sizes: ``(B, 2)`` height, width.
        """
        regions = self.sample(proposals, objects, weights).counted()
        with valid_rows(self, regions.is_valid.flatten()):
            logits, deltas = self(pool(regions.boxes))
        return self.losses(logits, deltas, regions), regions

    def find(self, pool: Pool, proposals: Proposals, image_sizes: Tensor) -> FlatDetections:
        """Detect objects among the proposals of B images of sizes ``(B, 2)``."""
        found = self.candidates(pool, proposals, image_sizes)
        return best_detections(found, image_sizes, self.num_classes, self.config)

    def candidates(self, pool: Pool, proposals: Proposals, image_sizes: Tensor) -> FlatDetections:
        """Give all boxes above the threshold, for `find` to choose from."""
        logits, deltas = self(pool(proposals.boxes))
        return self.decode(logits.softmax(dim=-1), deltas, proposals)

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
        labels, slots = self._assign(boxes, exists, objects)
        drawn = draw_sample(labels, self.config.rois_per_image, self.config.positive_fraction)
        boxes = boxes.gather(1, drawn.index[..., None].expand(-1, -1, 4))
        return self._regions(boxes, slots.gather(1, drawn.index), drawn, objects, weights)

    @torch.no_grad()
    def label_all(self, proposals: Proposals, objects: Objects, weights: Tensor) -> Regions:
        """Label all proposals as regions to train on, in their places; see `sample`."""
        labels, slots = self._assign(proposals.boxes, proposals.is_valid, objects)
        taken = Sample(
            index=torch.arange(labels.shape[1], device=labels.device).expand_as(labels),
            is_valid=labels != IGNORED,
            is_positive=labels == POSITIVE,
        )
        return self._regions(proposals.boxes, slots, taken, objects, weights)

    def _assign(self, boxes: Tensor, exists: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """Give the label ``(B, A)`` of each box ``(B, A, 4)`` and its object as a slot."""
        iou, slots, _ = match(objects, boxes, keep_best=False)
        labels = torch.full_like(iou, NEGATIVE, dtype=torch.int8)
        if self.config.crowd_coverage is not None:
            in_crowd = crowd_parts(objects, boxes) > self.config.crowd_coverage
            labels.masked_fill_(in_crowd, IGNORED)
        labels.masked_fill_(iou >= self.positive_iou, POSITIVE)
        return labels.masked_fill_(~exists, IGNORED), slots

    def _regions(
        self, boxes: Tensor, slots: Tensor, taken: Sample, objects: Objects, weights: Tensor
    ) -> Regions:
        """Put together what is known of the boxes ``(B, S, 4)`` that were taken."""
        is_counted = (weights > 0)[:, None]
        is_positive = taken.is_positive & is_counted
        return Regions(
            boxes=boxes,
            labels=torch.where(is_positive, objects.labels.gather(1, slots), self.num_classes),
            is_valid=taken.is_valid & is_counted,
            is_positive=is_positive,
            object_boxes=objects.boxes.gather(1, slots[..., None].expand_as(boxes)),
            object_rows=objects.rows.gather(1, slots),
        )

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions) -> dict[str, Tensor]:
        """Give the losses of sampled regions, as means over the valid ones.

        Args:
            logits: ``(N, K + 1)``, N = B x S.
            deltas: ``(N, D, 4)``.
            regions: what was sampled.
        """
        labels, is_positive = regions.labels.flatten(), regions.is_positive.flatten()
        is_valid = regions.is_valid.flatten()
        own_deltas = deltas_of(deltas, labels.clamp(max=self.num_classes - 1))
        count = is_valid.sum()
        box_loss = masked_mean(self._box_losses(own_deltas, regions), is_positive, count)
        return {
            "box_class": masked_mean(class_losses(logits, labels), is_valid, count),
            "box_delta": box_loss * self.config.box_loss_weight,
        }

    def _box_losses(self, deltas: Tensor, regions: Regions) -> Tensor:
        """Give the losses ``(N,)`` of deltas ``(N, 4)`` of the objects' classes."""
        is_positive, boxes = regions.is_positive.flatten(), regions.boxes.flatten(0, 1)
        object_boxes = regions.object_boxes.flatten(0, 1)
        if self.config.box_loss == "giou":
            # A region on no object is compared with itself, so that all gradients are numbers.
            deltas = torch.where(is_positive[:, None], deltas, 0)
            targets = torch.where(is_positive[:, None], object_boxes, boxes)
            return giou_losses(decode_deltas(deltas, boxes, self.delta_weights), targets)
        beta = self.config.box_beta if self.config.box_loss == "smooth_l1" else 0.0
        targets = encode_deltas(object_boxes, boxes, self.delta_weights)
        return delta_losses(deltas, targets, is_positive, beta)

    @torch.no_grad()
    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, image_sizes: Tensor
    ) -> Proposals:
        """Move the regions by the deltas of their best class, as proposals of the next stage.

        Args:
            logits: ``(N, K + 1)``, N = B x S.
            deltas: ``(N, D, 4)``.
            boxes: ``(B, S, 4)`` the regions.
            image_sizes: ``(B, 2)`` height, width.

        Returns:
            The same regions in the same places; those that are left without an area, or not
            finite, are not valid.
        """
        own_deltas = deltas_of(deltas, logits[:, :-1].argmax(dim=1)).view_as(boxes)
        moved = clip_boxes(decode_deltas(own_deltas, boxes, self.delta_weights), image_sizes)
        is_valid = moved.isfinite().all(-1) & (moved[..., 2:] > moved[..., :2]).all(-1)
        return Proposals(torch.where(is_valid[..., None], moved, 0), is_valid)

    @torch.no_grad()
    def detect(
        self, probabilities: Tensor, deltas: Tensor, proposals: Proposals, image_sizes: Tensor
    ) -> FlatDetections:
        """Turn predictions for all proposals into detections; see `decode`.

        Args:
            probabilities: ``(N, K + 1)``, N = B x P.
            deltas: ``(N, D, 4)``.
            proposals: of B images.
            image_sizes: ``(B, 2)`` height, width.
        """
        found = self.decode(probabilities, deltas, proposals)
        return best_detections(found, image_sizes, self.num_classes, self.config)

    @torch.no_grad()
    def decode(self, probabilities: Tensor, deltas: Tensor, proposals: Proposals) -> FlatDetections:
        """Give the boxes of all proposals and classes above the threshold.

        Args:
            probabilities: ``(N, K + 1)``, N = B x P.
            deltas: ``(N, D, 4)``.
            proposals: of B images.
        """
        num_images, num_proposals = proposals.is_valid.shape
        num_classes = self.num_classes
        probabilities = probabilities[:, :-1].reshape(num_images, num_proposals, num_classes)
        # Not a number is not above the threshold either.
        is_candidate = probabilities > self.config.score_threshold
        is_candidate &= proposals.is_valid[..., None]
        images, regions, labels = is_candidate.nonzero(as_tuple=True)
        scores = probabilities[images, regions, labels]
        boxes = decode_deltas(
            deltas_of(deltas[images * num_proposals + regions], labels),
            proposals.boxes[images, regions],
            self.delta_weights,
        )
        return FlatDetections(images, boxes, scores, labels)


def deltas_of(deltas: Tensor, labels: Tensor) -> Tensor:
    """Give the deltas ``(N, 4)`` of the labels' classes out of ``(N, D, 4)``."""
    if deltas.shape[1] == 1:
        return deltas[:, 0]
    return deltas.gather(1, labels[:, None, None].expand(-1, 1, 4)).squeeze(1)
