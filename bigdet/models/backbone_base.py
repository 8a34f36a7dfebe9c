"""What a backbone is: images in, features of four strides out, stages that can be frozen."""

from __future__ import annotations

from torch import Tensor, nn

STRIDES = [4, 8, 16, 32]


class Backbone(nn.Module):
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
