"""VGG-16 (Simonyan and Zisserman, 2015) as a backbone: one map of stride 16, no normalization."""

from __future__ import annotations

from torch import Tensor, nn

from bigdet.models.backbone_base import Backbone

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each stage; a stage begins with a pooling, but for the first."""


class VGG(Backbone):
    """The convolutions of VGG-16 up to conv5_3, numbered as in timm and torchvision."""

    def __init__(self) -> None:
        """Build with MSRA weights (paper 1) and biases 0.

        With the fan-in, which keeps the size of activations: the fan-out, with which MSRA keeps
        that of gradients and which backbones with normalization have, lets them fall in each layer
        that has more outputs than inputs: to a fifteenth at conv5_3.
        """
        super().__init__()
        layers: list[nn.Module] = []
        self._ends = []
        channels = 3
        for index, widths in enumerate(WIDTHS):
            if index:
                # Rounded up, as all strides of the other backbones are.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for width in widths:
                conv = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
                layers += [conv, nn.ReLU(inplace=True)]
                channels = width
            self._ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.channels = [channels]
        self.strides = [16]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The five groups of convolutions."""
        starts = [0, *self._ends]
        layers = list(self.features)
        return [layers[start:end] for start, end in zip(starts, self._ends, strict=False)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute conv5_3: one map ``(B, 512, ceil(H / 16), ceil(W / 16))``."""
        x = images
        for stage in self.stages:
            x = self.run(nn.Sequential(*stage), x)
        return [x]
