"""VGG-16's fc6 and fc7 as the layers of a box head, which over one map read what they do there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigdet.models.detector import Detector
from bigdet.models.heads.box import BoxHead
from bigdet.models.weights import LoadedPart, refuse_not_finite
from bigdet.weights.torchvision_layout import channels_last

_NAMES = (("pre_logits.fc1", "pre_logits.fc2"), ("classifier.0", "classifier.3"))
"""fc6 and fc7 as timm and torchvision call them."""


def load_fc_layers(detector: Detector, state: Mapping[str, Tensor], source: str) -> LoadedPart:
    """Copy fc6 and fc7 into the box head; its layers of classes and boxes stay as they are.

    Args:
        detector: a Faster, Mask or Keypoint R-CNN over VGG-16.
        state: of the classifier, by timm's or torchvision's names.
        source: where it comes from, for messages.

    Raises:
        ValueError: the classifier has no such layers, or the box head others.
    """
    advice = "Or leave box_head out of start_from.parts."
    names = next((pair for pair in _NAMES if f"{pair[0]}.weight" in state), None)
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
