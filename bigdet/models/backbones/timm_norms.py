"""Batch normalization of timm's networks, replaced by bigdet's, which phases may set a mode for."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from bigdet.models.backbones.any_size import derived
from bigdet.models.norms import Kind, make_norm


class _Activated(nn.Module):
    """Methods for a normalization that does what timm's ``BatchNormAct2d`` does after its own."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)`` and apply the activation."""
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


def replace_batch_norms(net: nn.Module, kind: Kind) -> None:
    """Replace every batch normalization of torch; scale, shift and constants stay.

    Args:
        net: of timm.
        kind: what to put in its place; with ``none`` every convolution gets a bias instead.
    """
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, _replacement(layer, kind))
    if kind == "none":
        add_biases(net)


def _replacement(layer: Any, kind: Kind) -> nn.Module:
    norm: Any = make_norm(kind, layer.num_features)
    has_activation = isinstance(layer, BatchNormAct2d)
    if kind == "none":
        return nn.Sequential(layer.drop, layer.act) if has_activation else nn.Identity()
    if kind == "bn":
        norm.eps = layer.eps
    if has_activation:
        norm.__class__ = derived(type(norm), _Activated)
        norm.drop, norm.act = layer.drop, layer.act
    with torch.no_grad():
        norm.weight.copy_(layer.weight)
        norm.bias.copy_(layer.bias)
    replaced: nn.Module = norm
    return replaced


def add_biases(module: nn.Module) -> None:
    """Give every convolution a bias of zero, which timm leaves to the normalization."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))
