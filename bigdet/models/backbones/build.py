"""Backbones by name: maps from images to features C2 to C5.

Modules and parameter names are timm's, without the classifier; forward passes are ours. Each family
has a file of its own, and each backbone a row in ``config/families.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from bigdet.config.families import backbone_facts
from bigdet.config.own import import_callable, type_name
from bigdet.models.backbone_base import STRIDES, Backbone
from bigdet.models.norms import BatchNorm2d, Kind, batch_norms

NUM_STAGES = 5


def build_backbone(
    name: str,
    norm: Kind,
    drop_path: float,
    stride_in_1x1: bool = False,
    relative_positions: bool = False,
    **more: Any,
) -> Backbone:
    """Build a backbone with random weights.

    Args:
        name: ``model.backbone``.
        norm: normalization of a ResNet; others have their LayerNorms whatever it says.
        drop_path: highest rate of stochastic depth of a backbone with LayerNorm, in [0, 1); it
            grows linearly from 0 at the first block. A ResNet has none.
        stride_in_1x1: of a ResNet of bottlenecks.
        relative_positions: of a ViT.
        more: the other options of ``families.LACKS``.

    Raises:
        ValueError: a user's own is not what ``backbone_base.Backbone`` asks for.
    """
    facts = backbone_facts(name)
    options = {
        "norm": norm,
        "drop_path": drop_path,
        "stride_in_1x1": stride_in_1x1,
        "relative_positions": relative_positions,
        **more,
    }
    heeded = {option: options[option] for option in facts.heeds if option in options}
    backbone = import_callable("model.backbone", facts.build)(**facts.sizes, **heeded)
    if facts.is_own:
        _check_own(name, backbone, heeded)
    assert isinstance(backbone, Backbone)
    return backbone


def _check_own(name: str, backbone: Any, heeded: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a user's backbone breaks the contract of ``Backbone``."""
    where = f"model.backbone: {name}"
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"{where} returned {type_name(backbone)}, expected a Backbone, a subclass of that of "
            f"bigdet.models.backbone_base."
        )
    channels = getattr(backbone, "channels", None)
    is_list = isinstance(channels, list) and all(isinstance(each, int) for each in channels)
    if not (is_list and len(channels or []) == len(STRIDES)):
        raise ValueError(f"{where}: channels is {channels}, expected four numbers, of C2 to C5.")
    if list(backbone.strides) != STRIDES:
        raise ValueError(f"{where}: strides are {backbone.strides}, expected {STRIDES}.")
    if len(backbone.stages) != NUM_STAGES:
        raise ValueError(
            f"{where}: stages has {len(backbone.stages)} lists of modules, expected {NUM_STAGES}: "
            f"the stem and the four stages; a list may be empty."
        )
    refuse_torch_norms(where, backbone)
    has_batch_norm = bool(batch_norms(backbone))
    if has_batch_norm != (heeded.get("norm") == "bn"):
        raise ValueError(
            f"{where} {'has' if has_batch_norm else 'has no'} batch normalization, where it is "
            f"called with {heeded or 'no option'}. Expected a parameter norm, which says of what "
            f"kind the layers of make_norm are; without it, neither."
        )
    _check_features(where, backbone)


def refuse_torch_norms(where: str, module: nn.Module) -> None:
    """Raise ``ValueError`` if a user's module has batch normalization of torch.

    Args:
        where: which module, for the message.
        module: the same.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{where} has {type(layer).__name__} of torch, which knows no norm_mode. Expected "
                f"make_norm(norm, channels) of bigdet.models.norms."
            )


def _check_features(where: str, backbone: Backbone) -> None:
    """Raise ``ValueError`` unless a small image gives C2 to C5 as a user's backbone says."""
    device = next(backbone.parameters()).device
    if device.type == "meta":
        return
    height, width = 64, 96
    expected = [
        (1, channels, height // stride, width // stride)
        for channels, stride in zip(backbone.channels, STRIDES, strict=True)
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone.eval()
        features = backbone(torch.zeros(1, 3, height, width, device=device))
        backbone.train()
    is_list = isinstance(features, list) and all(torch.is_tensor(each) for each in features)
    found = [tuple(each.shape) for each in features] if is_list else type_name(features)
    if found != expected:
        raise ValueError(
            f"{where}: an image of (1, 3, {height}, {width}) gives {found}, expected a list of C2 "
            f"to C5, {expected}."
        )


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
    for parameter in backbone.stem_parameters:
        parameter.requires_grad_(num_stages == 0)
