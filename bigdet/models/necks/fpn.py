"""Feature pyramid network: backbone features of four strides to pyramid features of one width.

Lin et al., *Feature Pyramid Networks for Object Detection* (2017), with the extra level P6 of
Mask R-CNN's proposals, or P6 and P7 of RetinaNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.models.activation_checkpointing import Checkpointed
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
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]

    def _mix(self, *features: Tensor) -> list[Tensor]:
        """Give a level of the pyramid for each of the backbone's."""
        merged = self.laterals[-1](features[-1])
        pyramid = [self.outputs[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.laterals[level](features[level])
            # To the lateral's size and not by a factor of 2: sizes may be odd.
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            pyramid.insert(0, self.outputs[level](merged))
        return pyramid


class SimplePyramid(FPN):
    """ViTDet's simple feature pyramid (Li et al. 2022): the same layers, without a top-down path.

    What makes four levels of a plain backbone's last map belongs to the backbone. Convolutions
    begin with torch's weights, as in detectron2's.
    """

    def __init__(self, in_channels: Sequence[int], width: int, norm: Kind) -> None:
        """Build a level per input, finest first."""
        super().__init__(in_channels, width, norm)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def _mix(self, *features: Tensor) -> list[Tensor]:
        """Give a level of the pyramid for each of the backbone's."""
        return [
            output(lateral(feature))
            for output, lateral, feature in zip(self.outputs, self.laterals, features, strict=True)
        ]


class RetinaFPN(FPN):
    """The pyramid of RetinaNet: two convolutions of stride 2 go on from C5 (or P5) to P6 and P7."""

    def __init__(
        self, in_channels: Sequence[int], width: int, norm: Kind, p6_source: Literal["c5", "p5"]
    ) -> None:
        """Build a level per input and two more; P6 and P7 never have a normalization."""
        super().__init__(in_channels, width, norm)
        self.p6_source = p6_source
        p6_channels = in_channels[-1] if p6_source == "c5" else width
        self.p6 = nn.Conv2d(p6_channels, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Mix C3 to C5 into P3 to P7; each has half the size of the one before, rounded up."""
        pyramid: list[Tensor] = self.run(self._mix, *features)
        p6 = _halve(self.p6, features[-1] if self.p6_source == "c5" else pyramid[-1])
        return [*pyramid, p6, _halve(self.p7, torch.relu(p6))]


def _halve(layer: nn.Module, feature: Tensor) -> Tensor:
    """Apply a 3x3 convolution of stride 2 and padding 1.

    On a map of one row or column, torch 2.15 leaves numbers of the weights' gradient unset in bf16
    on a CPU. Zeros next to it change nothing, and avoid that.
    """
    height, width = feature.shape[-2:]
    if 1 in (height, width):
        feature = F.pad(feature, (0, int(width == 1), 0, int(height == 1)))
    result: Tensor = layer(feature)
    return result
