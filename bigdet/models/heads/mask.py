"""Mask head: a bitmap per class on a grid over each region (He et al., Mask R-CNN).

Letters: N regions of all images, K classes, S sampled regions of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdet.models.activation_checkpointing import Checkpointed
from bigdet.models.heads.box import Regions
from bigdet.models.heads.positives import Positives, take_positives
from bigdet.models.losses import at_least_fp32, binary_losses, masked_mean
from bigdet.models.norms import Kind as Norm
from bigdet.models.norms import conv_norm
from bigdet.ops.masks import sample_masks
from bigdet.structures import Masks

POOLED_SIZE = 14
MASK_SIZE = 28
NUM_CONVS = 4


@torch.no_grad()
def select_positives(regions: Regions, masks: Masks, num_classes: int) -> Positives:
    """Take the sampled regions that lie on an object with a mask.

    Args:
        regions: B x S sampled regions.
        masks: bitmaps of all objects.
        num_classes: K.
    """
    sizes = torch.nn.functional.pad(masks.sizes, (0, 0, 0, 1))  # to read from without any object
    has_mask = (sizes > 0).all(dim=1)[regions.object_rows]
    return take_positives(regions, has_mask, num_classes)


class OwnClass(nn.Conv2d):
    """A 1x1 convolution to K classes, of which each region takes its own and no other is computed.

    Logits of 80 classes are the largest tensor of the head, and 79 of them are of no use.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        """Have the parameters of the whole convolution."""
        super().__init__(width, num_classes, 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Give the logits ``(N, h, w)`` of ``(N, C, h, w)`` for the labels ``(N,)``."""
        number, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(number, height * width, channels)
        columns = self.weight.view(-1, channels)[labels].unsqueeze(2)  # (N, C, 1)
        logits = torch.bmm(rows, columns).view(number, height, width)
        assert self.bias is not None
        return logits + self.bias[labels].view(-1, 1, 1)


class MaskHead(Checkpointed):
    """Four 3x3 convolutions, a transposed one that doubles the size, then logits per class."""

    def __init__(self, norm: Norm, width: int, num_classes: int) -> None:
        """Build for pooled features of ``width`` channels; all weights MSRA, biases 0."""
        super().__init__()
        self.num_classes = num_classes
        self.convs = nn.Sequential(
            *[conv_norm(width, width, 3, norm, relu=True) for _ in range(NUM_CONVS)]
        )
        self.deconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.predictor = OwnClass(width, num_classes)
        for layer in (self.deconv, self.predictor):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Give the mask logits of each region's class.

        Args:
            pooled: ``(N, C, 14, 14)``.
            labels: ``(N,)`` int64 in ``0..K-1``.

        Returns:
            ``(N, 28, 28)`` in at least single precision.
        """
        hidden = torch.relu_(self.deconv(self.run(self.convs, pooled)))
        return at_least_fp32(self.predictor(hidden, labels))

    def losses(self, logits: Tensor, regions: Positives, masks: Masks) -> dict[str, Tensor]:
        """Give the mean binary cross entropy over the grid points of all valid regions.

        Args:
            logits: ``(N, 28, 28)`` of the objects' classes.
            regions: what they belong to.
            masks: bitmaps of all objects.
        """
        rows = torch.where(regions.is_valid, regions.object_rows, 0)
        targets = sample_masks(_with_empty_object(masks), rows, regions.boxes, MASK_SIZE) >= 0.5
        losses = binary_losses(logits, targets).mean(dim=(1, 2))
        return {"mask": masked_mean(losses, regions.is_valid, regions.is_valid.sum())}


def _with_empty_object(masks: Masks) -> Masks:
    """Add an object without a mask, so that there is something to read when there are none."""
    pad = torch.nn.functional.pad
    return Masks(
        bits=masks.bits,
        offsets=masks.offsets,
        origins=pad(masks.origins, (0, 0, 0, 1)),
        sizes=pad(masks.sizes, (0, 0, 0, 1)),
    )
