"""The table of backbones: maps from images to features C2 to C5.

Modules and parameter names are timm's, without the classifier; forward passes are ours. Each family
has a file of its own; a new backbone is an entry here and a name in ``config/model_schema.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from bigdet.models.backbone_base import Backbone
from bigdet.models.convnext import ConvNeXt
from bigdet.models.norms import BatchNorm2d, Kind
from bigdet.models.resnet import ResNet
from bigdet.models.swin import Swin, SwinV2
from bigdet.models.vgg import VGG
from bigdet.models.vit import ViT

__all__ = ["BACKBONES", "Backbone", "build_backbone", "freeze_stages"]


def _resnet(block: type[nn.Module], layers: list[int], **widths: int) -> Callable[..., Backbone]:
    return lambda norm, drop_path: ResNet(block, layers, norm, **widths)


def _swin(embed_dim: int, depths: list[int], num_heads: list[int]) -> Callable[..., Backbone]:
    return lambda norm, drop_path: Swin(embed_dim, depths, num_heads, drop_path)


def _swin_v2(embed_dim: int, depths: list[int], num_heads: list[int]) -> Callable[..., Backbone]:
    return lambda norm, drop_path: SwinV2(embed_dim, depths, num_heads, drop_path)


def _convnext(depths: list[int], widths: list[int]) -> Callable[..., Backbone]:
    return lambda norm, drop_path: ConvNeXt(depths, widths, drop_path)


def _vit(width: int, depth: int, num_heads: int) -> Callable[..., Backbone]:
    return lambda norm, drop_path: ViT(width, depth, num_heads, drop_path)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet10": _resnet(BasicBlock, [1, 1, 1, 1]),
    "resnet18": _resnet(BasicBlock, [2, 2, 2, 2]),
    "resnet34": _resnet(BasicBlock, [3, 4, 6, 3]),
    "resnet50": _resnet(Bottleneck, [3, 4, 6, 3]),
    "resnet101": _resnet(Bottleneck, [3, 4, 23, 3]),
    "resnet152": _resnet(Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": _resnet(Bottleneck, [3, 4, 6, 3], cardinality=32, base_width=4),
    "resnext50_32x8d": _resnet(Bottleneck, [3, 4, 6, 3], cardinality=32, base_width=8),
    "resnext101_32x4d": _resnet(Bottleneck, [3, 4, 23, 3], cardinality=32, base_width=4),
    "resnext101_32x8d": _resnet(Bottleneck, [3, 4, 23, 3], cardinality=32, base_width=8),
    "resnext152_32x8d": _resnet(Bottleneck, [3, 8, 36, 3], cardinality=32, base_width=8),
    "swin_t": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_s": _swin(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin_b": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin_l": _swin(192, [2, 2, 18, 2], [6, 12, 24, 48]),
    "swinv2_t": _swin_v2(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swinv2_s": _swin_v2(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swinv2_b": _swin_v2(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "convnext_t": _convnext([3, 3, 9, 3], [96, 192, 384, 768]),
    "convnext_s": _convnext([3, 3, 27, 3], [96, 192, 384, 768]),
    "convnext_b": _convnext([3, 3, 27, 3], [128, 256, 512, 1024]),
    "vit_s": _vit(384, 12, 6),
    "vit_b": _vit(768, 12, 12),
    "vgg16": lambda norm, drop_path: VGG(),
}


def build_backbone(name: str, norm: Kind, drop_path: float) -> Backbone:
    """Build a backbone with random weights.

    Args:
        name: one of `BACKBONES`.
        norm: normalization of a ResNet; the others have their LayerNorms whatever it says.
        drop_path: highest rate of stochastic depth of a backbone with LayerNorm, in [0, 1); it
            grows linearly from 0 at the first block. A ResNet has none.
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
