"""Plain ViT with a simple feature pyramid, as in ViTDet (Li et al. 2022).

Blocks and their names are timm's. There is no class token. Most blocks attend within windows; four
of them, at even distances, over the whole image.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, resample_abs_pos_embed
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from bigdet.models.backbone_base import STRIDES, Backbone, cut_to_size, pad_to_multiple

PATCH = 16
GRID = 14  # patches on a side of the images of pre-training, 224 pixels
GLOBAL_GRID = 64  # patches on a side of the images that relative positions are made for, 1024
WINDOW = (GRID, GRID)
NUM_QUARTERS = 4


class PatchEmbedding(nn.Module):
    """Patches to tokens with their positions, at any image size.

    Attributes:
        pos_embed: ``(1, 14 x 14, C)``, interpolated to the patches of the image.
    """

    def __init__(self, timm_model: Any) -> None:
        """Take the layers of timm's."""
        super().__init__()
        self.proj: nn.Module = timm_model.patch_embed.proj
        self.pos_embed: nn.Parameter = timm_model.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """Give the tokens ``(B, H/16, W/16, C)`` of ``(B, 3, H, W)``."""
        x: Tensor = self.proj(images).permute(0, 2, 3, 1)
        size = [x.shape[1], x.shape[2]]
        positions: Tensor = resample_abs_pos_embed(
            self.pos_embed, size, old_size=[GRID, GRID], num_prefix_tokens=0
        )
        return x + positions.view(1, *size, -1)


class RelativeAttention(nn.Module):
    """Attention with relative positions, in height and in width (Li et al. 2022, MViTv2).

    A query q adds ``q . rel_pos_h[distance] + q . rel_pos_w[distance]`` to its logit of a key. Both
    terms are carried as further channels: those of a query have its products with the table, one
    per row and column of keys, and those of a key pick its own row and column. The kernels without
    an ``(N, N)`` tensor in memory thus serve here too.

    Attributes:
        rel_pos_h: ``(2 x grid - 1, C / heads)``, by query row - key row + grid - 1; interpolated to
            the rows of the input. They begin at 0.
        rel_pos_w: the same of columns.
    """

    def __init__(self, timm_attention: Any, grid: int) -> None:
        """Take the layers of timm's.

        Args:
            timm_attention: plain attention.
            grid: tokens on a side of the input that it is made for.
        """
        super().__init__()
        self.num_heads: int = timm_attention.num_heads
        self.scale: float = timm_attention.scale
        self.qkv: nn.Module = timm_attention.qkv
        self.proj: nn.Module = timm_attention.proj
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, timm_attention.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, timm_attention.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Let all tokens ``(B, h, w, C)`` of a map attend to each other."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height, width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)  # (B, heads, h, w, C / heads)
        of_rows = torch.einsum("bnhwc,hkc->bnhwk", q, _by_distance(self.rel_pos_h, height))
        of_columns = torch.einsum("bnhwc,wkc->bnhwk", q, _by_distance(self.rel_pos_w, width))
        rows = torch.eye(height, dtype=k.dtype, device=k.device)[:, None]
        columns = torch.eye(width, dtype=k.dtype, device=k.device)
        own_row, own_column = (own.expand(*k.shape[:4], -1) for own in (rows, columns))
        q = torch.cat([q * self.scale, of_rows, of_columns], dim=-1)
        k = torch.cat([k, own_row, own_column], dim=-1)
        more = -q.shape[-1] % 8  # fused kernels want a multiple
        q, k = F.pad(q, (0, more)).flatten(2, 3), F.pad(k, (0, more)).flatten(2, 3)
        x = F.scaled_dot_product_attention(q, k, v.flatten(2, 3), scale=1.0)
        x = x.transpose(1, 2).reshape(batch, height, width, channels)
        projected: Tensor = self.proj(x)
        return projected


def _by_distance(table: Tensor, size: int) -> Tensor:
    """Give the rows ``(size, size, C)`` of a table ``(L, C)`` of distances, [query, key]."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]


class ViT(Backbone):
    """Patches of 16x16 pixels; C2 to C5 come from the last map by (de)convolutions."""

    group_matcher = TimmViT.group_matcher

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        drop_path: float,
        relative_positions: bool = False,
    ) -> None:
        """Build timm's, initialized as there; the pyramid with MSRA weights."""
        super().__init__()
        timm_model = TimmViT(
            img_size=GRID * PATCH,
            patch_size=PATCH,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            class_token=False,
            global_pool="avg",
            num_classes=0,
            drop_path_rate=drop_path,
        )
        self.patch_embed = PatchEmbedding(timm_model)
        self.blocks: Any = nn.ModuleList(timm_model.blocks)
        if relative_positions:
            last_of_quarters = [quarter[-1] for quarter in self.stages[1:]]
            for block in self.blocks:
                grid = GLOBAL_GRID if block in last_of_quarters else GRID
                block.attn = RelativeAttention(block.attn, grid)
        self.channels, self.pyramid = simple_pyramid(width)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The patch embedding and the blocks in quarters; the pyramid belongs to none of them."""
        return [[self.patch_embed], *equal_runs(self.blocks)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5."""
        height, width = images.shape[-2:]
        x = self.patch_embed(pad_to_multiple(images, STRIDES[-1]))
        for quarter in self.stages[1:]:
            for block in quarter[:-1]:
                x = self.run(_run_block, block, x, True)
            x = self.run(_run_block, quarter[-1], x, False)
        x = x.permute(0, 3, 1, 2)
        return cut_to_size([level(x) for level in self.pyramid], (height, width))


def equal_runs(blocks: nn.ModuleList, count: int = NUM_QUARTERS) -> list[list[nn.Module]]:
    """Cut the blocks of a ViT into quarters, or other runs, as equally long as can be."""
    ends = [len(blocks) * number // count for number in range(count + 1)]
    return [list(blocks[start:end]) for start, end in pairwise(ends)]


def simple_pyramid(width: int) -> tuple[list[int], nn.ModuleList]:
    """Build the layers that make C2 to C5 of one map of stride 16.

    Returns:
        The channels of C2 to C5, and a module for each.
    """
    levels = [
        nn.Sequential(
            _doubling(width, width // 2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            _doubling(width // 2, width // 4),
        ),
        _doubling(width, width // 2),
        nn.Identity(),
        nn.MaxPool2d(2),
    ]
    return [width // 4, width // 2, width, width], nn.ModuleList(levels)


def _doubling(in_channels: int, out_channels: int) -> nn.Module:
    """Build a transposed convolution that doubles height and width."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _run_block(block: Any, x: Tensor, in_windows: bool) -> Tensor:
    """Run a block on tokens ``(B, h, w, C)``.

    Like ViTDet's own, windows that reach over the edge are filled with zeros, without a mask.
    """
    height, width = x.shape[1:3]
    y = block.norm1(x)
    if in_windows:
        y = F.pad(y, (0, 0, 0, -width % GRID, 0, -height % GRID))
        windows = window_partition(y, WINDOW)  # (B x windows, 14, 14, C)
        y = window_reverse(_attend(block.attn, windows), WINDOW, y.shape[1], y.shape[2])[
            :, :height, :width
        ]
    else:
        y = _attend(block.attn, y)
    x = x + block.drop_path1(block.ls1(y))
    mixed: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return mixed


def _attend(attention: Any, x: Tensor) -> Tensor:
    """Let all tokens ``(B, h, w, C)`` of a map attend to each other."""
    if isinstance(attention, RelativeAttention):
        return attention(x)  # type: ignore[no-any-return]
    attended: Tensor = attention(x.flatten(1, 2)).view_as(x)
    return attended
