"""Backbones: timm's ResNets and Swin transformers as maps from images to features C2 to C5.

Modules and parameter names are timm's, without the classifier; forward passes are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from bigdet.models.backbone_base import Backbone
from bigdet.models.norms import BatchNorm2d, Kind, make_norm
from bigdet.models.vgg import VGG

__all__ = ["BACKBONES", "Backbone", "build_backbone", "freeze_stages"]


class ResNet(Backbone):
    """A ResNet or ResNeXt with a 7x7 stem, and stride in the 3x3 convolutions."""

    def __init__(
        self,
        block: type[nn.Module],
        layers: list[int],
        norm: Kind,
        *,
        cardinality: int = 1,
        base_width: int = 64,
    ) -> None:
        """Build timm's; convolutions MSRA, scale 1 and shift 0 (the last norms of blocks too)."""
        super().__init__()
        timm_model = TimmResNet(
            block,
            layers,
            num_classes=0,
            cardinality=cardinality,
            base_width=base_width,
            norm_layer=partial(_timm_norm, kind=norm),
            zero_init_last=False,
        )
        self.conv1: nn.Module = timm_model.conv1
        self.bn1: nn.Module = timm_model.bn1
        self.act1: nn.Module = timm_model.act1
        self.maxpool: nn.Module = timm_model.maxpool
        self.layer1: nn.Module = timm_model.layer1
        self.layer2: nn.Module = timm_model.layer2
        self.layer3: nn.Module = timm_model.layer3
        self.layer4: nn.Module = timm_model.layer4
        self.channels = [info["num_chs"] for info in timm_model.feature_info[1:]]
        if norm == "none":
            _add_biases(self)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem and of the four stages."""
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


def _timm_norm(channels: int, *, kind: Kind, **_factory: Any) -> nn.Module:
    """Build a norm where timm passes device and dtype too (None: its defaults)."""
    return make_norm(kind, channels)


def _add_biases(module: nn.Module) -> None:
    """Give every convolution a bias of zero, which timm leaves to the normalization."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels))


class Swin(Backbone):
    """A Swin transformer with 4x4 patches and 7x7 windows; C2 to C5 each get a LayerNorm."""

    def __init__(
        self, embed_dim: int, depths: list[int], num_heads: list[int], drop_path: float
    ) -> None:
        """Build timm's, initialized as there."""
        super().__init__()
        timm_model = TimmSwin(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=7,
            num_classes=0,
            drop_path_rate=drop_path,
            # Built at 128 timm shrinks its windows, built at 224 it drops the shift of the last
            # stage; with both options every size gives the same weights and features.
            strict_img_size=False,
            always_partition=True,
        )
        self.patch_embed = timm_model.patch_embed
        self.layers = timm_model.layers
        self.channels = [info["num_chs"] for info in timm_model.feature_info]
        for index, channels in enumerate(self.channels):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The patch embedding and the four stages; the output norms belong to none of them."""
        return [[self.patch_embed], *([stage] for stage in self.layers)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute C2 to C5, in channels_last memory."""
        height, width = images.shape[-2:]
        x = self.patch_embed(F.pad(images, (0, -width % 4, 0, -height % 4)))  # (B, H/4, W/4, C)
        features = []
        for index, stage in enumerate(self.layers):
            x = _run_blocks(list(stage.blocks), stage.downsample(x))
            normalized = getattr(self, f"norm{index}")(x)
            features.append(normalized.permute(0, 3, 1, 2))  # (B, C, H_i, W_i)
        return features


def _run_blocks(blocks: list[SwinTransformerBlock], x: Tensor) -> Tensor:
    """Run the blocks of one Swin stage on ``(B, H, W, C)``.

    timm's own forward shifts first and pads then, so that at sizes its windows do not divide the
    rows that wrap around are not masked. Like the published code, this pads first.
    """
    height, width = x.shape[1:3]
    window_height, window_width = blocks[0].window_size
    padding = (0, 0, 0, -width % window_width, 0, -height % window_height)
    mask = None
    for block in blocks:
        y = block.norm1(x)
        if any(padding):
            y = F.pad(y, padding)
        if any(block.shift_size):
            if mask is None:  # the same in all blocks of a stage
                mask = block.get_attn_mask(y)
            down, right = block.shift_size
            y = torch.roll(y, (-down, -right), dims=(1, 2))
            y = torch.roll(_attend(block, y, mask), (down, right), dims=(1, 2))
        else:
            y = _attend(block, y, None)
        x = x + block.drop_path1(y[:, :height, :width])
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x


def _attend(block: SwinTransformerBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within the windows of ``(B, H, W, C)``, whose sizes the windows divide."""
    size = block.window_size
    windows = window_partition(x, size)  # (B x windows, h, w, C)
    attended = block.attn(windows.flatten(1, 2), mask=mask).view_as(windows)
    merged: Tensor = window_reverse(attended, size, x.shape[1], x.shape[2])
    return merged


def _resnet(block: type[nn.Module], layers: list[int], **widths: int) -> Callable[..., Backbone]:
    return lambda norm, drop_path: ResNet(block, layers, norm, **widths)


def _swin(embed_dim: int, depths: list[int], num_heads: list[int]) -> Callable[..., Backbone]:
    return lambda norm, drop_path: Swin(embed_dim, depths, num_heads, drop_path)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet10": _resnet(BasicBlock, [1, 1, 1, 1]),
    "resnet18": _resnet(BasicBlock, [2, 2, 2, 2]),
    "resnet50": _resnet(Bottleneck, [3, 4, 6, 3]),
    "resnet101": _resnet(Bottleneck, [3, 4, 23, 3]),
    "resnext101_32x8d": _resnet(Bottleneck, [3, 4, 23, 3], cardinality=32, base_width=8),
    "resnext152_32x8d": _resnet(Bottleneck, [3, 8, 36, 3], cardinality=32, base_width=8),
    "swin_t": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_s": _swin(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin_b": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "vgg16": lambda norm, drop_path: VGG(),
}


def build_backbone(name: str, norm: Kind, drop_path: float) -> Backbone:
    """Build a backbone with random weights.

    Args:
        name: one of `BACKBONES`.
        norm: normalization of a ResNet; a Swin transformer has its LayerNorms whatever it says.
        drop_path: highest rate of stochastic depth of a Swin transformer, in [0, 1); it grows
            linearly from 0 at the first block. A ResNet has none.
    """
    return BACKBONES[name](norm, drop_path)


def freeze_stages(backbone: Backbone, num_stages: int) -> None:
    """Train all of the backbone but its first stages (the stem is the first).

    Batch normalization in them becomes fixed; that of the others stays as `set_norm_mode` left it,
    so call that first.
    """
    for index, modules in enumerate(backbone.stages):
        for layer in itertools.chain.from_iterable(module.modules() for module in modules):
            is_frozen = index < num_stages
            if isinstance(layer, BatchNorm2d):
                if is_frozen:
                    layer.mode = "fixed"
                    layer.requires_grad_(False)
                continue
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(not is_frozen)
