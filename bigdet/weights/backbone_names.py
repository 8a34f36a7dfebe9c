"""Tensors of a published backbone by the names of ours, whoever wrote them.

Our names are timm's, but for a few. Layouts that are understood: timm; torchvision; the original
Swin release; mmdetection; Detectron (Caffe2's names) and detectron2 for ResNets. How those of a
framework are renamed is in its own file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.convnext import ConvNeXt
from bigdet.models.backbones.resnet import ResNet
from bigdet.models.backbones.swin import Swin, SwinV2
from bigdet.models.backbones.vit import GRID, PATCH, ViT
from bigdet.weights import detectron_layout, mmdetection_layout, torchvision_layout
from bigdet.weights.renaming import Rules, renamed_all

logger = logging.getLogger(__name__)

_DROPPED = re.compile(
    r"^(fc|fc_norm|head|head_dist|heads|classifier|norm|norm_pre|pre_logits)(\.|$)"
    r"|\.num_batches_tracked$"
)
"""The classifier, and torch's counter of batch normalization."""
_SWIN_CONSTANTS = re.compile(r"relative_position_index$|relative_coords_table$|attn_mask$")
"""What old files store and ours are computed from the window."""
_SWIN_AUTHORS: Rules = [
    (r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample")
]
_TIMM_CONVNEXT: Rules = [(r"^stages\.", "layers.")]
_TIMM_VIT: Rules = [(r"^pos_embed$", "patch_embed.pos_embed")]


def rename(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Name the tensors of a published network as those of a backbone.

    The state is a classifier's, which is dropped, or a detector's that has the backbone as
    ``backbone``. What is not understood keeps its name, for the message of ``load_parts``.
    """
    state = without_prefix(state)
    named = _FAMILIES.get(type(backbone), dict)(state)
    return {name: tensor for name, tensor in named.items() if not _DROPPED.search(name)}


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what is in the backbone of a detector, or in a wrapper, by its names there."""
    for prefix in ("module.", "backbone.bottom_up.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
    return state


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv1_w" in state:
        return detectron_layout.detectron_resnet(state)
    if "stem.conv1.weight" in state:
        return renamed_all(state, detectron_layout.DETECTRON2_RESNET)
    return renamed_all(state, mmdetection_layout.RESNET_GN)


def _swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {name: tensor for name, tensor in state.items() if not _SWIN_CONSTANTS.search(name)}
    if "features.0.0.weight" in named:
        named = torchvision_layout.swin(named)
    if "patch_embed.projection.weight" in named:
        named = mmdetection_layout.swin(named)
    if "layers.0.downsample.reduction.weight" in named:  # there the last layer of a stage
        named = renamed_all(named, _SWIN_AUTHORS)
    return named


def _convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = renamed_all(state, [*_TIMM_CONVNEXT, *torchvision_layout.CONVNEXT])
    return {
        name: tensor.flatten() if name.endswith(".gamma") else tensor
        for name, tensor in named.items()
    }


def _vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = renamed_all(state, [*_TIMM_VIT, *torchvision_layout.VIT])
    is_with_class = named.pop("cls_token", None) is not None
    positions = named.get("patch_embed.pos_embed")
    if positions is not None and is_with_class:
        named["patch_embed.pos_embed"] = positions[:, 1:]
    return _resampled(named)


def _resampled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring patches of other than 16x16 pixels to that size, and positions to a grid of 14x14."""
    kernel, positions = "patch_embed.proj.weight", "patch_embed.pos_embed"
    found = dict(tensors)
    if kernel in found and found[kernel].shape[-1] != PATCH:
        found[kernel] = resample_patch_embed(found[kernel], [PATCH, PATCH])
    if positions in found and found[positions].shape[1] != GRID**2:
        found[positions] = resample_abs_pos_embed(
            found[positions], [GRID, GRID], num_prefix_tokens=0
        )
    for name in (kernel, positions):
        if name in found and found[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} to {tuple(found[name].shape)}"
            logger.info("backbone.%s: resampled from %s", name, shapes)
    return found


_FAMILIES: dict[type[Backbone], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    ResNet: _resnet,
    Swin: _swin,
    SwinV2: _swin,
    ConvNeXt: _convnext,
    ViT: _vit,
}
