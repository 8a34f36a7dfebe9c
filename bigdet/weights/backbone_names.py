"""Published backbones: their weights, by timm's names or from files, as those of our backbones.

Our names are timm's, but for a few. Layouts that are understood: timm; torchvision; the original
Swin release; Detectron (Caffe2's names) and detectron2 for ResNets.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from bigdet.config.phase_schema import Pixels
from bigdet.models.backbones import Backbone
from bigdet.models.convnext import ConvNeXt
from bigdet.models.detector import PIXEL_DEVIATION, Detector
from bigdet.models.resnet import ResNet
from bigdet.models.swin import Swin, SwinV2
from bigdet.models.vit import ViT
from bigdet.models.weights import FORMAT, LoadedPart, load_parts, part_of, read_metadata
from bigdet.weights import tensor_files
from bigdet.weights.vgg_fc import load_fc_layers

logger = logging.getLogger(__name__)

PUBLISHED = {
    "resnet18": "resnet18.tv_in1k",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "resnet152": "resnet152.tv_in1k",
    "resnext50_32x4d": "resnext50_32x4d.tv_in1k",
    "resnext101_32x4d": "resnext101_32x4d.gluon_in1k",
    "resnext101_32x8d": "resnext101_32x8d.tv_in1k",
    "vgg16": "vgg16.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in1k",
    "swin_l": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
    "swinv2_t": "swinv2_tiny_window8_256.ms_in1k",
    "swinv2_s": "swinv2_small_window8_256.ms_in1k",
    "swinv2_b": "swinv2_base_window8_256.ms_in1k",
    "convnext_t": "convnext_tiny.fb_in1k",
    "convnext_s": "convnext_small.fb_in1k",
    "convnext_b": "convnext_base.fb_in1k",
    "vit_s": "deit_small_patch16_224.fb_in1k",
    "vit_b": "deit_base_patch16_224.fb_in1k",
}
"""timm's names of ImageNet weights, of the plain recipes that detection papers start from."""

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions on names, and what stands for what they match."""

_CLASSIFIER = (
    "fc",
    "fc_norm",
    "head",
    "head_dist",
    "heads",
    "classifier",
    "norm",
    "norm_pre",
    "pre_logits",
)
_OWN = re.compile(r"(norm\d|pyramid)\.")
"""Layers that only detectors have; they start anew where a file has none."""
_EPS = 1e-5  # of batch normalization


def timm_name(source: str, backbone: str) -> str:
    """Return timm's name of the weights that ``timm`` or ``timm:NAME`` stands for.

    Raises:
        ValueError: timm has no such weights.
    """
    if source == "timm":
        if backbone not in PUBLISHED:
            raise ValueError(
                f"timm has no weights for model.backbone {backbone}, only for "
                f"{', '.join(PUBLISHED)}. Choose one of them, or start from random."
            )
        return PUBLISHED[backbone]
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

    timm downloads them into the Hugging Face cache of this machine, once.

    Args:
        detector: a detector whose backbone is ``backbone``.
        source: ``timm`` or ``timm:NAME``.
        backbone: ``model.backbone`` of the config.
        parts: with ``box_head`` VGG's fc6 and fc7 too.
    """
    name = timm_name(source, backbone)
    try:
        timm_model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"timm could not download {name} ({error}). Without a network "
            f'here, fetch it on another machine with python -c "import timm; timm.create_model('
            f"'{name}', pretrained=True)\", copy its Hugging Face cache folder "
            f"(~/.cache/huggingface) to this one, and point HF_HOME at it."
        ) from error
    mean, deviation = timm_model.pretrained_cfg["mean"], timm_model.pretrained_cfg["std"]
    if (tuple(mean), tuple(deviation)) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        raise ValueError(
            f"{name} was trained with pixel mean {mean} and deviation "
            f"{deviation}, but the detector uses {IMAGENET_DEFAULT_MEAN} and "
            f"{IMAGENET_DEFAULT_STD}. Choose other weights."
        )
    return _load(detector, timm_model.state_dict(), name, parts)


def is_published_file(path: Path) -> bool:
    """Tell whether a path is a file of weights that bigdet did not write."""
    if not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return True
    return read_metadata(path).get("format") != FORMAT


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
        pixels: ``start_from.pixels``, how images were given to the network that a pickle holds.
        ema: ``start_from.ema``, whether to take the moving average of the weights.
    """
    if parts is None and path.suffix == ".safetensors":
        raise ValueError(
            f"{path}: found no bigdet detector in it. Write start_from.parts: [backbone] to load "
            f"the backbone from it, the rest starting anew."
        )
    state = tensor_files.read_tensors(path, ema)
    if pixels is not None and pixels != "rgb":
        state = _to_rgb(state, pixels, str(path))
        warn_of_stride(detector, pixels, str(path))
    return _load(detector, state, str(path), parts or ())


def _load(
    detector: Detector, state: Mapping[str, Tensor], source: str, parts: Sequence[str]
) -> list[LoadedPart]:
    tensors = {f"backbone.{k}": v for k, v in rename(state, detector.backbone).items()}
    own = detector.state_dict()
    for name in own:
        if _OWN.match(name.removeprefix("backbone.")) and name not in tensors:
            tensors[name] = own[name]
    rows = load_parts(detector, tensors, ["backbone"], source)
    return [*rows, load_fc_layers(detector, state, source)] if "box_head" in parts else rows


def rename(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Name the tensors of a published network as those of a backbone.

    The classifier is dropped. What is not understood keeps its name, for the message of
    ``load_parts``.

    Args:
        state: of a classifier, or of a detector that has the backbone as ``backbone``.
        backbone: which they are for.
    """
    for prefix in ("module.", "backbone.bottom_up.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
    named = _FAMILIES.get(type(backbone), dict)(state)
    return {
        name: tensor
        for name, tensor in named.items()
        if part_of(name) not in _CLASSIFIER and not name.endswith(".num_batches_tracked")
    }


def _renamed(name: str, rules: Rules) -> str:
    """Apply all rules to a name, in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed_all(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply all rules to all names."""
    return {_renamed(name, rules): tensor for name, tensor in state.items()}


def _from_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "conv1_w" in state:
        return _from_detectron(state)
    if "stem.conv1.weight" in state:
        return renamed_all(state, _DETECTRON2)
    return renamed_all(state, _MMDETECTION_GN)


def _from_detectron(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from Caffe2's names, such as ``res2_0_branch2a_w`` and ``res2_0_branch2a_bn_s``.

    Detectron folds the statistics of batch normalization into scale and shift.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _DETECTRON_BACKBONE.match(name) or name.endswith("_momentum"):
            continue
        new = _renamed(name, _DETECTRON)
        named[new] = tensor
        if name.endswith("_bn_s"):
            norm = new.removesuffix(".weight")
            named.setdefault(f"{norm}.running_mean", torch.zeros_like(tensor))
            named.setdefault(f"{norm}.running_var", torch.full_like(tensor, 1 - _EPS))
    return named


def _from_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {name: tensor for name, tensor in state.items() if not _SWIN_CONSTANTS.search(name)}
    if "features.0.0.weight" in named:
        named = renamed_all(named, _TORCHVISION_SWIN)
        for name in [name for name in named if name.endswith("attn.qkv.bias")]:
            if name.replace("qkv.bias", "logit_scale") in named:  # SwinV2: keys have no bias
                query, _, value = named.pop(name).chunk(3)
                named[name.replace("qkv.bias", "q_bias")] = query
                named[name.replace("qkv.bias", "v_bias")] = value
    if "patch_embed.projection.weight" in named:
        named = {
            name: _unfolded(tensor) if ".downsample." in name else tensor
            for name, tensor in renamed_all(named, _MMDETECTION_SWIN).items()
        }
    if "layers.0.downsample.reduction.weight" in named:  # there the last layer of a stage
        return renamed_all(
            named, [(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample")]
        )
    return named


def _unfolded(value: Tensor) -> Tensor:
    """Order the last axis ``4 * C`` of a layer that merges 2x2 patches as Swin's authors do.

    mmdetection has it by channel, row, column (``nn.Unfold``), they by column, row, channel.
    """
    grouped = value.reshape(*value.shape[:-1], -1, 2, 2)  # (..., C, 2, 2)
    return grouped.transpose(-1, -3).reshape(value.shape)


def _from_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = renamed_all(state, _TORCHVISION_CONVNEXT)
    return {
        name: tensor.flatten() if name.endswith(".gamma") else tensor
        for name, tensor in named.items()
    }


def _from_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = renamed_all(state, _VIT)
    is_with_class = named.pop("cls_token", None) is not None
    positions = named.get("patch_embed.pos_embed")
    if positions is not None and is_with_class:
        named["patch_embed.pos_embed"] = positions[:, 1:]
    return named


def _to_rgb(state: Mapping[str, Tensor], pixels: Pixels, source: str) -> dict[str, Tensor]:
    """Let the first convolution take images as ours: RGB, divided by the deviation.

    The means of Detectron and ours differ by less than one grey level, which is let be.
    """
    found = [name for name in state if re.search(r"(^|\.)(conv1_w|stem\.conv1\.weight)$", name)]
    if len(found) != 1 or state[found[0]].ndim != 4:
        raise ValueError(
            f"{source}: found no first convolution (conv1_w or stem.conv1.weight), expected that "
            f"of a ResNet, which start_from.pixels is for."
        )
    return {**state, found[0]: taking_rgb(state[found[0]], pixels)}


def taking_rgb(weight: Tensor, pixels: Pixels) -> Tensor:
    """Give the first convolution ``(C, 3, h, w)`` that does with our images what theirs does."""
    if pixels == "rgb":
        return weight
    weight = weight.flip(1)
    if pixels == "bgr_255":
        weight = weight * torch.tensor(PIXEL_DEVIATION).to(weight).view(1, 3, 1, 1)
    return weight


def warn_of_stride(detector: Detector, pixels: Pixels, source: str) -> None:
    """Say so where weights are MSRA's by their pixels, and the backbone is built otherwise."""
    block = getattr(detector.backbone, "layer1", [None])[0]
    is_plain = hasattr(block, "conv3") and getattr(block.conv2, "groups", 1) == 1
    is_msras = pixels == "bgr_255" and detector.config.norm == "bn"  # Detectron's GN ones are not
    if is_msras and is_plain and not detector.config.stride_in_1x1:
        logger.warning(
            "%s: MSRA's ResNets have their stride in the 1x1 convolutions, this one in the 3x3 "
            "ones: the weights fit, but see other positions until they are fine-tuned. "
            "model.stride_in_1x1=true builds theirs",
            source,
        )


_DETECTRON_BACKBONE = re.compile(r"(res_)?conv1_|res\d_\d+_branch")
_DETECTRON: Rules = [
    (r"^(res_)?conv1_(bn|gn)_", "bn1_"),
    (r"^res(\d)_(\d+)_", lambda m: f"layer{int(m[1]) - 1}.{m[2]}."),
    (r"branch1_(bn|gn)_", "downsample.1_"),
    (r"branch1_", "downsample.0_"),
    (r"branch2([abc])_(bn|gn)_", lambda m: f"bn{'abc'.index(m[1]) + 1}_"),
    (r"branch2([abc])_", lambda m: f"conv{'abc'.index(m[1]) + 1}_"),
    (r"_(w|s)$", ".weight"),
    (r"_b$", ".bias"),
    (r"_rm$", ".running_mean"),
    (r"_riv$", ".running_var"),
]
_DETECTRON2: Rules = [
    (r"^stem\.fc\.", "fc."),
    (r"^linear\.", "fc."),
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
]
_SWIN_CONSTANTS = re.compile(r"relative_position_index$|relative_coords_table$|attn_mask$")
"""What old files store and ours are computed from the window."""
_MMDETECTION_SWIN: Rules = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
_MMDETECTION_GN: Rules = [(r"(^|\.)gn(\d)\.", r"\1bn\2.")]
_TORCHVISION_SWIN: Rules = [
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([1357])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
]
_TORCHVISION_CONVNEXT: Rules = [
    (r"^stages\.", "layers."),  # timm
    (r"^features\.0\.", "stem."),
    (r"^features\.([1357])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
]
_VIT: Rules = [
    (r"^pos_embed$", "patch_embed.pos_embed"),  # timm
    (r"^class_token$", "cls_token"),  # torchvision's from here on
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
_FAMILIES: dict[type[Backbone], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    ResNet: _from_resnet,
    Swin: _from_swin,
    SwinV2: _from_swin,
    ConvNeXt: _from_convnext,
    ViT: _from_vit,
}
