"""RetinaNet: a detector that looks once, at every anchor of a pyramid (Lin et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from bigdet.config.schema import ModelConfig
from bigdet.models.assign import pad_objects
from bigdet.models.backbones import Backbone
from bigdet.models.detector import Detector
from bigdet.models.heads.retina import RetinaHead, RetinaPredictions
from bigdet.models.necks.fpn import RetinaFPN
from bigdet.structures import Batch, Detections


class RetinaNet(Detector):
    """A head over P3 to P7. Losses are ``retina_class`` and ``retina_box``."""

    def __init__(self, backbone: Backbone, fpn: RetinaFPN, retina_head: RetinaHead) -> None:
        """Put the parts together."""
        super().__init__(backbone)
        self.fpn = fpn
        self.retina_head = retina_head
        coarsest = backbone.strides[-1]
        self.strides = [*backbone.strides[1:], 2 * coarsest, 4 * coarsest]

    def use_test_settings(self, config: ModelConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        self.retina_head.config = config.retina

    def _predictions(self, batch: Batch) -> RetinaPredictions:
        features = self.fpn(self.backbone(self._pixels(batch))[1:])  # C3 to C5 to P3 to P7
        canvas_size = (batch.images.shape[2], batch.images.shape[3])
        predictions: RetinaPredictions = self.retina_head(features, self.strides, canvas_size)
        return predictions

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        predictions = self._predictions(batch)
        objects = pad_objects(batch.targets, predictions.anchors.dtype)
        return self.retina_head.losses(predictions, objects, batch.weights)

    def _detect(self, batch: Batch) -> list[Detections]:
        found = self.retina_head.detect(self._predictions(batch), batch.image_sizes)
        counts = torch.bincount(found.images, minlength=len(batch.image_sizes)).tolist()
        parts = zip(
            torch.split(found.boxes.float(), counts),
            torch.split(found.scores.float(), counts),
            torch.split(found.labels, counts),
            strict=True,
        )
        return [Detections(*part) for part in parts]
