"""What a backbone is: images in, features of four strides out, stages that can be frozen."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from bigdet.models.activation_checkpointing import Checkpointed

STRIDES = [4, 8, 16, 32]


class Backbone(Checkpointed):
    """Images to features of four strides.

    Attributes:
        channels: of C2 to C5.
        strides: of C2 to C5, pixels.
        stages: the modules of the stem and of the four stages, in the order of freezing.
    """

    channels: list[int]
    strides = STRIDES

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images: ``(B, 3, H, W)`` normalized, any H and W, best in channels_last memory.

        Returns:
            C2 to C5: ``(B, C_i, ceil(H / stride_i), ceil(W / stride_i))``.
        """
        raise NotImplementedError

    def run_all(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run blocks one after the other, each by itself where checkpointing is on."""
        for block in blocks:
            x = self.run(block, x)
        return x

    def add_output_norms(self) -> None:
        """Give each of C2 to C5 a LayerNorm over channels, ``norm0`` to ``norm3``."""
        for index, channels in enumerate(self.channels):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))

    def output(self, index: int, x: Tensor) -> Tensor:
        """Normalize ``(B, h, w, C)`` of stage ``index`` into ``(B, C, h, w)``, channels_last."""
        normalized: Tensor = getattr(self, f"norm{index}")(x)
        return normalized.permute(0, 3, 1, 2)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Append zeros below and to the right of ``(B, C, H, W)`` until the multiple divides both."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def cut_to_size(features: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Drop what lies wholly outside an image of ``size`` from features of `STRIDES`."""
    return [
        feature[..., : -(-size[0] // stride), : -(-size[1] // stride)]
        for feature, stride in zip(features, STRIDES, strict=True)
    ]
