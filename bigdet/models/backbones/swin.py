"""Swin (Liu et al. 2021) and SwinV2 (2022) at any image size: timm's modules and names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigdet.models.backbone_base import Backbone, pad_to_multiple

PATCH = 4
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's attention. cuDNN's would be planned anew for every number of windows."""


class FusedAttention(WindowAttention):  # type: ignore[misc]
    """timm's attention within windows; on CUDA in one kernel, without a matrix for each image.

    The positions and what a shift separates are the mask of the kernel, one for all images.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each of ``(B x windows, N, C)``; the mask is ``(windows, N, N)``."""
        attended: Tensor = self.fused(x, mask) if x.is_cuda else super().forward(x, mask)
        return attended

    def fused(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Do what timm's forward does, but for rounding."""
        assert self.attn_drop.p == 0
        number, area, channels = x.shape
        heads = self.num_heads
        parts = self.qkv(x).view(number, area, 3, heads, -1).permute(2, 0, 3, 1, 4)
        shifts = self._get_rel_pos_bias()  # (1, heads, N, N)
        if mask is not None:  # windows and heads in one dimension: (B, windows x heads, N, D)
            shifts = (shifts + mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)
            parts = parts.reshape(3, -1, shifts.shape[1], area, channels // heads)
        query, key, value = parts.unbind(0)
        with sdpa_kernel(KERNELS):
            found = F.scaled_dot_product_attention(
                query, key, value, attn_mask=shifts.to(query.dtype), scale=self.scale
            )
        found = found.reshape(number, heads, area, -1).transpose(1, 2).reshape(x.shape)
        attended: Tensor = self.proj_drop(self.proj(found))
        return attended


class Swin(Backbone):
    """A Swin transformer with 4x4 patches and 7x7 windows; C2 to C5 each get a LayerNorm."""

    timm_class: ClassVar[Any] = TimmSwin
    window = 7
    group_matcher = TimmSwin.group_matcher

    def __init__(
        self, embed_dim: int, depths: list[int], num_heads: list[int], drop_path: float
    ) -> None:
        """Build timm's, initialized as there."""
        super().__init__()
        timm_model = self.timm_class(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=self.window,
            num_classes=0,
            drop_path_rate=drop_path,
            # Built at 128 timm shrinks its windows, built at 224 it drops the shift of the last
            # stage; with both options every size gives the same weights and features.
            strict_img_size=False,
            always_partition=True,
        )
        self.patch_embed: nn.Module = timm_model.patch_embed
        self.layers: Any = timm_model.layers
        for module in self.layers.modules():
            if type(module) is WindowAttention:
                module.__class__ = FusedAttention  # has the same parameters
        self.channels = [info["num_chs"] for info in timm_model.feature_info]
        self.add_output_norms()

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The patch embedding and the four stages; the output norms belong to none of them."""
        return [[self.patch_embed], *([stage] for stage in self.layers)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5, in channels_last memory."""
        x = self.patch_embed(pad_to_multiple(images, PATCH))  # (B, H/4, W/4, C)
        features = []
        for index, stage in enumerate(self.layers):
            x = stage.downsample(x)
            mask = shift_mask(stage.blocks[1], x)
            for block in stage.blocks:
                x = self.run(self._run_block, block, x, mask)
            features.append(self.output(index, x))
        return features

    @staticmethod
    def _run_block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = x + block.drop_path1(attend(block, block.norm1(x), mask))
        mixed: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
        return mixed


class SwinV2(Swin):
    """SwinV2: 8x8 windows, cosine attention, positions by a small network, norms after layers."""

    timm_class = TimmSwinV2
    window = 8

    @staticmethod
    def _run_block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = x + block.drop_path1(block.norm1(attend(block, x, mask)))
        mixed: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
        return mixed


def _padding(block: Any, x: Tensor) -> tuple[int, int]:
    """Rows and columns that ``(B, H, W, C)`` lacks to be a whole number of windows."""
    height, width = block.window_size
    return -x.shape[1] % height, -x.shape[2] % width


def shift_mask(shifted_block: Any, x: Tensor) -> Tensor:
    """What may not attend to each other once ``(B, H, W, C)`` is shifted; one for a stage."""
    rows, columns = _padding(shifted_block, x)
    mask: Tensor = shifted_block.get_attn_mask(
        x.new_zeros(1, x.shape[1] + rows, x.shape[2] + columns, 1)
    )
    return mask


def attend(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within the windows of ``(B, H, W, C)``, of a shifted block the shifted ones.

    timm's own forward shifts first and pads then, so that at sizes its windows do not divide the
    rows that wrap around are not masked. Like the published code, this pads first.
    """
    height, width = x.shape[1:3]
    rows, columns = _padding(block, x)
    if rows or columns:
        x = F.pad(x, (0, 0, 0, columns, 0, rows))
    down, right = block.shift_size
    if not (down or right):
        return _attend_in_windows(block, x, None)[:, :height, :width]
    x = torch.roll(x, (-down, -right), dims=(1, 2))
    x = torch.roll(_attend_in_windows(block, x, mask), (down, right), dims=(1, 2))
    return x[:, :height, :width]


def _attend_in_windows(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within the windows of ``(B, H, W, C)``, whose sizes the windows divide."""
    size = block.window_size
    windows = window_partition(x, size)  # (B x windows, h, w, C)
    attended = block.attn(windows.flatten(1, 2), mask=mask).view_as(windows)
    merged: Tensor = window_reverse(attended, size, x.shape[1], x.shape[2])
    return merged
