"""Attention within windows, for networks whose own attention is over the whole image.

Two kinds: windows of tokens in most blocks (ViTDet), for networks whose positions are added to the
tokens or, as in EVA-02's detectors, rotary and scaled to one grid; and windows of the image, each
of which goes through the network as an image by itself (DINOv3), for any rotary positions, which
count from the corner of what they see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from bigdet.models.backbones.any_size import derived


class WindowedAttention(nn.Module):
    """Methods for an attention layer of timm that make it attend within windows of tokens.

    Windows that reach over the edge are filled with zeros, without a mask, as ViTDet's own. Each
    window attends to the prefix tokens (class, registers) too; these become the mean of what they
    are in the windows.

    Attributes:
        grid_size: rows and columns of tokens, set before each pass.
        window_rope: rotary positions of the tokens of a window, set before each pass; None without.
        window: tokens on a side of a window.
        num_prefix: tokens before those of the grid.
    """

    grid_size: tuple[int, int]
    window_rope: Tensor | None = None
    window: int
    num_prefix: int

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Attend over the tokens ``(B, P + h x w, C)``, P prefix tokens first."""
        height, width = self.grid_size
        size = (self.window, self.window)
        batch, _, channels = x.shape
        prefix, tokens = x[:, : self.num_prefix], x[:, self.num_prefix :]
        tokens = tokens.reshape(batch, height, width, channels)
        tokens = F.pad(tokens, (0, 0, 0, -width % self.window, 0, -height % self.window))
        windows = window_partition(tokens, size)  # (B x windows, window, window, C)
        count = len(windows) // batch
        given = torch.cat([prefix.repeat_interleave(count, dim=0), windows.flatten(1, 2)], dim=1)
        if self.window_rope is not None:
            options["rope"] = self.window_rope
        attended: Tensor = super().forward(given, **options)
        prefix = attended[:, : self.num_prefix]
        prefix = prefix.reshape(batch, count, self.num_prefix, channels).mean(dim=1)
        windows = attended[:, self.num_prefix :].reshape(windows.shape)
        tokens = window_reverse(windows, size, tokens.shape[1], tokens.shape[2])
        return torch.cat([prefix, tokens[:, :height, :width].flatten(1, 2)], dim=1)


def use_windows(attention: nn.Module, window: int, num_prefix: int) -> None:
    """Let an attention layer attend within windows of tokens; its weights stay."""
    attention.__class__ = derived(type(attention), WindowedAttention)
    attention.window, attention.num_prefix = window, num_prefix  # type: ignore[assignment]


def cut_image(images: Tensor, count: int) -> Tensor:
    """Cut ``(B, C, H, W)`` into count x count windows ``(B x count^2, C, H/count, W/count)``.

    Those of an image follow each other, row by row.
    """
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, count, height // count, count, width // count)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # from (B, C, rows, h, columns, w)


def join_windows(features: Tensor, count: int) -> Tensor:
    """Put windows together again: the reverse of `cut_image`."""
    grid = features.reshape(-1, count, count, *features.shape[1:])  # (B, rows, columns, C, h, w)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
