"""Layers of a backbone counted from the image on, for learning rates that fall towards it."""

from __future__ import annotations

from timm.models import group_parameters

from bigdet.models.backbone_base import Backbone


def layer_ids(backbone: Backbone) -> tuple[dict[str, int], int]:
    """Number the layers of a backbone as timm and detectron2 do for layer-wise learning rates.

    Args:
        backbone: its `group_matcher` says what a layer is. In a ViT the patch embedding and the
            positions are layer 0 and block i is layer i + 1; in Swin and ConvNeXt the downsampling
            before a stage belongs to the first block of it.

    Returns:
        The layer of each parameter by its name in the backbone, and the number of what comes after
        the stages: depth + 1, where output norms, pyramid, neck and heads are.
    """
    parts = {id(p) for stage in backbone.stages for part in stage for p in part.parameters()}
    parts |= {id(parameter) for parameter in backbone.stem_parameters}
    found: dict[str, int] = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    ids = {name: found[name] for name, p in backbone.named_parameters() if id(p) in parts}
    last = 1 + max(ids.values(), default=-1)
    return {name: ids.get(name, last) for name in found}, last
