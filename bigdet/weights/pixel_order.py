"""How images were given to a network of others, and making up for it in its first convolution.

bigdet's are RGB and divided by the deviation; Detectron's are reversed (BGR), and not divided where
the network is MSRA's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bigdet.config.start import Pixels
from bigdet.models.backbone_base import Backbone
from bigdet.models.backbones.resnet import ResNet
from bigdet.models.backbones.timm_net import TimmBackbone
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector

logger = logging.getLogger(__name__)

_DETECTRONS = re.compile(r"^conv1_w$|(^|\.)stem\.conv1\.weight$")
MEAN_TOLERANCE = 1.0  # grey levels; Detectron's mean is not quite ours


def with_rgb(
    tensors: Mapping[str, Tensor], backbone: Backbone, pixels: Pixels, source: str
) -> dict[str, Tensor]:
    """Let a backbone's first convolution take images as ours: RGB, divided by the deviation.

    The means of Detectron and ours differ by less than one grey level, which is ignored.

    Args:
        tensors: by the backbone's names.
        backbone: to be filled with them.
        pixels: how images were given to the network.
        source: where they come from, for messages.
    """
    if pixels == "rgb":
        return dict(tensors)
    convolutions = [name for name, each in backbone.state_dict().items()
                    if each.ndim == 4 and each.shape[1] == 3]  # fmt: skip
    first = next(iter(convolutions), "")
    weight = tensors.get(first, torch.zeros(0))
    if weight.ndim != 4 or weight.shape[1] != 3 or isinstance(backbone, TimmBackbone):
        raise ValueError(
            f"{source}: found no first convolution of a backbone of bigdet's own, which pixels: "
            f"{pixels} changes. Choose another model.backbone, or weights for RGB images."
        )
    return {**tensors, first: taking_rgb(weight, pixels)}


def taking_rgb(weight: Tensor, pixels: Pixels) -> Tensor:
    """Return the first convolution ``(C, 3, h, w)`` that does with our images what theirs does."""
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


def backbone_pixels(
    tensors: Mapping[str, Tensor], backbone: Backbone, pixels: Pixels | None, source: str
) -> Pixels:
    """Return how images were given to a backbone: `checked_pixels`, and RGB where nobody says.

    Args:
        tensors: by the names of the file.
        backbone: to be filled with them.
        pixels: ``start_from.pixels``.
        source: the file, for messages.

    Raises:
        ValueError: nobody says, and it is a ResNet by the names of Detectron or detectron2.
    """
    is_named = isinstance(backbone, ResNet) and any(_DETECTRONS.search(name) for name in tensors)
    default: Pixels | None = None if is_named else "rgb"
    return checked_pixels(tensors, pixels, source, "start_from.pixels", default)


def checked_pixels(
    tensors: Mapping[str, Tensor],
    pixels: Pixels | None,
    source: str,
    option: str = "--pixels",
    default: Pixels | None = None,
) -> Pixels:
    """Return how images were given to the network, as stated by the user or by the file."""
    stated = _stated_pixels(tensors, source)
    chosen = pixels or stated or default
    if chosen is None:
        raise ValueError(
            f"{source}: does not say how images were given to the network. Say it with {option}: "
            f"bgr_255 (detectron2's R-50 and R-101, mmdetection's 'caffe' models: reversed, and "
            f"not divided by the deviation), bgr (detectron2's and mmdetection's X-101-32x8d, "
            f"X-152-32x8d: reversed), or rgb (mmdetection's others, detectron2's from torchvision)."
        )
    if stated not in (None, chosen):
        raise ValueError(
            f"{source}: {option} is {pixels}, but its pixel_mean and pixel_std are those of "
            f"{stated}. Leave {option} out."
        )
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
