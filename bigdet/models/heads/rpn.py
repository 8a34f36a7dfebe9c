"""Region proposal network (Ren et al., Faster R-CNN) over a feature pyramid.

Letters: A anchors over all levels, N candidates of one image before NMS, P proposals of one image,
S sampled anchors of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from bigdet.config.rpn import RpnConfig, proposal_limits
from bigdet.models.anchors import pyramid_anchors, shape_anchors, within_border
from bigdet.models.assign import IGNORED, Objects, Sample, draw_sample, label_anchors, match
from bigdet.models.conventions import Conventions
from bigdet.models.losses import at_least_fp32, binary_losses, delta_losses, masked_mean
from bigdet.models.norms import conv_norm
from bigdet.ops.boxes import clip_boxes, decode_deltas, encode_deltas
from bigdet.ops.nms import GroupedNms, grouped_nms

POSITIVE_FRACTION = 0.5
MIN_SIDE = 1e-3  # proposals of less than this many pixels are dropped
DELTA_WEIGHTS = (1.0, 1.0)  # of shifts and scales


@dataclass(frozen=True)
class AnchorPredictions:
    """The network's predictions for every anchor.

    Attributes:
        logits: ``(B, A)`` of holding an object.
        deltas: ``(B, A, 4)`` from the anchor to the object.
        anchors: ``(A, 4)``.
        counts: anchors of each level.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    counts: list[int]


# So that FSDP2 of torch before 2.15 sees the tensors in it, on which it hangs its hooks.
register_dataclass(AnchorPredictions)


@dataclass(frozen=True)
class Proposals:
    """Regions that may hold an object, best first.

    Attributes:
        boxes: ``(B, P, 4)``, cut at the images.
        is_valid: ``(B, P)`` bool; False in empty slots, which come last.
    """

    boxes: Tensor
    is_valid: Tensor


class RegionProposals(nn.Module):
    """3x3 convolutions, shared by the levels, then logits and deltas of the anchors.

    They never have a normalization: Detectron's baselines with GN have it in the backbone, the FPN
    and the other heads only.
    """

    def __init__(
        self,
        config: RpnConfig,
        width: int,
        conventions: Conventions,
        has_levels: bool = True,
        detector: str = "faster_rcnn",
    ) -> None:
        """Build for features of ``width`` channels; weights N(0, 0.01), biases 0.

        The anchor sizes are those of a pyramid's levels, or without levels all of one map. The
        number of proposals follows from the detector where the config does not set it.
        """
        super().__init__()
        self.config = proposal_limits(config, detector)
        self.conventions = conventions
        sizes = config.anchor_sizes
        cells = [
            shape_anchors(of_level, config.anchor_ratios, conventions.anchors_rounded)
            for of_level in ([[size] for size in sizes] if has_levels else [sizes])
        ]
        num_shapes = len(cells[0])
        # A buffer, for it waits on the device: a copy at every step would stop the host.
        self.register_buffer("cells", torch.stack(cells).float(), persistent=False)
        convs = [conv_norm(width, width, 3, "none", relu=True) for _ in range(config.num_convs)]
        self.conv, self.more_convs = convs[0], nn.Sequential(*convs[1:])
        self.objectness = nn.Conv2d(width, num_shapes, 1)
        self.deltas = nn.Conv2d(width, 4 * num_shapes, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(
        self, features: Sequence[Tensor], strides: Sequence[int], canvas_size: tuple[int, int]
    ) -> AnchorPredictions:
        """Predict for every anchor of a pyramid.

        Args:
            features: ``(B, C, h, w)`` of each level.
            strides: pixels per cell of each level.
            canvas_size: height, width of the images.
        """
        logits, deltas = [], []
        for level in features:
            hidden = self.more_convs(self.conv(level))
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(hidden).permute(0, 2, 3, 1).flatten(1))
        all_logits = at_least_fp32(torch.cat(logits, dim=1))
        cells = self.get_buffer("cells").to(all_logits.dtype)
        from_canvas = self.conventions.anchor_strides_from_canvas
        return AnchorPredictions(
            logits=all_logits,
            deltas=at_least_fp32(torch.cat(deltas, dim=1)).view(*all_logits.shape, 4),
            anchors=pyramid_anchors(features, strides, canvas_size, cells, from_canvas),
            counts=[level.shape[1] for level in logits],
        )

    @torch.no_grad()
    def propose(
        self,
        predictions: AnchorPredictions,
        image_sizes: Tensor,
        suppress: GroupedNms | None = None,
    ) -> Proposals:
        """Turn the best anchors of each level into proposals, without near duplicates.

        Predictions that are not finite are left out, so that one bad value costs one anchor.

        Args:
            predictions: of B images.
            image_sizes: ``(B, 2)`` height, width.
            suppress: replaces `grouped_nms` in an exported model.
        """
        config = self.config
        limit = config.train_proposals if self.training else config.test_proposals
        candidates = config.train_candidates if self.training else config.test_candidates
        assert limit is not None
        assert candidates is not None
        logits = torch.where(predictions.logits.isfinite(), predictions.logits, -torch.inf)
        index, levels, offset = [], [], 0
        for number, level in enumerate(torch.split(logits, predictions.counts, dim=1)):
            best = level.topk(min(candidates, level.shape[1]), dim=1).indices
            index.append(best + offset)
            levels.append(torch.full_like(best, number))
            offset += level.shape[1]
        taken = torch.cat(index, dim=1)  # (B, N)
        deltas = predictions.deltas.gather(1, taken[..., None].expand(-1, -1, 4))
        boxes = decode_deltas(deltas, predictions.anchors[taken], DELTA_WEIGHTS)
        boxes = clip_boxes(boxes, image_sizes)
        is_usable = boxes.isfinite().all(-1) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
        boxes = torch.where(is_usable[..., None], boxes, 0)
        scores = torch.where(is_usable, logits.gather(1, taken), -torch.inf)

        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        num_levels = len(predictions.counts)
        groups = images * num_levels + torch.cat(levels, dim=1)
        # topk gives them best first, level after level.
        kept = (suppress or partial(grouped_nms, is_sorted=True))(
            boxes.flatten(0, 1),
            scores.flatten(),
            groups.flatten(),
            len(boxes) * num_levels,
            config.nms_iou,
        ).view_as(scores)
        scores = torch.where(kept, scores, -torch.inf)
        best_scores, best = scores.topk(min(limit, scores.shape[1]), dim=1)
        return Proposals(
            boxes=boxes.gather(1, best[..., None].expand(-1, -1, 4)),
            is_valid=best_scores > -torch.inf,
        )

    def losses(
        self,
        predictions: AnchorPredictions,
        objects: Objects,
        weights: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Give the losses of a random sample of anchors.

        Args:
            predictions: of B images.
            objects: what is in them.
            weights: ``(B,)`` 0 for an image that counts nothing.
            image_sizes: ``(B, 2)`` height, width, which the option ``border`` needs.
        """
        sample, slots = self._sample(predictions.anchors, objects, image_sizes)
        logits = predictions.logits.gather(1, sample.index)  # (B, S)
        index = sample.index[..., None].expand(-1, -1, 4)
        deltas = predictions.deltas.gather(1, index)
        boxes = objects.boxes.gather(1, slots.gather(1, sample.index)[..., None].expand_as(index))
        targets = encode_deltas(boxes, predictions.anchors[sample.index], DELTA_WEIGHTS)

        is_counted = weights > 0
        is_valid = sample.is_valid & is_counted[:, None]
        is_positive = sample.is_positive & is_counted[:, None]
        if self.conventions.rpn_normalizer == "slots":
            count = self.config.anchors_per_image * is_counted.sum()
        else:
            count = is_valid.sum()
        box_losses = delta_losses(deltas, targets, is_positive, self.config.box_beta)
        object_losses = binary_losses(logits, sample.is_positive)
        return {
            "rpn_objectness": masked_mean(object_losses, is_valid, count),
            "rpn_box": masked_mean(box_losses, is_positive, count),
        }

    @torch.no_grad()
    def _sample(
        self, anchors: Tensor, objects: Objects, image_sizes: Tensor | None
    ) -> tuple[Sample, Tensor]:
        """Draw anchors to train on; also give each anchor's object as a slot ``(B, A)``."""
        is_usable = None
        if self.config.border is not None:
            assert image_sizes is not None
            is_usable = within_border(anchors, image_sizes, self.config.border)
        lowest = self.config.low_quality_iou
        iou, slots, is_best = match(objects, anchors, True, lowest, is_usable)
        labels = label_anchors(iou, is_best)
        if is_usable is not None:
            labels.masked_fill_(~is_usable, IGNORED)
        return draw_sample(labels, self.config.anchors_per_image, POSITIVE_FRACTION), slots
