"""A detector with fixed shapes throughout, for torch.export and ONNX.

Outputs always have the same size: the best D detections of each image, and which of them are valid.
Regions are pooled by torchvision's RoIAlign, which ONNX knows, instead of the
embedding bag of training; the numbers are the same.

Letters: B images, D detections of an image, R regions of an image, K classes, n candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from bigdet.config.model import used
from bigdet.models.detector import Detector
from bigdet.models.heads.box import POOLED_SIZE as BOX_POOLED_SIZE
from bigdet.models.heads.box import BoxHead, deltas_of
from bigdet.models.heads.detections import MIN_SIDE
from bigdet.models.heads.mask import POOLED_SIZE as MASK_POOLED_SIZE
from bigdet.models.heads.retina import DELTA_WEIGHTS as RETINA_DELTA_WEIGHTS
from bigdet.models.losses import at_least_fp32
from bigdet.models.rcnn import RCNN
from bigdet.models.retinanet import RetinaNet
from bigdet.ops.boxes import clip_boxes, decode_deltas
from bigdet.ops.nms import spread_nms
from bigdet.ops.pooling import pyramid_levels
from bigdet.structures import Batch, Targets


class FixedDetector(nn.Module):
    """A Faster or Mask R-CNN or a RetinaNet whose outputs have fixed shapes."""

    def __init__(self, detector: Detector, num_candidates: int) -> None:
        """Take a detector, in evaluation mode.

        Args:
            detector: on the CPU in fp32.
            num_candidates: n, for an R-CNN: how many pairs of region and class above the threshold
                enter NMS; the detector itself has no such limit.
        """
        super().__init__()
        self.detector = detector
        self.num_candidates = num_candidates

    @torch.no_grad()
    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect the objects on B images.

        Args:
            images: ``(B, 3, H, W)`` uint8 RGB, each image in the top left corner, the rest 0.
            image_sizes: ``(B, 2)`` int64 height, width of each image on the canvas.

        Returns:
            Boxes ``(B, D, 4)`` in pixels of the canvas, scores ``(B, D)`` descending, labels
            ``(B, D)`` int64, is_valid ``(B, D)`` bool: which are valid; with a mask head
            masks ``(B, D, 28, 28)``, probabilities on a grid over the box.
        """
        batch = plain_batch(images, image_sizes)
        detector = self.detector
        if isinstance(detector, RetinaNet):
            return self._select(*self._retina_candidates(detector, batch), image_sizes)
        assert isinstance(detector, RCNN)
        pyramid, _ = detector.features(batch)
        predictions = detector.rpn(pyramid, detector.strides, detector.seen_size(batch))
        proposals = detector.rpn.propose(predictions, image_sizes, spread_nms)
        candidates = self._box_candidates(detector, pyramid, proposals.boxes, proposals.is_valid)
        found = self._select(*candidates, image_sizes)
        if detector.mask_head is None:
            return found
        boxes, _, labels, _ = found
        pooled = _pool(detector, pyramid, boxes, MASK_POOLED_SIZE)
        logits = detector.mask_head(pooled, labels.flatten())
        return (*found, logits.sigmoid().view(*labels.shape, *logits.shape[1:]))

    def _box_candidates(
        self, detector: RCNN, pyramid: Sequence[Tensor], regions: Tensor, is_valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes ``(B, n, 4)``, scores (-inf for none) and labels ``(B, n)`` of the best."""
        head = detector.box_head
        assert isinstance(head, BoxHead)
        logits, deltas = head(_pool(detector, pyramid, regions, BOX_POOLED_SIZE))
        scores = logits.softmax(dim=-1)[:, :-1].view(*is_valid.shape, -1)  # (B, R, K)
        is_candidate = (scores > head.config.score_threshold) & is_valid[..., None]
        scores = torch.where(is_candidate, scores, -torch.inf).flatten(1)
        best = scores.topk(min(self.num_candidates, scores.shape[1]), dim=1)
        num_images, num_regions = is_valid.shape
        rows, labels = best.indices // head.num_classes, best.indices % head.num_classes
        taken = regions.gather(1, rows[..., None].expand(-1, -1, 4))
        flat = rows + torch.arange(num_images)[:, None] * num_regions
        own = deltas_of(deltas[flat.flatten()], labels.flatten()).view_as(taken)
        return decode_deltas(own, taken, head.delta_weights), best.values, labels

    def _retina_candidates(
        self, detector: RetinaNet, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes ``(B, n, 4)``, scores (-inf for none) and labels ``(B, n)`` of the best."""
        predictions = detector.features(batch)
        config, num_classes = detector.retina_head.config, detector.num_classes
        all_scores, anchors, labels, first_anchor = [], [], [], 0
        for level in predictions.logits:
            scores = at_least_fp32(level).sigmoid().flatten(1)  # (B, A_l * K)
            scores = torch.where(scores > config.score_threshold, scores, -torch.inf)
            best = scores.topk(min(config.candidates_per_level, scores.shape[1]), dim=1)
            all_scores.append(best.values)
            anchors.append(best.indices // num_classes + first_anchor)
            labels.append(best.indices % num_classes)
            first_anchor += level.shape[1]
        rows = torch.cat(anchors, dim=1)
        deltas = predictions.deltas.gather(1, rows[..., None].expand(-1, -1, 4))
        boxes = decode_deltas(deltas, predictions.anchors[rows], RETINA_DELTA_WEIGHTS)
        return boxes, torch.cat(all_scores, dim=1), torch.cat(labels, dim=1)

    def _select(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clip boxes to their images, drop near duplicates, keep the best D of each image."""
        num_images, num_classes = len(boxes), self.detector.num_classes
        settings = self.detector.eval_settings
        boxes = clip_boxes(boxes, image_sizes)
        is_usable = boxes.isfinite().all(-1) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
        boxes = torch.where(is_usable[..., None], boxes, 0.0)
        scores = torch.where(is_usable, scores, -torch.inf)
        groups = torch.arange(num_images)[:, None] * num_classes + labels
        kept = spread_nms(
            boxes.flatten(0, 1),
            scores.flatten(),
            groups.flatten(),
            num_images * num_classes,
            settings.nms_iou,
        ).view_as(scores)
        scores = torch.where(kept, scores, -torch.inf)
        best = scores.topk(min(settings.detections_per_image, scores.shape[1]), dim=1)
        is_valid = best.values > -torch.inf
        chosen = boxes.gather(1, best.indices[..., None].expand(-1, -1, 4))
        return (
            torch.where(is_valid[..., None], chosen, 0.0),
            torch.where(is_valid, best.values, 0.0),
            torch.where(is_valid, labels.gather(1, best.indices), 0),
            is_valid,
        )


def _pool(detector: RCNN, pyramid: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Return the features ``(N, C, size, size)`` of regions ``(B, S, 4)``, N = B x S."""
    num_images, num_slots = boxes.shape[:2]
    flat = boxes.flatten(0, 1)
    images = torch.arange(num_images).repeat_interleave(num_slots).to(flat.dtype)
    regions = torch.cat([images[:, None], flat], dim=1)  # (N, 5)
    strides = detector.backbone.strides
    levels = pyramid_levels(flat, strides)
    is_aligned = detector.rpn.conventions.roi_align_aligned
    ratio = used(detector.config.roi).sampling_ratio
    pooled = pyramid[0].new_zeros(len(flat), pyramid[0].shape[1], size, size)
    for number, (level, stride) in enumerate(zip(pyramid, strides, strict=False)):  # P6: not pooled
        rows = (levels == number).nonzero().squeeze(1)
        part = roi_align(level, regions[rows], size, 1 / stride, ratio, is_aligned)
        pooled = pooled.index_put((rows,), part)
    return pooled


def plain_batch(images: Tensor, image_sizes: Tensor) -> Batch:
    """Put images into a batch without targets."""
    num_images = images.shape[0]
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        images=images,
        image_sizes=image_sizes,
        original_sizes=image_sizes,
        image_ids=torch.arange(num_images),
        weights=torch.ones(num_images),
        targets=Targets(
            torch.zeros(0, 4), none, none.bool(), torch.zeros(num_images + 1, dtype=torch.int64)
        ),
        seed=0,
    )
