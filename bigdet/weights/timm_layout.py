"""Published weights of any network of timm, as the tensors of a ``TimmPyramid`` or ``TimmPlain``.

timm knows the layouts of the networks' own releases and resamples what depends on the size of
images and patches; its functions are used here. One more layout is that of EfficientNet-PyTorch.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import _builder
from torch import Tensor

from bigdet.models.backbones.timm_net import TimmBackbone, create_net
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN
from bigdet.weights.backbone_names import without_prefix
from bigdet.weights.renaming import renamed

logger = logging.getLogger(__name__)

_COUNTER = ".num_batches_tracked"  # of torch's batch normalization; bigdet's has none
_PRETRAINING = re.compile(r"(decoder\w*|mask_token)(\.|$)")
"""Layers that masked autoencoders have in their pre-training alone."""
_LISTED = 4  # names in a message
_TERMS = {
    "dinov3-license": ", which asks for attribution, and that its terms go along with the weights"
}
"""What licences ask of those who train on or pass on."""


def tensors_of_timm(
    state: Mapping[str, Tensor], backbone: TimmBackbone, source: str
) -> dict[str, Tensor]:
    """Name a published network's tensors as a backbone's, and log what does not go into it.

    Layers of the network that the backbone has not, such as the classifier, are left out. What is
    not understood keeps its name, for the message of ``load_parts``.

    Args:
        state: by timm's names or those of the network's own release.
        backbone: of the same network.
        source: where they come from, for the log.
    """
    whole, from_release = _reader(backbone)
    state = without_prefix(state)
    tensors = from_release(_from_efficientnet_pytorch(state, whole))
    tensors = {name: each for name, each in tensors.items() if not name.endswith(_COUNTER)}
    own = {name.removeprefix("net.") for name in backbone.state_dict()}
    resampled = [
        f"{name} {tuple(state[name].shape)} to {tuple(each.shape)}"
        for name, each in tensors.items()
        if name in own and name in state and state[name].shape != each.shape
    ]
    left_out = [
        name
        for name in tensors
        if name not in own and (name in whole.state_dict() or _PRETRAINING.match(name))
    ]
    _log(source, "resampled", resampled)
    _log(source, "left out", left_out)
    return {f"net.{name}": each for name, each in tensors.items() if name not in left_out}


def download(backbone: TimmBackbone, name: str) -> dict[str, Tensor]:
    """Download weights that timm names into its cache, and give them as a backbone's tensors."""
    net = create_net(name, **backbone.options, pretrained=True)
    with torch.device("meta"):
        native = timm.create_model(name).state_dict()
    tensors = net.state_dict()
    _log(name, "resampled", [
        f"{key} {tuple(native[key].shape)} to {tuple(each.shape)}"
        for key, each in tensors.items()
        if key in native and native[key].shape != each.shape
    ])  # fmt: skip
    own = {key.removeprefix("net.") for key in backbone.state_dict()}
    _log(name, "left out", [key for key in native if key not in own and _COUNTER not in key])
    return {f"net.{key}": each for key, each in tensors.items() if key in own}


def published_cfg(file: Path, backbone: TimmBackbone) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of a file: that of the ``config.json`` next to it.

    Else that of the weights that timm takes for the network if none are named.
    """
    if (found := cfg_next_to(file)) is not None:
        return found
    cfg = timm.get_pretrained_cfg(backbone.name)
    return {} if cfg is None else {**cfg.to_dict(), "of": backbone.name}


def cfg_next_to(file: Path) -> dict[str, Any] | None:
    """Return timm's ``pretrained_cfg`` in the ``config.json`` next to a file, if there is one."""
    config = file.parent / "config.json"
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{config}: not a JSON file ({error}). It should say how images were normalized for "
            f"{file.name}; correct it or move it away."
        ) from error
    found = content.get("pretrained_cfg") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def input_tensors(cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the ``input_scale`` and ``input_shift`` of weights, by timm's ``pretrained_cfg``."""
    ours_mean, ours_deviation = torch.tensor(PIXEL_MEAN) / 255, torch.tensor(PIXEL_DEVIATION) / 255
    mean, deviation = map(torch.tensor, normalization(cfg))
    scale, shift = ours_deviation / deviation, (ours_mean - mean) / deviation
    if normalization(cfg) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        scale, shift = torch.ones(3), torch.zeros(3)  # to the last bit
    return {"input_scale": scale.view(3, 1, 1), "input_shift": shift.view(3, 1, 1)}


def describe_cfg(cfg: Mapping[str, Any]) -> str:
    """Say how images were normalized for weights, and what their licence is."""
    mean, deviation = (" ".join(f"{each:g}" for each in values) for values in normalization(cfg))
    licence = cfg.get("license")
    note = f"pixel mean {mean}, deviation {deviation} (of 1)"
    if "of" in cfg:
        note += f", which are timm's for {cfg['of']}"
    terms = _TERMS.get(str(licence), "")
    return f"{note}; licence: {licence or 'timm names none'}{terms}"


def normalization(cfg: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of pixels in [0, 1] for weights, by timm's ``pretrained_cfg``."""
    mean, deviation = cfg.get("mean"), cfg.get("std")
    return tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(deviation or IMAGENET_DEFAULT_STD)


def _log(source: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        logger.info("%s: %s: %s%s", source, what, ", ".join(names[:_LISTED]), more)


def _reader(backbone: TimmBackbone) -> tuple[Any, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """Return the whole network without weights, and what timm does with those of its release.

    timm hands that function to ``load_pretrained``, in whose place the weights are left alone here.
    """
    with torch.device("meta"), mock.patch.object(_builder, "load_pretrained") as load:
        options = {"num_classes": 1000, **backbone.options}
        whole = create_net(backbone.name, **options, pretrained=True)
    convert = load.call_args.kwargs["filter_fn"] if load.called else None

    def from_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if convert is None:
            return state
        takes_model = len(inspect.signature(convert).parameters) > 1
        converted: dict[str, Tensor] = convert(state, whole) if takes_model else convert(state)
        return converted

    return whole, from_release


_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
         "_fc": "classifier"}  # fmt: skip
_WITH_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
                   "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_WITHOUT = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def _from_efficientnet_pytorch(state: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """Name the tensors of EfficientNet-PyTorch, which counts blocks over all stages, as timm's."""
    if "_conv_stem.weight" not in state or not hasattr(net, "conv_stem"):
        return dict(state)
    places = [(s, b) for s, stage in enumerate(net.blocks) for b in range(len(stage))]

    def ours(match: re.Match[str]) -> str:
        number, layer = match[1], match[2]
        if number is None:
            return _STEM.get(layer, layer)
        stage, block = places[int(number)]
        has_expansion = f"_blocks.{number}._expand_conv.weight" in state
        layers = {**(_WITH_EXPANSION if has_expansion else _WITHOUT), **_SQUEEZE}
        return f"blocks.{stage}.{block}.{layers.get(layer, layer)}"

    rules = [(r"^(?:_blocks\.(\d+)\.)?(_\w+)", ours)]
    return {renamed(name, rules): tensor for name, tensor in state.items()}
