"""Names and orders of numbers of Detectron (Caffe2) and detectron2.

Detectron's ResNets; detectron2's ResNets and whole detectors. In detectron2 RetinaNet's anchors are
in another order, which its files may list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bigdet.config.model import model_parts, used
from bigdet.models.detector import Detector
from bigdet.models.heads.retina import RetinaHead
from bigdet.weights.renaming import BRANCHES, Rules, box_head, renamed, renamed_all

_EPS = 1e-5  # of batch normalization
_ANCHORS = re.compile(r"(?:^|\.)anchor_generator\.cell_anchors\.(\d)$")
_OF_ANCHORS = re.compile(r"retina_head\.(classifier|regressor)\.")
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
DETECTRON2_RESNET: Rules = [
    (r"^stem\.fc\.", "fc."),
    (r"^linear\.", "fc."),
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
]


def detectron_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a ResNet of Detectron as ours.

    Its names are Caffe2's, as ``res2_0_branch2a_w`` and ``res2_0_branch2a_bn_s``. Detectron folds
    the statistics of batch normalization into scale and shift.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _DETECTRON_BACKBONE.match(name) or name.endswith("_momentum"):
            continue
        new = renamed(name, _DETECTRON)
        named[new] = tensor
        if name.endswith("_bn_s"):
            norm = new.removesuffix(".weight")
            named.setdefault(f"{norm}.running_mean", torch.zeros_like(tensor))
            named.setdefault(f"{norm}.running_var", torch.full_like(tensor, 1 - _EPS))
    return named


def detectron2_heads(
    detector: Detector, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Name all of a detector of detectron2 but its backbone as ours, and order it so.

    Raises:
        ValueError: the file lists other anchors than the detector's.
    """
    is_retinanet = "retina_head" in model_parts(detector.config)
    _check_anchors(detector, tensors, "retina_head" if is_retinanet else "rpn", source)
    named = renamed_all(tensors, _heads(3 if is_retinanet else 2))
    return {
        name: _by_ratio(tensor, detector) if _OF_ANCHORS.match(name) else tensor
        for name, tensor in named.items()
    }


def _heads(first_level: int) -> Rules:
    """Give the rules for names, with a pyramid that begins at P2 or P3."""
    return [
        (
            r"^backbone\.fpn_(lateral|output)(\d)\.(norm\.)?",
            lambda m: f"fpn.{m[1]}s.{int(m[2]) - first_level}.{m[3] or 'conv.'}",
        ),
        (r"^backbone\.top_block\.", "fpn."),
        *_HEADS,
    ]


_STAGE = r"(?:(\d)\.)?"  # of a cascade
_HEADS: Rules = [
    (r"^proposal_generator\.rpn_head\.conv\.(weight|bias)$", r"rpn.conv.conv.\1"),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
    (
        rf"^roi_heads\.box_head\.{_STAGE}conv(\d)\.(norm\.)?",
        lambda m: f"{box_head(m[1])}.convs.{int(m[2]) - 1}.{m[3] or 'conv.'}",
    ),
    (
        rf"^roi_heads\.box_head\.{_STAGE}fc(\d)\.",
        lambda m: f"{box_head(m[1])}.fcs.{int(m[2]) - 1}.",
    ),
    (rf"^roi_heads\.box_predictor\.{_STAGE}cls_score\.", lambda m: f"{box_head(m[1])}.classifier."),
    (rf"^roi_heads\.box_predictor\.{_STAGE}bbox_pred\.", lambda m: f"{box_head(m[1])}.regressor."),
    (
        r"^roi_heads\.(mask|keypoint)_head\.(?:mask_|conv_)fcn(\d)\.(norm\.)?",
        lambda m: f"{m[1]}_head.convs.{int(m[2]) - 1}.{m[3] or 'conv.'}",
    ),
    (r"^roi_heads\.mask_head\.(deconv|predictor)\.", r"mask_head.\1."),
    (r"^roi_heads\.keypoint_head\.score_lowres\.", "keypoint_head.deconv."),
    (
        r"^head\.(cls|bbox)_subnet\.([0246])\.",  # an activation stands between two
        lambda m: f"retina_head.{BRANCHES[m[1]]}_convs.{int(m[2]) // 2}.conv.",
    ),
    (r"^head\.cls_score\.", "retina_head.classifier."),
    (r"^head\.bbox_pred\.", "retina_head.regressor."),
]


def _by_ratio(value: Tensor, detector: Detector) -> Tensor:
    """Order rows, which belong to the anchors of a point, by ratio, then size, as ours are.

    detectron2 has them by size, then ratio. The anchors may have several rows each.
    """
    config = used(detector.config.retina)
    num_sizes, num_ratios = config.scales_per_octave, len(config.anchor_ratios)
    if len(value) % (num_sizes * num_ratios):
        return value  # of other anchors: its shape will not fit
    grouped = value.reshape(num_sizes, num_ratios, -1, *value.shape[1:])
    return grouped.transpose(0, 1).reshape(value.shape)


def _check_anchors(
    detector: Detector, tensors: Mapping[str, Tensor], part: str, source: str
) -> None:
    """Compare the anchors that files of detectron2 may have with the detector's."""
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
