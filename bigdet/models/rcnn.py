"""Two-stage detectors: proposals over a pyramid, then heads on each proposal (R-CNN family)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bigdet.config.model import ModelConfig, used
from bigdet.models.assign import pad_objects
from bigdet.models.backbone_base import Backbone
from bigdet.models.detector import Detector
from bigdet.models.heads.box import POOLED_SIZE as BOX_POOLED_SIZE
from bigdet.models.heads.box import BoxHead, Pool
from bigdet.models.heads.cascade import CascadeHead
from bigdet.models.heads.detections import EvalSettings, FlatDetections
from bigdet.models.heads.keypoint import POOLED_SIZE as KEYPOINT_POOLED_SIZE
from bigdet.models.heads.keypoint import KeypointHead, select_with_keypoints
from bigdet.models.heads.mask import POOLED_SIZE as MASK_POOLED_SIZE
from bigdet.models.heads.mask import MaskHead, select_positives
from bigdet.models.heads.positives import pad_to_bucket
from bigdet.models.heads.rpn import AnchorPredictions, Proposals, RegionProposals
from bigdet.models.necks.fpn import FPN
from bigdet.models.norms import valid_rows
from bigdet.ops.pooling import FeatureTable, roi_align, tabulate
from bigdet.structures import Batch


class RCNN(Detector):
    """Faster R-CNN over a pyramid or one map (VGG); with more heads Mask or Keypoint R-CNN.

    Losses are ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_delta``, with a mask head
    ``mask``, and with a keypoint head ``keypoint``. A cascade as box head has
    ``stage1_box_class``, ..., ``stage3_box_delta`` instead.
    """

    dense_parts = ("backbone", "fpn", "rpn")

    def __init__(
        self,
        backbone: Backbone,
        fpn: FPN | None,
        rpn: RegionProposals,
        box_head: BoxHead | CascadeHead,
        mask_head: MaskHead | None,
        keypoint_head: KeypointHead | None,
    ) -> None:
        """Put the parts together."""
        super().__init__(backbone)
        self.fpn = fpn
        self.rpn = rpn
        self.box_head = box_head
        self.mask_head = mask_head
        self.keypoint_head = keypoint_head
        self.strides = list(backbone.strides)
        if fpn is not None:
            self.strides.append(2 * backbone.strides[-1])

    def use_eval_settings(self, config: ModelConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        self.box_head.use_eval_settings(used(config.roi))

    def _features(self, batch: Batch) -> list[Tensor]:
        """Give the pyramid P2 to P6, or without an FPN what the backbone gives."""
        features: list[Tensor] = self.backbone(self.pixels(batch))
        return features if self.fpn is None else self.fpn(features)

    def _table(self, features: list[Tensor]) -> FeatureTable:
        """Lay out what regions are pooled from: P6 is for proposals alone."""
        strides = self.backbone.strides
        return tabulate(features[: len(strides)], strides)

    def _pool(self, table: FeatureTable, boxes: Tensor, images: Tensor, size: int) -> Tensor:
        is_aligned = self.rpn.conventions.roi_align_aligned
        ratio = used(self.config.roi).sampling_ratio
        return roi_align(table, boxes, images, size, is_aligned, ratio)

    def _pool_all(self, table: FeatureTable, boxes: Tensor) -> Tensor:
        """Give the features ``(N, C, 7, 7)`` of regions ``(B, S, 4)`` of all images, N = B x S."""
        num_images, num_slots = boxes.shape[:2]
        images = torch.arange(num_images, device=boxes.device).repeat_interleave(num_slots)
        return self._pool(table, boxes.flatten(0, 1), images, BOX_POOLED_SIZE)

    def _dense(self, batch: Batch) -> tuple[AnchorPredictions, FeatureTable]:
        """Give what the dense parts do for the rest of a training step."""
        features = self._features(batch)
        predictions: AnchorPredictions = self.rpn(features, self.strides, self.seen_size(batch))
        return predictions, self._table(features)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Give the losses of a batch, means over the lane."""
        predictions, table = self.run_dense(self._dense, batch)
        objects = pad_objects(batch.targets, predictions.anchors.dtype)
        losses: dict[str, Tensor] = self.rpn.losses(
            predictions, objects, batch.weights, batch.image_sizes
        )

        proposals = self.rpn.propose(predictions, batch.image_sizes)
        pool = partial(self._pool_all, table)
        box_losses, regions = self.box_head.train_on(
            pool, proposals, objects, batch.weights, batch.image_sizes
        )
        losses |= box_losses

        if self.mask_head is not None:
            masks = batch.targets.masks
            if masks is None:
                raise ValueError(
                    "The batch has no masks, but the model has a mask head. Read the data with "
                    "masks, or train a faster_rcnn."
                )
            positives = select_positives(regions, masks, self.mask_head.num_classes)
            pooled = self._pool(table, positives.boxes, positives.images, MASK_POOLED_SIZE)
            with valid_rows(self.mask_head, positives.is_valid):
                mask_logits = self.mask_head(pooled, positives.labels)
            losses |= self.mask_head.losses(mask_logits, positives, masks)

        if self.keypoint_head is not None:
            keypoints = batch.targets.keypoints
            if keypoints is None:
                raise ValueError(
                    "The batch has no keypoints, but the model has a keypoint head. Read the data "
                    "with keypoints, or train a faster_rcnn."
                )
            chosen = select_with_keypoints(regions, keypoints, self.keypoint_head.num_classes)
            pooled = self._pool(table, chosen.boxes, chosen.images, KEYPOINT_POOLED_SIZE)
            with valid_rows(self.keypoint_head, chosen.is_valid):
                heat_maps = self.keypoint_head(pooled)
            losses |= self.keypoint_head.losses(heat_maps, chosen, keypoints)
        return losses

    def features(self, batch: Batch) -> tuple[list[Tensor], FeatureTable]:
        """Compute the pyramid, also as a table to pool regions from."""
        features = self._features(batch)
        return features, self._table(features)

    def find(self, features: tuple[list[Tensor], FeatureTable], batch: Batch) -> FlatDetections:
        """Propose regions and give the detections among them."""
        pool, proposals = self._propose(features, batch)
        return self.box_head.find(pool, proposals, batch.image_sizes)

    def candidates(
        self, features: tuple[list[Tensor], FeatureTable], batch: Batch
    ) -> FlatDetections:
        """Propose regions and give all boxes above the threshold, near duplicates too."""
        pool, proposals = self._propose(features, batch)
        return self.box_head.candidates(pool, proposals, batch.image_sizes)

    def _propose(
        self, features: tuple[list[Tensor], FeatureTable], batch: Batch
    ) -> tuple[Pool, Proposals]:
        """Give the proposals of a batch, and what pools the features of regions."""
        pyramid, table = features
        predictions = self.rpn(pyramid, self.strides, self.seen_size(batch))
        proposals: Proposals = self.rpn.propose(predictions, batch.image_sizes)
        if proposals.boxes.device.type == "cpu":
            # Empty slots come last. On a GPU they cost less time than to wait for their number.
            most = pad_to_bucket(int(proposals.is_valid.sum(dim=1).max()), proposals.boxes.device)
            proposals = Proposals(proposals.boxes[:, :most], proposals.is_valid[:, :most])
        return partial(self._pool_all, table), proposals

    def maps(
        self, features: tuple[list[Tensor], FeatureTable], found: FlatDetections
    ) -> dict[str, Tensor]:
        """Give the probabilities of masks and the logits of keypoints, where there are heads.

        Returns:
            ``masks`` ``(D, 28, 28)`` and ``keypoints`` ``(D, K, 56, 56)``.
        """
        _, table = features
        maps = {}
        if self.mask_head is not None:
            maps["masks"] = self._masks(self.mask_head, table, found)
        if self.keypoint_head is not None:
            maps["keypoints"] = self._heat_maps(self.keypoint_head, table, found)
        return maps

    @property
    def has_maps(self) -> bool:
        """Whether there are masks or keypoints."""
        return self.mask_head is not None or self.keypoint_head is not None

    @property
    def eval_settings(self) -> EvalSettings:
        """Thresholds and limits of the detections."""
        head = self.box_head
        last = head.stages[-1] if isinstance(head, CascadeHead) else head
        assert isinstance(last, BoxHead)
        return last.config

    def _masks(self, mask_head: MaskHead, table: FeatureTable, found: FlatDetections) -> Tensor:
        """Give the mask probabilities ``(D, 28, 28)`` of detections; the head runs on none too."""
        filled = _fill_bucket(found)
        pooled = self._pool(table, filled.boxes, filled.images, MASK_POOLED_SIZE)
        logits: Tensor = mask_head(pooled, filled.labels)
        return logits[: len(found.boxes)].sigmoid().float()

    def _heat_maps(self, head: KeypointHead, table: FeatureTable, found: FlatDetections) -> Tensor:
        """Give the logits ``(D, K, 56, 56)`` of detections; the head runs on none too."""
        filled = _fill_bucket(found)
        pooled = self._pool(table, filled.boxes, filled.images, KEYPOINT_POOLED_SIZE)
        logits: Tensor = head(pooled)
        return logits[: len(found.boxes)]


def _fill_bucket(found: FlatDetections) -> FlatDetections:
    """Add empty detections up to a full bucket."""
    more = pad_to_bucket(len(found.boxes), found.boxes.device) - len(found.boxes)
    pad = torch.nn.functional.pad
    return FlatDetections(
        images=pad(found.images, (0, more)),
        boxes=pad(found.boxes, (0, 0, 0, more)),
        scores=pad(found.scores, (0, more)),
        labels=pad(found.labels, (0, more)),
    )
