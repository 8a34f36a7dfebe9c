"""Backbones that others trained, by timm's name or from a file, into the detector."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from bigdet.config.families import PUBLISHED, backbone_facts
from bigdet.config.start import Pixels
from bigdet.models.backbones.timm_net import TimmBackbone
from bigdet.models.detector import Detector
from bigdet.models.heads.box import BoxHead
from bigdet.models.weights import LoadedPart, load_parts, refuse_not_finite
from bigdet.weights.backbone_names import rename
from bigdet.weights.pixel_order import backbone_pixels, warn_of_stride, with_rgb
from bigdet.weights.tensor_files import read_tensors
from bigdet.weights.timm_layout import (
    cfg_next_to,
    describe_cfg,
    download,
    input_tensors,
    normalization,
    published_cfg,
    tensors_of_timm,
)
from bigdet.weights.torchvision_layout import channels_last

_FC_LAYERS = (("pre_logits.fc1", "pre_logits.fc2"), ("classifier.0", "classifier.3"))
"""fc6 and fc7 as timm and torchvision call them."""
_OWN = re.compile(r"(norm\d|pyramid)\.|.*\.rel_pos_[hw]$")
"""Layers that only detectors have; they start from random weights where a file has none."""


def timm_name(source: str, backbone: str) -> str:
    """Return timm's name of the weights that ``timm`` or ``timm:NAME`` means.

    Raises:
        ValueError: timm has no such weights.
    """
    if source == "timm":
        published = backbone_facts(backbone).published
        if published is None:
            raise ValueError(
                f"timm has no weights for model.backbone {backbone}, only for "
                f"{', '.join(PUBLISHED)} and many of timm:NAME. Choose one of them, or start from "
                f"random."
            )
        return published
    name = source.removeprefix("timm:")
    if not (timm.is_model(name) and timm.is_model_pretrained(name)):
        known = timm.list_models(f"{name.split('.')[0]}*", pretrained=True)
        raise ValueError(
            f"timm has no weights {name}. Expected one of "
            f"timm.list_models(pretrained=True), such as {', '.join((known or ['resnet50'])[:4])}."
        )
    return name


def load_timm_backbone(
    detector: Detector, source: str, backbone: str, parts: Sequence[str] = ("backbone",)
) -> list[LoadedPart]:
    """Load published weights into the detector's backbone.

    timm downloads them into the Hugging Face cache of this machine, once. The source is ``timm`` or
    ``timm:NAME``; with ``box_head`` among the parts VGG's fc6 and fc7 are loaded too.
    """
    name = timm_name(source, backbone)
    own = detector.backbone
    try:
        if isinstance(own, TimmBackbone):
            tensors = download(own, name)
            return _load_net(detector, tensors, timm.get_pretrained_cfg(name).to_dict(), name)
        timm_model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"timm could not download {name} ({error}). Without a network "
            f'here, fetch it on another machine with python -c "import timm; timm.create_model('
            f"'{name}', pretrained=True)\", copy its Hugging Face cache folder "
            f"(~/.cache/huggingface) to this one, and point HF_HOME at it."
        ) from error
    _check_normalization(timm_model.pretrained_cfg, name)
    return _load(detector, timm_model.state_dict(), name, parts)


def load_backbone_file(
    detector: Detector,
    path: Path,
    parts: Sequence[str] | None,
    pixels: Pixels | None,
    ema: bool | None = None,
) -> list[LoadedPart]:
    """Load the backbone's weights from a file that others wrote.

    Args:
        detector: to fill.
        path: of the file.
        parts: ``start_from.parts``; with ``box_head`` VGG's fc6 and fc7 too.
        pixels: ``start_from.pixels``, how images were given to the network. None: as the file says.
        ema: ``start_from.ema``, whether to take the moving average of the weights.
    """
    if parts is None and path.suffix == ".safetensors":
        raise ValueError(
            f"{path}: found no bigdet detector in it. Write start_from.parts: [backbone] to load "
            f"the backbone from it, the rest starts from random weights."
        )
    state, _ = read_tensors(path, ema)
    backbone = detector.backbone
    pixels = backbone_pixels(state, backbone, pixels, str(path))
    if isinstance(backbone, TimmBackbone):
        tensors = tensors_of_timm(state, backbone, str(path))
        tensors = with_rgb(tensors, backbone, pixels, str(path))
        return _load_net(detector, tensors, published_cfg(path, backbone), str(path))
    _check_normalization(cfg_next_to(path) or {}, f"{path} (by the config.json next to it)")
    warn_of_stride(detector, pixels, str(path))
    return _load(detector, state, str(path), parts or (), pixels)


def _check_normalization(cfg: Mapping[str, Any], source: str) -> None:
    """Check that weights, by timm's ``pretrained_cfg``, take images normalized as ours."""
    mean, deviation = normalization(cfg)
    if (mean, deviation) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        raise ValueError(
            f"{source} was trained with pixel mean {mean} and deviation {deviation}, but the "
            f"detector uses {IMAGENET_DEFAULT_MEAN} and {IMAGENET_DEFAULT_STD}. Choose other "
            f"weights, or a model.backbone timm:NAME, which takes images as its weights expect."
        )


def _load_net(
    detector: Detector, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any], source: str
) -> list[LoadedPart]:
    """Load a network of timm, and what its images are to be.

    Args:
        detector: to fill.
        tensors: by the backbone's names.
        cfg: timm's ``pretrained_cfg`` of the weights.
        source: where they come from.
    """
    whole = {**detector.backbone.state_dict(), **input_tensors(cfg)}
    kept = {name: each for name, each in whole.items() if not name.startswith("net.")}
    named = {f"backbone.{name}": each for name, each in {**kept, **tensors}.items()}
    (row,) = load_parts(detector, named, ["backbone"], source)
    return [dataclasses.replace(row, note=describe_cfg(cfg))]


def _load(
    detector: Detector,
    state: Mapping[str, Tensor],
    source: str,
    parts: Sequence[str],
    pixels: Pixels = "rgb",
) -> list[LoadedPart]:
    named = with_rgb(rename(state, detector.backbone), detector.backbone, pixels, source)
    tensors = {f"backbone.{k}": v for k, v in named.items()}
    own = detector.state_dict()
    for name in own:
        if _OWN.match(name.removeprefix("backbone.")) and name not in tensors:
            tensors[name] = own[name]
    rows = load_parts(detector, tensors, ["backbone"], source)
    return [*rows, _load_fc_layers(detector, state, source)] if "box_head" in parts else rows


def _load_fc_layers(detector: Detector, state: Mapping[str, Tensor], source: str) -> LoadedPart:
    """Copy fc6 and fc7 into the box head; its layers of classes and boxes stay as they are.

    The state is a classifier's, by timm's or torchvision's names.
    """
    advice = "Or leave box_head out of start_from.parts."
    names = next((pair for pair in _FC_LAYERS if f"{pair[0]}.weight" in state), None)
    if names is None:
        raise ValueError(f"{source}: found no fc6 and fc7 of VGG-16 in it. {advice}")
    head = detector.box_head
    layers: list[nn.Linear] = []
    if isinstance(head, BoxHead) and not len(head.convs):
        layers = [layer for layer in head.fcs if isinstance(layer, nn.Linear)]
    weights = [state[f"{name}.weight"].flatten(1) for name in names]
    shapes, own = ([tuple(each.shape) for each in found]
                   for found in (weights, [layer.weight for layer in layers]))  # fmt: skip
    if shapes != own:
        raise ValueError(
            f"{source}: fc6 and fc7 have weights of {shapes}, the box head of {own}. Set "
            f"model.box_head: 2fc and model.fc_width: {len(weights[0])}. {advice}"
        )
    weights[0] = channels_last(weights[0])
    biases = [state[f"{name}.bias"] for name in names]
    refuse_not_finite({f"{name}.{kind}": state[f"{name}.{kind}"]
                       for name in names for kind in ("weight", "bias")}, source)  # fmt: skip
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    count = sum(tensor.numel() for tensor in (*weights, *biases))
    return LoadedPart("box_head", f"{source} (fc6, fc7)", 4, count)
