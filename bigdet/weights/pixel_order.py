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
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector

logger = logging.getLogger(__name__)

MEAN_TOLERANCE = 1.0  # grey levels; Detectron's mean is not quite ours


def to_rgb(state: Mapping[str, Tensor], pixels: Pixels, source: str) -> dict[str, Tensor]:
    """Let the first convolution take images as ours: RGB, divided by the deviation.

    The means of Detectron and ours differ by less than one grey level, which is ignored.
    """
    found = [name for name in state if re.search(r"(^|\.)(conv1_w|stem\.conv1\.weight)$", name)]
    if len(found) != 1 or state[found[0]].ndim != 4:
        raise ValueError(
            f"{source}: found no first convolution (conv1_w or stem.conv1.weight), expected that "
            f"of a ResNet, which start_from.pixels is for."
        )
    return {**state, found[0]: taking_rgb(state[found[0]], pixels)}


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


def checked_pixels(tensors: Mapping[str, Tensor], pixels: Pixels | None, source: str) -> Pixels:
    """Return how images were given to the network, as stated by the user or by the file."""
    stated = _stated_pixels(tensors, source)
    chosen = pixels or stated
    if chosen is None:
        raise ValueError(
            f"{source}: does not say how images were given to the network. Say it with --pixels: "
            f"bgr_255 (detectron2's R-50 and R-101, mmdetection's 'caffe' models: reversed, and "
            f"not divided by the deviation), bgr (detectron2's and mmdetection's X-101-32x8d, "
            f"X-152-32x8d: reversed), or rgb (mmdetection's others, detectron2's from torchvision)."
        )
    if stated not in (None, chosen):
        raise ValueError(
            f"{source}: --pixels is {pixels}, but its pixel_mean and pixel_std are those of "
            f"{stated}. Leave --pixels out."
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
