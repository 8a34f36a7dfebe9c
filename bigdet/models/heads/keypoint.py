"""Keypoint head: a heat map per keypoint on a grid over each region (He et al., Mask R-CNN).

Letters: N regions of all images, K keypoints of an object (not classes, here), M objects of all
images, S sampled regions of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.config.heads import KeypointConfig
from bigdet.models.activation_checkpointing import Checkpointed
from bigdet.models.heads.box import Regions
from bigdet.models.heads.positives import Positives, take_positives
from bigdet.models.losses import at_least_fp32, class_losses, masked_mean
from bigdet.models.norms import Kind as Norm
from bigdet.models.norms import conv_norm

POOLED_SIZE = 14
HEATMAP_SIZE = 56
NUM_CONVS = 8


def keypoint_cells(keypoints: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the cell of a region's grid that each keypoint lies in.

    Args:
        keypoints: ``(N, K, 3)`` x, y, visibility.
        boxes: ``(N, 4)`` the regions.

    Returns:
        ``(N, K)`` int64 in ``0..56 * 56 - 1``, row after row, and ``(N, K)`` bool, whether the
        keypoint is labeled (hidden or not) and in the region; points on its right and lower edge
        are.
    """
    corners, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    points = keypoints[..., :2].to(boxes.dtype)
    places = ((points - corners) * (HEATMAP_SIZE / sides)).floor().long()
    places = torch.where(points == boxes[:, None, 2:], HEATMAP_SIZE - 1, places)
    is_inside = ((places >= 0) & (places < HEATMAP_SIZE)).all(dim=-1)
    is_valid = is_inside & (keypoints[..., 2] > 0)
    cells = places[..., 1] * HEATMAP_SIZE + places[..., 0]
    return torch.where(is_valid, cells, 0), is_valid


@torch.no_grad()
def select_with_keypoints(regions: Regions, keypoints: Tensor, num_classes: int) -> Positives:
    """Take the sampled regions on an object of which a keypoint can be learned there.

    Args:
        regions: B x S sampled regions.
        keypoints: ``(M, K, 3)`` of all objects.
        num_classes: number of classes.
    """
    own = _with_empty_object(keypoints)[regions.object_rows.flatten()]
    _, is_valid = keypoint_cells(own, regions.boxes.flatten(0, 1))
    is_wanted = is_valid.any(dim=1).view_as(regions.is_positive)
    return take_positives(regions, is_wanted, num_classes)


class KeypointHead(Checkpointed):
    """Eight 3x3 convolutions, a transposed one to heat maps, then twice their size."""

    def __init__(self, norm: Norm, width: int, config: KeypointConfig, num_classes: int) -> None:
        """Build for pooled features of ``width`` channels; all weights MSRA, biases 0.

        Args:
            norm: of the convolutions.
            width: channels of the pooled features.
            config: sizes of the head.
            num_classes: number of classes; all have the same heat maps.
        """
        super().__init__()
        self.num_classes = num_classes
        self.min_visible = config.min_visible
        widths = [width] + [config.width] * NUM_CONVS
        self.convs = nn.Sequential(
            *[conv_norm(widths[i], widths[i + 1], 3, norm, relu=True) for i in range(NUM_CONVS)]
        )
        self.deconv = nn.ConvTranspose2d(config.width, config.num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        assert self.deconv.bias is not None
        nn.init.zeros_(self.deconv.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Give the logits ``(N, K, 56, 56)``, in at least single precision.

        Args:
            pooled: ``(N, C, 14, 14)``.
        """
        logits = at_least_fp32(self.deconv(self.run(self.convs, pooled)))
        return F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)

    def losses(self, logits: Tensor, regions: Positives, keypoints: Tensor) -> dict[str, Tensor]:
        """Give the mean cross entropy, over a grid's cells, of the keypoints that can be learned.

        It is 0 if there are fewer than ``min_visible`` of them.

        Args:
            logits: ``(N, K, 56, 56)``.
            regions: what they belong to.
            keypoints: ``(M, K, 3)`` of all objects.
        """
        rows = torch.where(regions.is_valid, regions.object_rows, 0)
        cells, is_valid = keypoint_cells(_with_empty_object(keypoints)[rows], regions.boxes)
        is_valid &= regions.is_valid[:, None]
        losses = class_losses(logits.flatten(2), cells)  # (N, K)
        count = is_valid.sum()
        return {"keypoint": masked_mean(losses, is_valid & (count >= self.min_visible), count)}


def _with_empty_object(keypoints: Tensor) -> Tensor:
    """Add an object without keypoints, so that there is something to read when there are none."""
    return F.pad(keypoints, (0, 0, 0, 0, 0, 1))


@torch.no_grad()
def find_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """Find the peak of each heat map, drawn at the size of its box, as the published code does.

    Args:
        logits: ``(N, K, 56, 56)``.
        boxes: ``(N, 4)``.

    Returns:
        ``(N, K, 3)`` x, y in the boxes' pixels, and the logit at the peak. The host waits for the
        sizes of the boxes; one map is drawn after the other, as they may be as large as the image.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    found = logits.new_zeros(*logits.shape[:2], 3)
    cell_sizes = sides / sides.ceil()
    for number, (width, height) in enumerate(sides.ceil().long().tolist()):
        maps = F.interpolate(
            logits[number : number + 1], size=(height, width), mode="bicubic", align_corners=False
        )[0]  # (K, height, width)
        scores, places = maps.flatten(1).max(dim=1)
        cells = torch.stack([places % width, places // width], dim=1).to(boxes.dtype)
        found[number, :, :2] = boxes[number, :2] + (cells + 0.5) * cell_sizes[number]
        found[number, :, 2] = scores
    return found
