"""RetinaNet's head: classes and boxes of every anchor, without proposals (Lin et al., 2017).

Letters: A anchors over all levels, A_l of one level, K classes, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from bigdet.config.heads import RetinaConfig
from bigdet.models.activation_checkpointing import Checkpointed
from bigdet.models.anchors import pyramid_anchors, shape_anchors
from bigdet.models.assign import NEGATIVE, POSITIVE, Objects, label_anchors, match
from bigdet.models.conventions import Conventions
from bigdet.models.heads.detections import FlatDetections, best_detections
from bigdet.models.losses import at_least_fp32, delta_losses, focal_loss_sum
from bigdet.models.norms import Kind as Norm
from bigdet.models.norms import conv_norm
from bigdet.ops.boxes import decode_deltas, encode_deltas
from bigdet.ops.nms import best_of_groups

NUM_CONVS = 4
DELTA_WEIGHTS = (1.0, 1.0)  # of shifts and scales
PRIOR = 0.01  # probability of every class at the start, so that the background does not drown all


@dataclass(frozen=True)
class RetinaPredictions:
    """The head's predictions for every anchor.

    Attributes:
        logits: ``(B, A_l, K)`` of each level: views of what the convolution gave, in its type.
        deltas: ``(B, A, 4)`` from the anchor to the object.
        anchors: ``(A, 4)``.
    """

    logits: list[Tensor]
    deltas: Tensor
    anchors: Tensor


# So that FSDP2 of torch before 2.15 sees the tensors in it, on which it hangs its hooks.
register_dataclass(RetinaPredictions)


class RetinaHead(Checkpointed):
    """Two branches of four 3x3 convolutions, shared by the levels: class logits, and deltas."""

    def __init__(
        self,
        config: RetinaConfig,
        norm: Norm,
        width: int,
        num_classes: int,
        conventions: Conventions,
    ) -> None:
        """Build for pyramid features of ``width`` channels.

        Weights N(0, 0.01), biases 0, but those of the classes such that each starts at `PRIOR`.
        """
        super().__init__()
        self.config = config
        self.conventions = conventions
        self.num_classes = num_classes
        cells = [
            shape_anchors(
                octave_sizes(size, config.scales_per_octave, conventions.anchors_rounded),
                config.anchor_ratios,
                conventions.anchors_rounded,
            )
            for size in config.anchor_sizes
        ]
        self.register_buffer("cells", torch.stack(cells).float(), persistent=False)
        num_shapes = len(cells[0])
        self.class_convs = nn.Sequential(
            *[conv_norm(width, width, 3, norm, relu=True) for _ in range(NUM_CONVS)]
        )
        self.box_convs = nn.Sequential(
            *[conv_norm(width, width, 3, norm, relu=True) for _ in range(NUM_CONVS)]
        )
        self.classifier = nn.Conv2d(width, num_shapes * num_classes, 3, padding=1)
        self.regressor = nn.Conv2d(width, num_shapes * 4, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        assert self.classifier.bias is not None
        nn.init.constant_(self.classifier.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(
        self, features: Sequence[Tensor], strides: Sequence[int], canvas_size: tuple[int, int]
    ) -> RetinaPredictions:
        """Predict for every anchor of a pyramid.

        Args:
            features: ``(B, C, h, w)`` of each level.
            strides: pixels per cell of each level.
            canvas_size: height, width of the images.
        """
        logits, deltas = [], []
        for level in features:
            by_class = self.classifier(self.run(self.class_convs, level)).permute(0, 2, 3, 1)
            logits.append(by_class.reshape(len(level), -1, self.num_classes))  # (B, A_l, K)
            moves = self.regressor(self.run(self.box_convs, level)).permute(0, 2, 3, 1)
            deltas.append(moves.reshape(len(level), -1, 4))
        all_deltas = at_least_fp32(torch.cat(deltas, dim=1))
        cells = self.get_buffer("cells").to(all_deltas.dtype)
        from_canvas = self.conventions.anchor_strides_from_canvas
        anchors = pyramid_anchors(features, strides, canvas_size, cells, from_canvas)
        return RetinaPredictions(logits, all_deltas, anchors)

    def losses(
        self, predictions: RetinaPredictions, objects: Objects, weights: Tensor
    ) -> dict[str, Tensor]:
        """Give the losses of all anchors, divided by the number of positive ones.

        Args:
            predictions: of B images.
            objects: what is in them; crowds are no objects.
            weights: ``(B,)`` 0 for an image that counts nothing.
        """
        config, anchors = self.config, predictions.anchors
        with torch.no_grad():
            iou, slots, is_best = match(objects, anchors, keep_best=True)
            kinds = label_anchors(iou, is_best, config.negative_iou, config.positive_iou)
            is_positive = (kinds == POSITIVE) & (weights > 0)[:, None]  # (B, A)
            shares = self._shares(is_positive, weights)[:, None]  # (B, 1)
            class_weights = torch.where(is_positive | (kinds == NEGATIVE), shares, 0)
            labels = objects.labels.gather(1, slots)
            boxes = objects.boxes.gather(1, slots[..., None].expand(-1, -1, 4))
            targets = encode_deltas(boxes, anchors, DELTA_WEIGHTS)
        box_losses = delta_losses(predictions.deltas, targets, is_positive, config.box_beta)
        counts = [level.shape[1] for level in predictions.logits]
        by_level = zip(
            predictions.logits,
            torch.split(labels, counts, dim=1),
            torch.split(is_positive, counts, dim=1),
            torch.split(class_weights, counts, dim=1),
            strict=True,
        )
        class_losses = [
            focal_loss_sum(*facts, config.focal_alpha, config.focal_gamma) for facts in by_level
        ]
        return {
            "retina_class": torch.stack(class_losses).sum(),
            "retina_box": (torch.where(is_positive, box_losses, 0) * shares).sum(),
        }

    def _shares(self, is_positive: Tensor, weights: Tensor) -> Tensor:
        """Give what each image's losses are multiplied by: ``(B,)``, 0 where its weight is 0."""
        counts = is_positive.sum(dim=1)
        if self.conventions.retina_normalizer == "image":
            shares = 1 / (counts.clamp(min=1) * (weights > 0).sum().clamp(min=1))
        else:
            shares = (1 / counts.sum().clamp(min=1)).expand(len(counts))
        dtype = torch.promote_types(weights.dtype, shares.dtype)
        return torch.where(weights > 0, shares.to(dtype), 0)

    @torch.no_grad()
    def detect(self, predictions: RetinaPredictions, image_sizes: Tensor) -> FlatDetections:
        """Turn the best predictions of each level into detections.

        Args:
            predictions: of B images.
            image_sizes: ``(B, 2)`` height, width.
        """
        candidates = self.decode(predictions, len(image_sizes))
        return best_detections(candidates, image_sizes, self.num_classes, self.config)

    @torch.no_grad()
    def decode(self, predictions: RetinaPredictions, num_images: int) -> FlatDetections:
        """Give the boxes of the best predictions of each level above the threshold.

        On a GPU, so that the host need not wait, always as many; the others have the score -inf.
        """
        find = self._best_above if predictions.deltas.device.type == "cpu" else self._best
        found, first_anchor = [], 0
        for level in predictions.logits:
            images, anchors, labels, scores = find(level, num_images)
            found.append((images, anchors + first_anchor, labels, scores))
            first_anchor += level.shape[1]
        images, anchors, labels, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        deltas = predictions.deltas[images, anchors]
        boxes = decode_deltas(deltas, predictions.anchors[anchors], DELTA_WEIGHTS)
        return FlatDetections(images, boxes, scores, labels)

    def _best_above(self, level: Tensor, num_images: int) -> tuple[Tensor, ...]:
        """Give image, anchor, label and score of a level's best predictions."""
        logits = at_least_fp32(level)
        # Not a number is not above the threshold either.
        is_candidate = logits > _logit(self.config.score_threshold)
        images, anchors, labels = is_candidate.nonzero(as_tuple=True)
        scores = logits[images, anchors, labels].sigmoid()
        best = best_of_groups(scores, images, num_images, self.config.candidates_per_level)
        return images[best], anchors[best], labels[best], scores[best]

    def _best(self, level: Tensor, num_images: int) -> tuple[Tensor, ...]:
        """The same, filled up to equally many of each image by predictions of score -inf."""
        logits = torch.where(level.isnan(), -torch.inf, level).flatten(1)
        best = logits.topk(min(self.config.candidates_per_level, logits.shape[1]), dim=1)
        images = torch.arange(num_images, device=level.device)[:, None].expand_as(best.indices)
        values, index = at_least_fp32(best.values), best.indices
        is_candidate = values > _logit(self.config.score_threshold)
        scores = torch.where(is_candidate, values.sigmoid(), -torch.inf)
        found = (images, index // self.num_classes, index % self.num_classes, scores)
        return tuple(part.flatten() for part in found)


def octave_sizes(size: float, count: int, rounded: bool) -> list[float]:
    """Give a level's anchor sizes: from ``size`` up to less than the next level's, twice as large.

    Args:
        size: the smallest, pixels.
        count: of steps to an octave.
        rounded: cut to whole pixels, as torchvision does.
    """
    sizes = [size * 2 ** (step / count) for step in range(count)]
    return [float(int(value)) for value in sizes] if rounded else sizes


def _logit(probability: float) -> float:
    """Give the logit of a probability in [0, 1]."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
