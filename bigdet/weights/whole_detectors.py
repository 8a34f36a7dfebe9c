"""Whole detectors of detectron2 and mmdetection: their names and orders of numbers as ours.

Faster, Mask, Cascade and Keypoint R-CNN with an FPN, and RetinaNet. As ours, both have the
background last, deltas in the order x, y, width, height with the deviations 0.1, 0.1, 0.2, 0.2, and
anchors that are not rounded and lie at multiples of the stride. What each has otherwise is in
``detectron_layout.py`` and ``mmdetection_layout.py``. Both have a first fully connected layer that
reads a region channel by channel, and images may be given to the backbone in another order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from bigdet.config.model import model_parts, used
from bigdet.config.run import RunConfig
from bigdet.config.start import Pixels
from bigdet.models.detector import Detector
from bigdet.models.heads.box import POOLED_SIZE
from bigdet.models.weights import part_of
from bigdet.weights.backbone_names import rename
from bigdet.weights.detectron_layout import detectron2_heads
from bigdet.weights.mmdetection_layout import mmdetection_heads
from bigdet.weights.pixel_order import checked_pixels, taking_rgb, warn_of_stride
from bigdet.weights.torchvision_layout import channels_last

Framework = Literal["detectron2", "mmdetection"]

FIRST_CONVOLUTIONS = ("backbone.conv1.weight", "backbone.patch_embed.proj.weight")
THEIR_SAMPLING_RATIO = 0  # of RoIAlign in both: adaptive

_IGNORED = re.compile(
    r"^pixel_(mean|std)$|anchor_generator\.|^data_preprocessor\.|_batches_tracked$"
)


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
    pixels = checked_pixels(tensors, pixels, source)
    backbone = _backbone_of(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name not in backbone}
    name_heads = {"detectron2": detectron2_heads, "mmdetection": mmdetection_heads}[framework]
    named = {
        **{f"backbone.{k}": value for k, value in rename(backbone, detector.backbone).items()},
        **{k: v for k, v in name_heads(detector, rest, source).items() if not _IGNORED.search(k)},
    }
    for name, tensor in named.items():
        if re.fullmatch(r"box_head\.(stages\.\d\.)?fcs\.0\.weight", name):
            if tensor.ndim == 2 and tensor.shape[1] % POOLED_SIZE**2 == 0:
                named[name] = channels_last(tensor)
        elif name in FIRST_CONVOLUTIONS:
            named[name] = taking_rgb(tensor, pixels)
    warn_of_stride(detector, pixels, source)
    return named


def with_sampling(config: RunConfig, sampling_ratio: int) -> RunConfig:
    """Return a config whose model pools regions with so many points a side; see the option."""
    roi = dataclasses.replace(used(config.model.roi), sampling_ratio=sampling_ratio)
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
