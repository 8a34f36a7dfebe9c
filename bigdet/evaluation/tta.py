"""Test-time augmentation: the detections in several views of an image become one result.

Views are sizes, each also mirrored. As in Detectron (``TEST.BBOX_AUG`` with ``UNION``), the
candidates of all views are pooled, near duplicates within a class are removed, boxes may be moved
to the mean of the candidates that agree with them, and the best of each image are kept. As in
detectron2, each view may remove its own near duplicates first (``evaluation.tta.pool``). Masks and
other maps over a box are then computed in every view for the remaining boxes, and averaged. So each
view is run twice if there are such maps: the features of 16 views would not fit on a device.

Letters: B images, D detections of all images, N candidates of all images and views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bigdet.config.evaluation import TtaConfig
from bigdet.config.model import has_keypoints
from bigdet.data.examples.objects import keypoint_order
from bigdet.data.format.manifest import Category
from bigdet.models.detector import Detector, collate_images
from bigdet.models.heads.detections import FlatDetections, best_detections, usable
from bigdet.ops.boxes import pairwise_iou
from bigdet.structures import Batch, Detections

CHUNK = 2**22  # pairs of a detection and a candidate compared at once


class AugmentedDetector(nn.Module):
    """A detector that runs on several views of each image; takes images at their original size."""

    def __init__(
        self,
        detector: Detector,
        config: TtaConfig,
        categories: Sequence[Category],
        plain_size: tuple[int, int] | None = None,
    ) -> None:
        """Wrap a detector; nothing is copied.

        Args:
            detector: any detector of bigdet.
            config: the views.
            categories: their keypoints, of which a mirror exchanges left and right.
            plain_size: short side and longest long side of an evaluation without augmentation,
                pixels. None: the detector's ``eval_size``.
        """
        super().__init__()
        self.mirrored: list[int] = []
        if has_keypoints(detector.config):
            self.mirrored = keypoint_order(categories).tolist()
        self.detector = detector
        self.config = config
        self.plain_size = plain_size or detector.eval_size
        self.training = detector.training

    @torch.no_grad()
    def forward(self, batch: Batch) -> list[Detections]:
        """Return the detections of each image, boxes in pixels of the canvas.

        Args:
            batch: images at their original size.
        """
        detector, sizes = self.detector, batch.image_sizes
        settings, num_classes = detector.eval_settings, detector.num_classes
        seen = []
        for view in self._views(batch):
            found = detector(view.batch, self._find)
            seen.append(replace(found, boxes=view.to_image(found.boxes, found.images)))
        candidates = FlatDetections(
            images=torch.cat([one.images for one in seen]),
            boxes=torch.cat([one.boxes for one in seen]),
            scores=torch.cat([one.scores for one in seen]),
            labels=torch.cat([one.labels for one in seen]),
        )
        found = best_detections(candidates, sizes, num_classes, settings)
        if self.config.vote_iou is not None:
            found = replace(found, boxes=vote(found, candidates, self.config.vote_iou))
        maps: dict[str, Tensor] = {}
        if detector.has_maps:
            maps = self._mean_maps(batch, found)
        return detector.finish(found, maps, len(sizes))

    def _find(self, seen: Batch) -> FlatDetections:
        """Return what one view adds to the pool."""
        features = self.detector.features(seen)
        if self.config.pool == "candidates":
            return usable(self.detector.candidates(features, seen), seen.image_sizes)
        return self.detector.find(features, seen)

    def _mean_maps(self, batch: Batch, found: FlatDetections) -> dict[str, Tensor]:
        """Return the maps of the detections, averaged over the views."""
        sums: dict[str, Tensor] = {}
        num_views = 0
        for view in self._views(batch):
            moved = replace(found, boxes=view.from_image(found.boxes, found.images))
            maps = self.detector(view.batch, partial(self._maps, moved))
            for name, values in maps.items():
                if view.is_flipped:
                    values = values.flip(-1)
                    if name == "keypoints":
                        values = values[:, self.mirrored]
                sums[name] = sums[name] + values if name in sums else values
            num_views += 1
        return {name: values / num_views for name, values in sums.items()}

    def _maps(self, found: FlatDetections, seen: Batch) -> dict[str, Tensor]:
        return self.detector.maps(self.detector.features(seen), found)

    def _views(self, batch: Batch) -> Iterator[View]:
        """Yield the views of a batch, one at a time."""
        # On the CPU, as resizing of uint8 in training is.
        images = [
            image[:, :height, :width]
            for image, (height, width) in zip(
                batch.images.cpu(), batch.image_sizes.tolist(), strict=True
            )
        ]
        for scale in self.config.scales:
            is_plain = scale == self.plain_size[0] and self.config.pool == "candidates"
            cap = self.plain_size[1] if is_plain else self.config.cap
            resized = collate_images(images, (scale, cap))
            for is_flipped in (False, True) if self.config.flip else (False,):
                seen = mirror(resized) if is_flipped else resized
                yield View(seen.to(batch.images.device), batch.image_sizes, is_flipped)


@dataclass(frozen=True)
class View:
    """One view of the images of a batch.

    Attributes:
        batch: the resized, and perhaps mirrored, images.
        image_sizes: ``(B, 2)`` height, width of the original images.
        is_flipped: left and right are exchanged.
    """

    batch: Batch
    image_sizes: Tensor
    is_flipped: bool

    def to_image(self, boxes: Tensor, images: Tensor) -> Tensor:
        """Move boxes ``(D, 4)`` from the view to their images ``(D,)``."""
        seen = self._mirror(boxes, images) if self.is_flipped else boxes
        return seen / self._scales(images).to(boxes.dtype)

    def from_image(self, boxes: Tensor, images: Tensor) -> Tensor:
        """Move boxes ``(D, 4)`` from their images ``(D,)`` into the view."""
        seen = boxes * self._scales(images).to(boxes.dtype)
        return self._mirror(seen, images) if self.is_flipped else seen

    def _scales(self, images: Tensor) -> Tensor:
        """Return the factors ``(D, 4)`` from pixels of the images to pixels of the view."""
        factors = self.batch.image_sizes.double() / self.image_sizes.double()
        return factors.flip(1).repeat(1, 2)[images]

    def _mirror(self, boxes: Tensor, images: Tensor) -> Tensor:
        widths = self.batch.image_sizes[images, 1].to(boxes.dtype)
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        return torch.stack([widths - x1, y0, widths - x0, y1], dim=1)


def mirror(batch: Batch) -> Batch:
    """Exchange left and right of each image; it stays in the top left corner of the canvas."""
    images = torch.zeros_like(batch.images)
    for place, image, (height, width) in zip(
        images, batch.images, batch.image_sizes.tolist(), strict=True
    ):
        place[:, :height, :width] = image[:, :height, :width].flip(2)
    return replace(batch, images=images)


def vote(found: FlatDetections, candidates: FlatDetections, iou: float) -> Tensor:
    """Move boxes to the mean, weighted by score, of the candidates that agree with them.

    Args:
        found: D detections, which are among the candidates.
        candidates: N candidates of all views.
        iou: candidates of the same image and class agree with a box from this IoU on.

    Returns:
        ``(D, 4)`` xyxy, like the boxes of ``found``.
    """
    voted = [found.boxes[:0]]
    for rows in torch.split(
        torch.arange(len(found.boxes), device=found.boxes.device),
        max(CHUNK // max(len(candidates.boxes), 1), 1),
    ):
        boxes = found.boxes[rows]
        is_alike = (found.images[rows, None] == candidates.images) & (
            found.labels[rows, None] == candidates.labels
        )
        # A box overlaps itself by 1, except for rounding and clipping at the image's border.
        agrees = is_alike & (pairwise_iou(boxes, candidates.boxes) >= iou)  # (rows, N)
        weights = agrees * candidates.scores
        totals = weights.sum(dim=1, keepdim=True)
        voted.append(torch.where(totals > 0, weights @ candidates.boxes / totals, boxes))
    return torch.cat(voted)
