"""Names and orders of numbers of mmdetection 2 and 3: ResNets with GN, Swin, and whole detectors.

Its Swin merges patches in another order, and the last stage of its cascade has other deviations.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bigdet.config.model import has_cascade, model_parts
from bigdet.models.detector import Detector
from bigdet.models.heads.cascade import DELTA_WEIGHTS, NUM_STAGES
from bigdet.weights.renaming import BRANCHES, Rules, box_head, renamed_all

logger = logging.getLogger(__name__)

RESNET_GN: Rules = [(r"(^|\.)gn(\d)\.", r"\1bn\2.")]
_SWIN: Rules = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
_MMDETECTION_1 = re.compile(r"^bbox_head\.(\d\.)?(fc_cls|fc_reg|shared_\w+)\.|^mask_head\.")
_OTHER_MASKS = re.compile(rf"^roi_head\.mask_head\.[0-{NUM_STAGES - 2}]\.")
_LAST_REGRESSOR = [
    f"roi_head.bbox_head.{NUM_STAGES - 1}.fc_reg.{one}" for one in ("weight", "bias")
]
_LAST_DEVIATIONS = (0.033, 0.033, 0.067, 0.067)  # of x, y, width, height; ours are 1/30 and 1/15
_STAGE = r"(?:(\d)\.)?"  # of a cascade
_MASK_HEAD = rf"^roi_head\.mask_head\.(?:{NUM_STAGES - 1}\.)?"  # of a cascade the last stage's
_LAYER = r"(conv|bn|gn)\."
_LAYERS = {"conv": "conv", "bn": "norm", "gn": "norm"}
_PYRAMID = {"lateral": "laterals", "fpn": "outputs"}
_HEADS: Rules = [
    (
        rf"^neck\.(lateral|fpn)_convs\.(\d)\.{_LAYER}",
        lambda m: f"fpn.{_PYRAMID[m[1]]}.{m[2]}.{_LAYERS[m[3]]}.",
    ),
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"rpn.conv.conv.\1"),
    (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
    (
        rf"^roi_head\.bbox_head\.{_STAGE}shared_convs\.(\d)\.{_LAYER}",
        lambda m: f"{box_head(m[1])}.convs.{m[2]}.{_LAYERS[m[3]]}.",
    ),
    (rf"^roi_head\.bbox_head\.{_STAGE}shared_fcs\.", lambda m: f"{box_head(m[1])}.fcs."),
    (rf"^roi_head\.bbox_head\.{_STAGE}fc_cls\.", lambda m: f"{box_head(m[1])}.classifier."),
    (rf"^roi_head\.bbox_head\.{_STAGE}fc_reg\.", lambda m: f"{box_head(m[1])}.regressor."),
    (rf"{_MASK_HEAD}convs\.(\d)\.{_LAYER}", lambda m: f"mask_head.convs.{m[1]}.{_LAYERS[m[2]]}."),
    (rf"{_MASK_HEAD}upsample\.", "mask_head.deconv."),
    (rf"{_MASK_HEAD}conv_logits\.", "mask_head.predictor."),
    (
        r"^bbox_head\.(cls|reg)_convs\.(\d)\.conv\.",
        lambda m: f"retina_head.{BRANCHES[m[1]]}_convs.{m[2]}.conv.",
    ),
    (r"^bbox_head\.retina_cls\.", "retina_head.classifier."),
    (r"^bbox_head\.retina_reg\.", "retina_head.regressor."),
]
_RETINANET_TOP: Rules = [
    (r"^fpn\.outputs\.3\.conv\.", "fpn.p6."),
    (r"^fpn\.outputs\.4\.conv\.", "fpn.p7."),
]


def swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a Swin as its authors do, and order its merging of patches so."""
    return {
        name: _unfolded(tensor) if ".downsample." in name else tensor
        for name, tensor in renamed_all(state, _SWIN).items()
    }


def _unfolded(value: Tensor) -> Tensor:
    """Order the last axis ``4 * C`` of a layer that merges 2x2 patches as Swin's authors do.

    mmdetection has it by channel, row, column (``nn.Unfold``), they by column, row, channel.
    """
    grouped = value.reshape(*value.shape[:-1], -1, 2, 2)  # (..., C, 2, 2)
    return grouped.transpose(-1, -3).reshape(value.shape)


def mmdetection_heads(
    detector: Detector, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Name all of a detector of mmdetection but its backbone as ours, and order it so.

    Raises:
        ValueError: it is of mmdetection 1.
    """
    if old := [name for name in tensors if _MMDETECTION_1.search(name)]:
        raise ValueError(
            f"{source}: found {old[0]}, a name of mmdetection 1, which has the background first "
            f"and boxes a pixel larger. Convert it with mmdetection's own "
            f"tools/model_converters/upgrade_model_version.py first."
        )
    if has_cascade(detector.config):
        tensors = _from_cascade(tensors, source)
    named = renamed_all(tensors, _HEADS)
    if "retina_head" in model_parts(detector.config):
        logger.warning(
            "%s: mmdetection makes P7 of P6 without the ReLU between them that bigdet and "
            "detectron2 have: large objects are found a little differently until it is fine-tuned",
            source,
        )
        named = renamed_all(named, _RETINANET_TOP)
    return named


def _from_cascade(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
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
