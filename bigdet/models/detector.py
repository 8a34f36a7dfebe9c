"""The detector: backbone, pyramid, heads; a batch in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigdet.models.assign import pad_objects
from bigdet.models.backbones import Backbone
from bigdet.models.heads.box import POOLED_SIZE as BOX_POOLED_SIZE
from bigdet.models.heads.box import BoxHead, FlatDetections
from bigdet.models.heads.mask import POOLED_SIZE as MASK_POOLED_SIZE
from bigdet.models.heads.mask import MaskHead, pad_to_bucket, select_positives
from bigdet.models.heads.rpn import Proposals, RegionProposals
from bigdet.models.necks.fpn import FPN
from bigdet.models.norms import collect_statistics, valid_rows
from bigdet.ops.boxes import scale_boxes
from bigdet.ops.pooling import FeatureTable, roi_align, tabulate
from bigdet.ops.resize import resize_image, test_size
from bigdet.structures import Batch, Detections, Targets

# RGB, 0..255, of ImageNet: what the published backbones were trained with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_DEVIATION = (58.395, 57.12, 57.375)
CANVAS_MULTIPLE = 32  # the coarsest backbone stride


class Detector(nn.Module):
    """Faster R-CNN, and with a mask head Mask R-CNN, over a feature pyramid.

    Attributes:
        categories: what the labels ``0..K-1`` mean: id, name and more of each.
        test_size: short side and longest long side, pixels, to which ``predict`` resizes.
    """

    def __init__(
        self,
        backbone: Backbone,
        fpn: FPN,
        rpn: RegionProposals,
        box_head: BoxHead,
        mask_head: MaskHead | None,
    ) -> None:
        """Put the parts together; their names are those of ``start_from.parts``."""
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.box_head = box_head
        self.mask_head = mask_head
        self.strides = [*backbone.strides, 2 * backbone.strides[-1]]
        self.categories: list[dict[str, Any]] = []
        self.test_size = (800, 1333)
        mean, deviation = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_DEVIATION)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", deviation.view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Detections]:
        """Give the losses of a batch in training mode, else the detections of its images.

        Losses are ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_delta`` and, with a mask
        head, ``mask``. Boxes of detections are in pixels of the canvas.
        """
        if not self.training:
            return self._detect(batch)
        torch.manual_seed(batch.seed)  # all randomness of the model comes after this line
        with collect_statistics():
            return self._losses(batch)

    def _features(self, batch: Batch) -> list[Tensor]:
        """Give the pyramid P2 to P6 of a batch; everything outside an image is 0."""
        mean, deviation = self.get_buffer("pixel_mean"), self.get_buffer("pixel_deviation")
        height, width = batch.images.shape[-2:]
        lines = (
            torch.arange(height, device=mean.device)[:, None] < batch.image_sizes[:, 0, None, None]
        )
        columns = torch.arange(width, device=mean.device) < batch.image_sizes[:, 1, None, None]
        pixels = batch.images.to(mean.dtype, memory_format=torch.channels_last)
        pixels = (pixels - mean).div_(deviation)
        pixels = pixels.mul_((lines & columns)[:, None])
        features: list[Tensor] = self.fpn(self.backbone(pixels))
        return features

    def _pool(self, table: FeatureTable, boxes: Tensor, images: Tensor, size: int) -> Tensor:
        is_aligned = self.box_head.conventions.roi_align_aligned
        return roi_align(table, boxes, images, size, is_aligned)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        features = self._features(batch)
        canvas_size = (batch.images.shape[2], batch.images.shape[3])
        predictions = self.rpn(features, self.strides, canvas_size)
        objects = pad_objects(batch.targets, predictions.anchors.dtype)
        losses: dict[str, Tensor] = self.rpn.losses(predictions, objects, batch.weights)

        proposals = self.rpn.propose(predictions, batch.image_sizes)
        regions = self.box_head.sample(proposals, objects, batch.weights)
        num_images, num_slots = regions.is_valid.shape
        images = torch.arange(num_images, device=regions.boxes.device)
        table = tabulate(features[:-1], self.strides[:-1])  # P6 is for proposals alone
        pooled = self._pool(
            table, regions.boxes.flatten(0, 1), images.repeat_interleave(num_slots), BOX_POOLED_SIZE
        )
        with valid_rows(regions.is_valid.flatten()):
            logits, deltas = self.box_head(pooled)
        losses |= self.box_head.losses(logits, deltas, regions)

        if self.mask_head is not None:
            masks = batch.targets.masks
            if masks is None:
                raise ValueError(
                    "The batch has no masks, but the model has a mask head. Read the data with "
                    "masks, or train a faster_rcnn."
                )
            positives = select_positives(regions, masks, self.mask_head.num_classes)
            pooled = self._pool(table, positives.boxes, positives.images, MASK_POOLED_SIZE)
            with valid_rows(positives.is_valid):
                mask_logits = self.mask_head(pooled, positives.labels)
            losses |= self.mask_head.losses(mask_logits, positives, masks)
        return losses

    @torch.no_grad()
    def _detect(self, batch: Batch) -> list[Detections]:
        features = self._features(batch)
        canvas_size = (batch.images.shape[2], batch.images.shape[3])
        predictions = self.rpn(features, self.strides, canvas_size)
        proposals: Proposals = self.rpn.propose(predictions, batch.image_sizes)
        num_images, num_slots = proposals.is_valid.shape
        images = torch.arange(num_images, device=proposals.boxes.device)
        table = tabulate(features[:-1], self.strides[:-1])
        pooled = self._pool(
            table,
            proposals.boxes.flatten(0, 1),
            images.repeat_interleave(num_slots),
            BOX_POOLED_SIZE,
        )
        logits, deltas = self.box_head(pooled)
        found = self.box_head.detect(logits, deltas, proposals, batch.image_sizes)
        masks = None if self.mask_head is None else self._masks(self.mask_head, table, found)
        counts = torch.bincount(found.images, minlength=num_images).tolist()
        parts = zip(
            torch.split(found.boxes.float(), counts),
            torch.split(found.scores.float(), counts),
            torch.split(found.labels, counts),
            [None] * num_images if masks is None else torch.split(masks, counts),
            strict=True,
        )
        return [Detections(*part) for part in parts]

    def _masks(self, mask_head: MaskHead, table: FeatureTable, found: FlatDetections) -> Tensor:
        """Give the mask probabilities ``(D, 28, 28)`` of detections; the head runs on none too."""
        num_found = len(found.boxes)
        more = pad_to_bucket(num_found) - num_found
        boxes = torch.nn.functional.pad(found.boxes, (0, 0, 0, more))
        images = torch.nn.functional.pad(found.images, (0, more))
        labels = torch.nn.functional.pad(found.labels, (0, more))
        logits: Tensor = mask_head(self._pool(table, boxes, images, MASK_POOLED_SIZE), labels)
        return logits[:num_found].sigmoid().float()

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detect objects in images of any sizes, in one forward pass.

        Args:
            images: ``(3, h, w)`` uint8 RGB each.

        Returns:
            Detections of each image, boxes in pixels of the image as given. The model is put into
            evaluation mode for the call.
        """
        was_training = self.training
        self.eval()
        batch = _collate(images, self.test_size).to(self.get_buffer("pixel_mean").device)
        found = self(batch)
        self.train(was_training)
        resized = [(int(height), int(width)) for height, width in batch.image_sizes.tolist()]
        return [
            Detections(
                scale_boxes(one.boxes, size, (image.shape[1], image.shape[2])),
                one.scores,
                one.labels,
                one.masks,
            )
            for one, size, image in zip(found, resized, images, strict=True)
        ]


def _collate(images: Sequence[Tensor], short_and_long: tuple[int, int]) -> Batch:
    """Resize images and put them on one canvas, without targets."""
    sizes = [test_size(image.shape[1], image.shape[2], *short_and_long) for image in images]
    height, width = (
        -(-max(size[axis] for size in sizes) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
        for axis in (0, 1)
    )
    canvas = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    canvas = canvas.to(memory_format=torch.channels_last)
    for place, image, size in zip(canvas, images, sizes, strict=True):
        place[:, : size[0], : size[1]] = resize_image(image, size)
    empty = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        boxes=torch.zeros(0, 4),
        labels=empty,
        is_crowd=empty.bool(),
        offsets=torch.zeros(len(images) + 1, dtype=torch.int64),
    )
    return Batch(
        images=canvas,
        image_sizes=torch.tensor(sizes),
        original_sizes=torch.tensor([(image.shape[1], image.shape[2]) for image in images]),
        image_ids=torch.arange(len(images)),
        weights=torch.ones(len(images)),
        targets=targets,
        seed=0,
    )
