"""The same weights by torchvision's names and in its order of rows and columns, and back.

torchvision's detectors are those of ``torchvision.models.detection`` over one of its ResNets with a
pyramid, or over VGG's convolutions. Beside the names three things differ: torchvision has the
background first where bigdet has it last, it has box deltas and masks of a background where bigdet
has none (zeros go there, and nothing reads them), and its first fully connected layer reads a
region channel by channel. Of its other backbones (Swin, ConvNeXt, ViT) there are the names alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bigdet.config.model import has_cascade, has_keypoints, is_class_agnostic, model_parts
from bigdet.models.build import head_norm
from bigdet.models.detector import Detector
from bigdet.models.heads.box import POOLED_SIZE
from bigdet.models.weights import describe_misfits, refuse_not_finite
from bigdet.weights.renaming import Rules, renamed_all

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Twin:
    """A tensor of a detector and what it is in torchvision's.

    Attributes:
        ours: name in the detector.
        theirs: name in torchvision's.
        there: our values to theirs.
        back: their values to ours.
    """

    ours: str
    theirs: str
    there: Change
    back: Change


NAMES = (
    (r"backbone\.features\.(.+)", r"backbone.\1"),
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"fpn\.laterals\.(\d)\.(\w+)", r"backbone.fpn.inner_blocks.\1.\2"),
    (r"fpn\.outputs\.(\d)\.(\w+)", r"backbone.fpn.layer_blocks.\1.\2"),
    (r"fpn\.(p6|p7)", r"backbone.fpn.extra_blocks.\1"),
    (r"rpn\.conv\.(\w+)", r"rpn.head.conv.0.\1"),
    (r"rpn\.objectness", r"rpn.head.cls_logits"),
    (r"rpn\.deltas", r"rpn.head.bbox_pred"),
    (r"box_head\.convs\.(\d)\.(\w+)", r"roi_heads.box_head.\1.\2"),
    (r"box_head\.classifier", r"roi_heads.box_predictor.cls_score"),
    (r"box_head\.regressor", r"roi_heads.box_predictor.bbox_pred"),
    (r"mask_head\.convs\.(\d)\.(\w+)", r"roi_heads.mask_head.\1.\2"),
    (r"mask_head\.deconv", r"roi_heads.mask_predictor.conv5_mask"),
    (r"mask_head\.predictor", r"roi_heads.mask_predictor.mask_fcn_logits"),
    (r"keypoint_head\.deconv", r"roi_heads.keypoint_predictor.kps_score_lowres"),
    (r"retina_head\.class_convs\.(\d)\.(\w+)", r"head.classification_head.conv.\1.\2"),
    (r"retina_head\.classifier", r"head.classification_head.cls_logits"),
    (r"retina_head\.box_convs\.(\d)\.(\w+)", r"head.regression_head.conv.\1.\2"),
    (r"retina_head\.regressor", r"head.regression_head.bbox_reg"),
)
"""Our modules and theirs; the first that fits a whole name counts."""

FCS = {"2fc": ("roi_heads.box_head.fc6", "roi_heads.box_head.fc7"),
       "4conv1fc": ("roi_heads.box_head.5",)}  # fmt: skip
PLACES = {"conv": "0", "norm": "1"}  # of the layers of a `conv_norm` in torchvision's sequence
COUNTER = "num_batches_tracked"  # torch's batch normalization has one

_STAGES: Rules = [
    (r"^features\.([1357])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
]
_SWIN: Rules = [
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *_STAGES,
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
]
CONVNEXT: Rules = [
    (r"^features\.0\.", "stem."),
    *_STAGES,
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
]
VIT: Rules = [
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "patch_embed.pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
]


def swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a Swin or SwinV2 of torchvision as timm does."""
    named = renamed_all(state, _SWIN)
    for name in [name for name in named if name.endswith("attn.qkv.bias")]:
        if name.replace("qkv.bias", "logit_scale") in named:  # SwinV2: keys have no bias
            query, _, value = named.pop(name).chunk(3)
            named[name.replace("qkv.bias", "q_bias")] = query
            named[name.replace("qkv.bias", "v_bias")] = value
    return named


def twins(detector: Detector) -> list[Twin]:
    """Give the place in torchvision's detector of every parameter and buffer of ours.

    Raises:
        ValueError: torchvision has no such detector or backbone.
    """
    config = detector.config
    if has_cascade(config) or ("box_head" in model_parts(config) and is_class_agnostic(config)):
        raise ValueError(
            f"model.detector {config.detector}: torchvision has no cascade and no class-agnostic "
            f"boxes, so the weights have no place there."
        )
    num_convs = 1 if config.rpn is None else config.rpn.num_convs
    if config.neck != "fpn" or num_convs != 1 or config.norm == "ln":
        raise ValueError(
            f"model.neck {config.neck}, model.rpn.num_convs {num_convs}, model.norm "
            f"{config.norm}: expected fpn, 1, and bn, gn or none, as torchvision has."
        )
    if not any(hasattr(detector.backbone, name) for name in ("layer4", "features")):
        raise ValueError(
            f"model.backbone {config.backbone}: torchvision's detectors have no such "
            f"backbone, so its weights have no place there. Only ResNets, ResNeXts and VGG do."
        )
    if hasattr(detector.backbone, "layer4") and config.norm == "none":
        raise ValueError(
            "model.norm none: torchvision's ResNets have no biases, which ours have without "
            "normalization, so the weights have no place there."
        )
    if config.stride_in_1x1:
        raise ValueError(
            "model.stride_in_1x1: torchvision's ResNets have their stride in the 3x3 convolutions, "
            "so that they would see other positions with these weights."
        )
    if has_keypoints(config) and head_norm(config) != "none":
        raise ValueError(
            f"model.norm {config.norm}: torchvision's keypoint head has no normalization, so the "
            f"weights of this one have no place there."
        )
    return [_twin(name, detector) for name in detector.state_dict()]


def to_torchvision(detector: Detector, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of a detector by torchvision's names; what it has beside them is 0.

    The tensors are weights or gradients by our names; others than the detector's are an error.
    """
    found = {twin.theirs: twin.there(tensors[twin.ours]) for twin in twins(detector)
             if twin.ours in tensors}  # fmt: skip
    assert len(found) == len(tensors), "tensors that the detector does not have"
    counters = {
        f"{name.rpartition('.')[0]}.{COUNTER}": torch.tensor(0)
        for name in found
        if name.endswith(".running_mean")
    }
    return found | counters


def from_torchvision(
    detector: Detector, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Give the weights of torchvision's detector by our names.

    The tensors are the ``state_dict`` of torchvision's detector of the same settings.

    Raises:
        ValueError: a tensor is missing, or of no use, of another shape or not finite.
    """
    pairs = twins(detector)
    own = detector.state_dict()
    theirs = {twin.theirs for twin in pairs}
    offered = {name for name in tensors if not name.endswith(COUNTER)}
    misfits = describe_misfits(
        {
            "missing": sorted(theirs - offered),
            "unexpected": sorted(offered - theirs),
            "of another shape": [
                f"{twin.theirs}: {tuple(tensors[twin.theirs].shape)} for "
                f"{tuple(twin.there(own[twin.ours]).shape)}"
                for twin in pairs
                if twin.theirs in offered
                and tensors[twin.theirs].shape != twin.there(own[twin.ours]).shape
            ],
        }
    )
    if misfits:
        raise ValueError(
            f"{source}: does not fit the {detector.config.detector} of the config: "
            f"{misfits}. Make model.* and the categories those of the weights."
        )
    refuse_not_finite({twin.theirs: tensors[twin.theirs] for twin in pairs}, source)
    return {twin.ours: twin.back(tensors[twin.theirs]) for twin in pairs}


def _twin(name: str, detector: Detector) -> Twin:
    module, _, kind = name.rpartition(".")
    there: Change = torch.clone
    back: Change = torch.clone
    if module.startswith("box_head.fcs."):
        index = int(module.rpartition(".")[2])
        theirs = FCS[detector.config.box_head][index]
        if index == 0 and kind == "weight":
            there, back = channels_first, channels_last
    elif module.startswith("keypoint_head.convs."):
        index = int(module.split(".")[2])
        theirs = f"roi_heads.keypoint_head.{2 * index}"  # an activation stands between them
    else:
        pattern, target = next(pair for pair in NAMES if re.fullmatch(pair[0], module))
        parts = re.sub(pattern, target, module).split(".")
        if not module.startswith("backbone.") and parts[-1] in PLACES:
            parts[-1] = PLACES[parts[-1]]
        theirs = ".".join(parts)
    if module == "box_head.classifier":
        there, back = partial(torch.roll, shifts=1, dims=0), partial(torch.roll, shifts=-1, dims=0)
    background = {"box_head.regressor": 4, "mask_head.predictor": 1}.get(module, 0)
    if background:
        there, back = partial(with_rows, count=background), partial(without_rows, count=background)
    return Twin(name, f"{theirs}.{kind}", there, back)


def with_rows(value: Tensor, count: int) -> Tensor:
    """Put rows of zeros, those of the background, before the others."""
    return torch.cat([torch.zeros_like(value[:count]), value])


def without_rows(value: Tensor, count: int) -> Tensor:
    """Drop the first rows, those of the background."""
    return value[count:].clone()


def channels_first(weight: Tensor) -> Tensor:
    """Order the columns ``(N, h * w * C)`` of a fully connected layer by channel, then place."""
    grid = weight.view(len(weight), POOLED_SIZE, POOLED_SIZE, -1)
    return grid.permute(0, 3, 1, 2).flatten(1)


def channels_last(weight: Tensor) -> Tensor:
    """Order the columns ``(N, C * h * w)`` of a fully connected layer by place, then channel."""
    grid = weight.view(len(weight), -1, POOLED_SIZE, POOLED_SIZE)
    return grid.permute(0, 2, 3, 1).flatten(1)
