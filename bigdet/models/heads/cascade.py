"""Cascade R-CNN (Cai and Vasconcelos): three box heads, each on the boxes of the one before.

Letters: P proposals of one image, S sampled regions of one image, N regions of all images.

Further heads are trained on the positive regions of the last stage, which overlap their objects by
0.7, and run on the last stage's boxes at test time: what they see in training is what they will
see. That is the paper's variant (c), and paper 1's ("mask head on the last stage"); detectron2
trains its mask head on the first stage's sample, mmdetection has one mask head per stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bigdet.config.heads import CascadeConfig, RoiConfig
from bigdet.models.assign import Objects
from bigdet.models.heads.box import BoxHead, Pool, Regions
from bigdet.models.heads.detections import FlatDetections, best_detections
from bigdet.models.heads.rpn import Proposals
from bigdet.models.norms import valid_rows
from bigdet.pieces.unread import Unread

logger = logging.getLogger(__name__)

ONE_HEAD, STAGES = "box_head.", "box_head.stages."  # first words of the names of tensors
POSITIVE_IOU = (0.5, 0.6, 0.7)
DELTA_WEIGHTS = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))  # of shifts and scales
NUM_STAGES = len(POSITIVE_IOU)
LOSS_WEIGHTS = (1.0, 0.5, 0.25)  # of the stages, in mmdetection


class CascadeHead(nn.Module):
    """Three box heads; each refines the regions of the one before and requires more overlap."""

    def __init__(self, make_head: Callable[..., BoxHead], config: CascadeConfig) -> None:
        """Build the stages.

        Args:
            make_head: gives a box head for its ``delta_weights`` and ``positive_iou``.
            config: how they are trained.
        """
        super().__init__()
        self.gradients = config.gradients
        self.stages = nn.ModuleList(
            make_head(delta_weights=weights, positive_iou=iou)
            for weights, iou in zip(DELTA_WEIGHTS, POSITIVE_IOU, strict=True)
        )

    def use_eval_settings(self, config: RoiConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        for stage in self._stages():
            stage.use_eval_settings(config)

    def _stages(self) -> list[BoxHead]:
        return [stage for stage in self.stages if isinstance(stage, BoxHead)]

    def train_on(
        self,
        pool: Pool,
        proposals: Proposals,
        objects: Objects,
        weights: Tensor,
        image_sizes: Tensor,
    ) -> tuple[dict[str, Tensor], Regions]:
        """Give the losses of all stages, and the last stage's regions, for further heads.

        Args:
            pool: gives the features of regions.
            proposals: of B images.
            objects: what is in them.
            weights: ``(B,)`` 0 for an image that counts nothing.
            image_sizes: ``(B, 2)`` height, width.
        """
        losses = {}
        stages = self._stages()
        regions = stages[0].sample(proposals, objects, weights)
        for number, stage in enumerate(stages):
            if number > 0:
                regions = self._next_regions(stage, proposals, objects, weights)
            if number == NUM_STAGES - 1:
                learned = self._limited(regions).counted()
            pooled = pool(regions.boxes)
            if self.gradients == "detectron2":
                pooled = _ScaledGradient.apply(pooled, 1 / NUM_STAGES)
            with valid_rows(stage, regions.is_valid.flatten()):
                logits, deltas = stage(pooled)
            factor = LOSS_WEIGHTS[number] if self.gradients == "mmdet" else 1.0
            for name, loss in stage.losses(logits, deltas, regions).items():
                losses[f"stage{number + 1}_{name}"] = factor * loss
            if number < NUM_STAGES - 1:
                proposals = self._refined(stage, logits, deltas, regions, image_sizes)
        return losses, learned

    def _next_regions(
        self, stage: BoxHead, proposals: Proposals, objects: Objects, weights: Tensor
    ) -> Regions:
        if self.gradients == "mmdet":
            return stage.sample(proposals, objects, weights)
        return stage.label_all(proposals, objects, weights)

    def _refined(
        self,
        stage: BoxHead,
        logits: Tensor,
        deltas: Tensor,
        regions: Regions,
        image_sizes: Tensor,
    ) -> Proposals:
        """Give the proposals of the next stage: all valid regions, moved.

        If it samples again, the objects' own boxes are left out, because sampling adds them.
        """
        refined = stage.refine(logits, deltas, regions.boxes, image_sizes)
        is_valid = refined.is_valid & regions.is_valid
        if self.gradients == "mmdet":
            is_own = (regions.boxes == regions.object_boxes).all(-1) & regions.is_positive
            is_valid &= ~is_own
        return Proposals(refined.boxes, is_valid)

    def _limited(self, regions: Regions) -> Regions:
        """Keep as many positives of an image as a sample may have: all regions may be positive."""
        config = self._stages()[0].config
        limit = int(config.rois_per_image * config.positive_fraction)
        is_among_first = regions.is_positive.cumsum(dim=1) <= limit
        return replace(regions, is_positive=regions.is_positive & is_among_first)

    def find(self, pool: Pool, proposals: Proposals, image_sizes: Tensor) -> FlatDetections:
        """Detect objects among the proposals of B images of sizes ``(B, 2)``.

        Scores are means over the stages, boxes those of the last.
        """
        found = self.candidates(pool, proposals, image_sizes)
        last = self._stages()[-1]
        return best_detections(found, image_sizes, last.num_classes, last.config)

    def candidates(self, pool: Pool, proposals: Proposals, image_sizes: Tensor) -> FlatDetections:
        """Give all boxes above the threshold, for `find` to choose from."""
        probabilities = []
        stages, exists = self._stages(), proposals.is_valid
        for number, stage in enumerate(stages):
            logits, deltas = stage(pool(proposals.boxes))
            probabilities.append(logits.softmax(dim=-1))
            if number < NUM_STAGES - 1:
                refined = stage.refine(logits, deltas, proposals.boxes, image_sizes)
                proposals = Proposals(refined.boxes, refined.is_valid & exists)
        mean = torch.stack(probabilities).mean(dim=0)
        return stages[-1].decode(mean, deltas, proposals)


def spread_over_stages(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give all stages of a cascade the box head of a detector that has only one.

    Args:
        tensors: of a whole detector, by name; those of a cascade stay as they are.
    """
    one = {name for name in tensors if name.startswith(ONE_HEAD) and not name.startswith(STAGES)}
    spread = {name: name for name in tensors if name not in one}
    if one:
        logger.info("box_head: one, copied to all %d stages of the cascade", NUM_STAGES)
    for name in one:
        for number in range(NUM_STAGES):
            spread[f"{STAGES}{number}.{name.removeprefix(ONE_HEAD)}"] = name
    return Unread.renamed(tensors, spread)


class _ScaledGradient(torch.autograd.Function):
    """Passes a tensor on unchanged, and multiplies its gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
