"""RetinaNet: a detector that looks once, at every anchor of a pyramid (Lin et al., 2017)."""

from __future__ import annotations

from torch import Tensor

from bigdet.config.model import ModelConfig, used
from bigdet.models.assign import pad_objects
from bigdet.models.backbone_base import Backbone
from bigdet.models.detector import Detector
from bigdet.models.heads.detections import EvalSettings, FlatDetections
from bigdet.models.heads.retina import RetinaHead, RetinaPredictions
from bigdet.models.necks.fpn import RetinaFPN
from bigdet.structures import Batch


class RetinaNet(Detector):
    """A head over P3 to P7. Losses are ``retina_class`` and ``retina_box``."""

    dense_parts = ("backbone", "fpn", "retina_head")

    def __init__(self, backbone: Backbone, fpn: RetinaFPN, retina_head: RetinaHead) -> None:
        """Put the parts together."""
        super().__init__(backbone)
        self.fpn = fpn
        self.retina_head = retina_head
        coarsest = backbone.strides[-1]
        self.strides = [*backbone.strides[1:], 2 * coarsest, 4 * coarsest]

    def use_eval_settings(self, config: ModelConfig) -> None:
        """Take thresholds and limits of the detections from a config."""
        self.retina_head.config = used(config.retina)

    def _predictions(self, batch: Batch) -> RetinaPredictions:
        features = self.fpn(self.backbone(self.pixels(batch))[1:])  # C3 to C5 to P3 to P7
        size = self.seen_size(batch)
        predictions: RetinaPredictions = self.retina_head(features, self.strides, size)
        return predictions

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Give the losses of a batch, means over the lane."""
        predictions: RetinaPredictions = self.run_dense(self._predictions, batch)
        objects = pad_objects(batch.targets, predictions.anchors.dtype)
        return self.retina_head.losses(predictions, objects, batch.weights)

    def features(self, batch: Batch) -> RetinaPredictions:
        """Compute the predictions for every anchor."""
        return self._predictions(batch)

    def find(self, features: RetinaPredictions, batch: Batch) -> FlatDetections:
        """Give the detections."""
        return self.retina_head.detect(features, batch.image_sizes)

    def candidates(self, features: RetinaPredictions, batch: Batch) -> FlatDetections:
        """Give the best of each level above the threshold, near duplicates too."""
        return self.retina_head.decode(features, len(batch.image_sizes))

    def maps(self, features: RetinaPredictions, found: FlatDetections) -> dict[str, Tensor]:
        """Give no maps: a RetinaNet finds boxes only."""
        return {}

    @property
    def has_maps(self) -> bool:
        """False."""
        return False

    @property
    def eval_settings(self) -> EvalSettings:
        """Thresholds and limits of the detections."""
        return self.retina_head.config
