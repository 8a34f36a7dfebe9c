"""Whole detectors of detectron2 and mmdetection: their names and orders of numbers as ours.

Faster, Mask, Cascade and Keypoint R-CNN with an FPN, and RetinaNet. As ours, both have the
background last, deltas in the order x, y, width, height with the deviations 0.1, 0.1, 0.2, 0.2, and
anchors that are not rounded and lie at multiples of the stride. Beside the names there differ: the
first fully connected layer, which reads a region channel by channel; in detectron2 the order of
RetinaNet's anchors; in mmdetection how Swin merges patches and the deviations of a cascade's last
stage; and how images are given to the backbone, which its first convolution makes up for. Backbones
are left to ``weights/backbone_names.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bigdet.config.derived import has_cascade, model_parts
from bigdet.config.phase_schema import Pixels
from bigdet.config.schema import RunConfig
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector
from bigdet.models.heads.box import POOLED_SIZE
from bigdet.models.heads.cascade import DELTA_WEIGHTS, NUM_STAGES
from bigdet.models.heads.retina import RetinaHead
from bigdet.models.weights import part_of
from bigdet.weights.backbone_names import Rules, rename, renamed_all, taking_rgb, warn_of_stride
from bigdet.weights.torchvision_layout import channels_last

logger = logging.getLogger(__name__)

Framework = Literal["detectron2", "mmdetection"]

FIRST_CONVOLUTIONS = ("backbone.conv1.weight", "backbone.patch_embed.proj.weight")
THEIR_SAMPLING_RATIO = 0  # of RoIAlign in both: adaptive
MEAN_TOLERANCE = 1.0  # grey levels; Detectron's mean is not quite ours

_IGNORED = re.compile(
    r"^pixel_(mean|std)$|anchor_generator\.|^data_preprocessor\.|_batches_tracked$"
)
_ANCHORS = re.compile(r"(?:^|\.)anchor_generator\.cell_anchors\.(\d)$")
_OF_ANCHORS = re.compile(r"retina_head\.(classifier|regressor)\.")
_MMDETECTION_1 = re.compile(r"^bbox_head\.(\d\.)?(fc_cls|fc_reg|shared_\w+)\.|^mask_head\.")
_OTHER_MASKS = re.compile(rf"^roi_head\.mask_head\.[0-{NUM_STAGES - 2}]\.")
_LAST_REGRESSOR = [
    f"roi_head.bbox_head.{NUM_STAGES - 1}.fc_reg.{one}" for one in ("weight", "bias")
]
_LAST_DEVIATIONS = (0.033, 0.033, 0.067, 0.067)  # of x, y, width, height; ours are 1/30 and 1/15


def _box_head(stage: str | None) -> str:
    return f"box_head.stages.{stage}" if stage else "box_head"


def _detectron2(first_level: int) -> Rules:
    """Give the rules for names, with a pyramid that begins at P2 or P3."""
    return [
        (
            r"^backbone\.fpn_(lateral|output)(\d)\.(norm\.)?",
            lambda m: f"fpn.{m[1]}s.{int(m[2]) - first_level}.{m[3] or 'conv.'}",
        ),
        (r"^backbone\.top_block\.", "fpn."),
        (r"^proposal_generator\.rpn_head\.conv\.(weight|bias)$", r"rpn.conv.conv.\1"),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
        (
            r"^roi_heads\.box_head\.(?:(\d)\.)?conv(\d)\.(norm\.)?",
            lambda m: f"{_box_head(m[1])}.convs.{int(m[2]) - 1}.{m[3] or 'conv.'}",
        ),
        (
            r"^roi_heads\.box_head\.(?:(\d)\.)?fc(\d)\.",
            lambda m: f"{_box_head(m[1])}.fcs.{int(m[2]) - 1}.",
        ),
        (
            r"^roi_heads\.box_predictor\.(?:(\d)\.)?cls_score\.",
            lambda m: f"{_box_head(m[1])}.classifier.",
        ),
        (
            r"^roi_heads\.box_predictor\.(?:(\d)\.)?bbox_pred\.",
            lambda m: f"{_box_head(m[1])}.regressor.",
        ),
        (
            r"^roi_heads\.mask_head\.mask_fcn(\d)\.(norm\.)?",
            lambda m: f"mask_head.convs.{int(m[1]) - 1}.{m[2] or 'conv.'}",
        ),
        (r"^roi_heads\.mask_head\.(deconv|predictor)\.", r"mask_head.\1."),
        (
            r"^roi_heads\.keypoint_head\.conv_fcn(\d)\.",
            lambda m: f"keypoint_head.convs.{int(m[1]) - 1}.conv.",
        ),
        (r"^roi_heads\.keypoint_head\.score_lowres\.", "keypoint_head.deconv."),
        (
            r"^head\.(cls|bbox)_subnet\.([0246])\.",  # an activation stands between two
            lambda m: f"retina_head.{_BRANCHES[m[1]]}_convs.{int(m[2]) // 2}.conv.",
        ),
        (r"^head\.cls_score\.", "retina_head.classifier."),
        (r"^head\.bbox_pred\.", "retina_head.regressor."),
    ]


_BRANCHES = {"cls": "class", "bbox": "box", "reg": "box"}
_CONV_MODULE = r"(conv|bn|gn)\."


def _layer(kind: str) -> str:
    return "conv." if kind == "conv" else "norm."


_MMDETECTION: Rules = [
    (
        rf"^neck\.lateral_convs\.(\d)\.{_CONV_MODULE}",
        lambda m: f"fpn.laterals.{m[1]}.{_layer(m[2])}",
    ),
    (rf"^neck\.fpn_convs\.(\d)\.{_CONV_MODULE}", lambda m: f"fpn.outputs.{m[1]}.{_layer(m[2])}"),
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"rpn.conv.conv.\1"),
    (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
    (
        rf"^roi_head\.bbox_head\.(?:(\d)\.)?shared_convs\.(\d)\.{_CONV_MODULE}",
        lambda m: f"{_box_head(m[1])}.convs.{m[2]}.{_layer(m[3])}",
    ),
    (
        r"^roi_head\.bbox_head\.(?:(\d)\.)?shared_fcs\.",
        lambda m: f"{_box_head(m[1])}.fcs.",
    ),
    (r"^roi_head\.bbox_head\.(?:(\d)\.)?fc_cls\.", lambda m: f"{_box_head(m[1])}.classifier."),
    (r"^roi_head\.bbox_head\.(?:(\d)\.)?fc_reg\.", lambda m: f"{_box_head(m[1])}.regressor."),
    (
        rf"^roi_head\.mask_head\.(?:{NUM_STAGES - 1}\.)?convs\.(\d)\.{_CONV_MODULE}",
        lambda m: f"mask_head.convs.{m[1]}.{_layer(m[2])}",
    ),
    (rf"^roi_head\.mask_head\.(?:{NUM_STAGES - 1}\.)?upsample\.", "mask_head.deconv."),
    (rf"^roi_head\.mask_head\.(?:{NUM_STAGES - 1}\.)?conv_logits\.", "mask_head.predictor."),
    (
        r"^bbox_head\.(cls|reg)_convs\.(\d)\.conv\.",
        lambda m: f"retina_head.{_BRANCHES[m[1]]}_convs.{m[2]}.conv.",
    ),
    (r"^bbox_head\.retina_cls\.", "retina_head.classifier."),
    (r"^bbox_head\.retina_reg\.", "retina_head.regressor."),
]
_MMDETECTION_TOP: Rules = [(r"^fpn\.outputs\.3\.conv\.", "fpn.p6."),
                           (r"^fpn\.outputs\.4\.conv\.", "fpn.p7.")]  # fmt: skip


def from_framework(
    detector: Detector,
    tensors: Mapping[str, Tensor],
    framework: Framework,
    pixels: Pixels | None,
    source: str,
) -> dict[str, Tensor]:
    """Give the weights of a detector of detectron2 or mmdetection by our names.

    What is not understood keeps its name, and shapes may be others than the detector's:
    ``load_parts`` says so.

    Args:
        detector: of the same settings.
        tensors: their ``state_dict``.
        framework: whose it is.
        pixels: how images were given to it. None: as the file says, which old ones of detectron2
            do.
        source: where they come from, for messages.

    Raises:
        ValueError: the file contradicts what was said of it, or is of mmdetection 1.
    """
    pixels = _checked_pixels(tensors, pixels, source)
    is_retinanet = "retina_head" in model_parts(detector.config)
    backbone = rename(_backbone_of(tensors), detector.backbone)
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not _IGNORED.search(name) and name not in _backbone_of(tensors)
    }
    if framework == "detectron2":
        _check_anchors(detector, tensors, source)
        rest = renamed_all(rest, _detectron2(3 if is_retinanet else 2))
    else:
        rest = _from_mmdetection(rest, detector, source)
    named = {**{f"backbone.{name}": tensor for name, tensor in backbone.items()}, **rest}
    for name in named:
        if re.fullmatch(r"box_head\.(stages\.\d\.)?fcs\.0\.weight", name):
            if named[name].ndim == 2 and named[name].shape[1] % POOLED_SIZE**2 == 0:
                named[name] = channels_last(named[name])
        elif name in FIRST_CONVOLUTIONS:
            named[name] = taking_rgb(named[name], pixels)
        elif framework == "detectron2" and _OF_ANCHORS.match(name):
            named[name] = _by_ratio(named[name], detector)
    warn_of_stride(detector, pixels, source)
    return named


def with_sampling(config: RunConfig, sampling_ratio: int) -> RunConfig:
    """Return a config whose model pools regions with so many points a side; see the option."""
    roi = dataclasses.replace(config.model.roi, sampling_ratio=sampling_ratio)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, roi=roi))


def parts_to_load(detector: Detector, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the detector's parts, and what else is there, so that nothing is overlooked."""
    own = model_parts(detector.config)
    return own + sorted({part_of(name) for name in tensors} - set(own))


def _backbone_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of the backbone itself, which detectron2 has within its pyramid."""
    is_within = any(name.startswith("backbone.bottom_up.") for name in tensors)
    prefix = "backbone.bottom_up." if is_within else "backbone."
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _from_mmdetection(
    tensors: Mapping[str, Tensor], detector: Detector, source: str
) -> dict[str, Tensor]:
    if old := [name for name in tensors if _MMDETECTION_1.search(name)]:
        raise ValueError(
            f"{source}: found {old[0]}, a name of mmdetection 1, which has the background first "
            f"and boxes a pixel larger. Convert it with mmdetection's own "
            f"tools/model_converters/upgrade_model_version.py first."
        )
    if has_cascade(detector.config):
        tensors = _from_mmdetections_cascade(tensors, source)
    named = renamed_all(tensors, _MMDETECTION)
    if "retina_head" in model_parts(detector.config):
        logger.warning(
            "%s: mmdetection makes P7 of P6 without the ReLU between them that bigdet and "
            "detectron2 have: large objects are found a little differently until it is fine-tuned",
            source,
        )
        named = renamed_all(named, _MMDETECTION_TOP)
    return named


def _from_mmdetections_cascade(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    masks = [name for name in tensors if _OTHER_MASKS.match(name)]
    logger.warning(
        "%s: mmdetection's cascade averages the logits of its stages, bigdet's their probabilities"
        "%s: scores differ a little", source, " and has one mask head, that of the last stage, "
        "where mmdetection averages the masks of three" if masks else "",
    )  # fmt: skip
    kept = {name: tensor for name, tensor in tensors.items() if name not in masks}
    shift, scale = DELTA_WEIGHTS[-1]
    factors = torch.tensor(_LAST_DEVIATIONS) * torch.tensor((shift, shift, scale, scale))
    for name in _LAST_REGRESSOR:
        if name in kept and len(kept[name]) % 4 == 0:  # else its shape will not fit
            of_rows = factors.to(kept[name]).repeat(len(kept[name]) // 4)
            kept[name] = kept[name] * of_rows.view(-1, *[1] * (kept[name].ndim - 1))
    return kept


def _by_ratio(value: Tensor, detector: Detector) -> Tensor:
    """Order rows, which belong to the anchors of a point, by ratio, then size, as ours are.

    detectron2 has them by size, then ratio. The anchors may have several rows each.
    """
    config = detector.config.retina
    num_sizes, num_ratios = config.scales_per_octave, len(config.anchor_ratios)
    if len(value) % (num_sizes * num_ratios):
        return value  # of other anchors: its shape will not fit
    grouped = value.reshape(num_sizes, num_ratios, -1, *value.shape[1:])
    return grouped.transpose(0, 1).reshape(value.shape)


def _checked_pixels(tensors: Mapping[str, Tensor], pixels: Pixels | None, source: str) -> Pixels:
    """Give how images were given to the network, by what was said and by what the file says."""
    stated = _stated_pixels(tensors, source)
    if pixels is None and stated is None:
        raise ValueError(
            f"{source}: does not say how images were given to the network. Say it with --pixels: "
            f"bgr_255 (detectron2's R-50 and R-101, mmdetection's 'caffe' models: reversed, and "
            f"not divided by the deviation), bgr (detectron2's and mmdetection's X-101-32x8d, "
            f"X-152-32x8d: reversed), or rgb (mmdetection's others, detectron2's from torchvision)."
        )
    if stated is not None and pixels not in (None, stated):
        raise ValueError(
            f"{source}: --pixels is {pixels}, but its pixel_mean and pixel_std are those of "
            f"{stated}. Leave --pixels out."
        )
    chosen = stated if pixels is None else pixels
    assert chosen is not None
    return chosen


def _stated_pixels(tensors: Mapping[str, Tensor], source: str) -> Pixels | None:
    """Read what the buffers of detectron2 say, where they are in the file."""
    if "pixel_mean" not in tensors or "pixel_std" not in tensors:
        return None
    mean, deviation = (tensors[f"pixel_{name}"].flatten().float() for name in ("mean", "std"))
    known: dict[Pixels, tuple[Tensor, Tensor]] = {
        "rgb": (torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_DEVIATION)),
        "bgr": (torch.tensor(PIXEL_MEAN[::-1]), torch.tensor(PIXEL_DEVIATION[::-1])),
        "bgr_255": (torch.tensor(PIXEL_MEAN[::-1]), torch.ones(3)),
    }
    for name, (known_mean, known_deviation) in known.items():
        is_mean = mean.shape == (3,) and bool(((mean - known_mean).abs() < MEAN_TOLERANCE).all())
        if is_mean and bool(torch.isclose(deviation, known_deviation, rtol=0.01).all()):
            return name
    raise ValueError(
        f"{source}: found pixel_mean {mean.tolist()} and pixel_std {deviation.tolist()}, expected "
        f"those of ImageNet, as {PIXEL_MEAN} and {PIXEL_DEVIATION} in RGB. bigdet has no "
        f"others, so these weights cannot be used."
    )


def _check_anchors(detector: Detector, tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare the anchors that files of detectron2 may have with the detector's."""
    part = "retina_head" if "retina_head" in model_parts(detector.config) else "rpn"
    head = detector.get_submodule(part)
    cells = head.get_buffer("cells")
    for name, theirs in tensors.items():
        if not (match := _ANCHORS.search(name)):
            continue
        level = int(match[1])
        own = cells[level] if level < len(cells) else cells[:0]
        if isinstance(head, RetinaHead):
            theirs = _by_ratio(theirs, detector)
        if theirs.shape != own.shape or not torch.allclose(theirs.float(), own, atol=0.01):
            raise ValueError(
                f"{source}: its anchors of level {level} are {theirs.tolist()}, those of the "
                f"config {own.tolist()}. Make anchor_sizes and anchor_ratios of "
                f"model.{part.removesuffix('_head')} those of the weights."
            )
