"""Modules of timm that are built for one image size, made to take any: classes for `adapt`.

A module keeps its weights and their names; only its class changes. A table that belongs to the size
it was built for is resampled to that of the image.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import hiera, maxxvit, mvitv2, swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from bigdet.models.backbones.swin import attend, shift_mask


def adapt(net: nn.Module) -> None:
    """Let all modules of a network of timm take images whose sides are multiples of 32."""
    for module in net.modules():
        for kind, methods in _ADAPTED.items():
            if isinstance(module, kind):
                module.__class__ = derived(type(module), methods)


def derived(kind: Any, methods: Any) -> Any:
    """Return a subclass of a module's class that has the methods of another class first."""
    if (kind, methods) not in _derived:
        name, module = kind.__name__, kind.__module__
        _derived[kind, methods] = type(name, (methods, kind), {"__module__": module})
    return _derived[kind, methods]


_derived: dict[tuple[Any, Any], Any] = {}


class _SwinBlock(nn.Module):
    """Pads before it shifts, see ``swin.attend``."""

    def _attn(self, x: Tensor) -> Tensor:
        block: Any = self
        mask = shift_mask(block, x) if any(block.shift_size) else None
        return attend(block, x, mask)


class _Partition(nn.Module):
    """MaxViT's windows and grids: features are padded with zeros until these divide them."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        block: Any = super()
        dims = (2, 3) if isinstance(self, maxxvit.PartitionAttention2d) else (1, 2)
        height, width = (x.shape[dim] for dim in dims)
        rows, columns = (-x.shape[dim] % size for dim, size in zip(dims, self.size, strict=True))
        channels = () if dims == (2, 3) else (0, 0)
        padded = F.pad(x, (*channels, 0, columns, 0, rows))
        attended: Tensor = block._partition_attn(padded)
        return attended.narrow(dims[0], 0, height).narrow(dims[1], 0, width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a window."""
        size: tuple[int, int] = self.partition_size  # type: ignore[assignment]
        return size


class _MultiScaleAttention(nn.Module):
    """MViTv2's attention, whose relative positions are interpolated as in detectron2's."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Any:
        """Attend over ``(B, h x w, C)`` of ``feat_size``."""
        self._feat_size = feat_size
        return super().forward(x, feat_size)

    @property
    def rel_pos_h(self) -> Tensor:
        """Positions of rows, for the image at hand."""
        return self._resampled("rel_pos_h", 0)

    @property
    def rel_pos_w(self) -> Tensor:
        """Positions of columns, for the image at hand."""
        return self._resampled("rel_pos_w", 1)

    def _resampled(self, name: str, axis: int) -> Tensor:
        table = self._parameters[name]
        assert table is not None
        pools = (self.pool_q, self.pool_k)
        strides = [pool.stride[axis] if isinstance(pool, nn.Conv2d) else 1 for pool in pools]
        length = 2 * max(-(-self._feat_size[axis] // stride) for stride in strides) - 1
        if length == len(table):
            return table
        return F.interpolate(table.t()[None], size=length, mode="linear")[0].t()


class _Hiera(nn.Module):
    """Hiera, whose tokens are put in order of its windows for one size."""

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Compute features of ``(B, 3, H, W)``."""
        net: Any = self
        size = tuple(x.shape[-2:])
        strides = net.unroll.schedule
        net.tokens_spatial_shape = [
            n // stride for n, stride in zip(size, net.patch_stride, strict=True)
        ]
        net.mask_spatial_shape = [
            n // unit for n, unit in zip(net.tokens_spatial_shape, net.mask_unit_size, strict=True)
        ]
        net.unroll = hiera.Unroll(size, net.patch_stride, strides)
        net.reroll = hiera.Reroll(size, net.patch_stride, strides, net.stage_ends, net.q_pool)
        return super().forward_intermediates(x, *args, **options)  # type: ignore[misc]

    def _pos_embed(self, x: Tensor) -> Tensor:
        net: Any = self
        if net.pos_embed_win is not None:
            positioned: Tensor = super()._pos_embed(x)  # type: ignore[misc]
            return positioned
        positions: Tensor = resample_abs_pos_embed(
            net.pos_embed, net.tokens_spatial_shape, num_prefix_tokens=0
        )
        return x + positions


_ADAPTED: dict[type[nn.Module] | tuple[type[nn.Module], ...], type[nn.Module]] = {
    (
        swin_transformer.SwinTransformerBlock,
        swin_transformer_v2.SwinTransformerV2Block,
    ): _SwinBlock,
    (maxxvit.PartitionAttentionCl, maxxvit.PartitionAttention2d): _Partition,
    (mvitv2.MultiScaleAttention, mvitv2.MultiScaleAttentionPoolFirst): _MultiScaleAttention,
    hiera.Hiera: _Hiera,
}
