"""Feature pyramid network: backbone features of four strides to pyramid features of one width.

Lin et al., *Feature Pyramid Networks for Object Detection* (2017), with the extra level P6 of
Mask R-CNN's proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.models.checkpointing import Checkpointed
from bigdet.models.norms import Kind, conv_norm


class FPN(Checkpointed):
    """Lateral 1x1 convolutions, a top-down path of nearest upsampling, output 3x3 convolutions.

    No activation anywhere. P6 is every second position of P5.
    """

    def __init__(self, in_channels: Sequence[int], width: int, norm: Kind) -> None:
        """Build a level per input, finest first, with Detectron's Xavier initialization."""
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm(c, width, 1, norm) for c in in_channels)
        self.outputs = nn.ModuleList(conv_norm(width, width, 3, norm) for _ in in_channels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # Caffe2's XavierFill: uniform with variance 1 / fan-in.
                nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Mix C2 to C5 into P2 to P6.

        Args:
            features: ``(B, C_i, H_i, W_i)`` per level, finest first, each half the size of the one
                before, rounded up.

        Returns:
            ``(B, width, H_i, W_i)`` per level, and P6 of half P5's size, rounded up.
        """
        pyramid: list[Tensor] = self.run(self._mix, *features)
        return pyramid

    def _mix(self, *features: Tensor) -> list[Tensor]:
        merged = self.laterals[-1](features[-1])
        pyramid = [self.outputs[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.laterals[level](features[level])
            # To the lateral's size and not by a factor of 2: sizes may be odd.
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            pyramid.insert(0, self.outputs[level](merged))
        pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return pyramid
