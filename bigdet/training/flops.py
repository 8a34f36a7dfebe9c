"""The floating-point operations of a training step, for the model FLOPs utilization (MFU).

MFU is the FLOPs that the model needs, over what the device computes in the same time at most. What
activation checkpointing computes again is not needed (Chowdhery et al., *PaLM*, 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bigdet import distributed
from bigdet.config.engine import Precision
from bigdet.engine.precision import autocast
from bigdet.host.accelerators import peak_flops
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.models.frozen import is_frozen
from bigdet.structures import Batch

BACKWARD = 2
"""Matrix products of the backward pass for each one of the forward pass."""


class FlopMeter:
    """Counts the FLOPs of this rank's micro-batches, if the peak of its device is known."""

    def __init__(self, detector: Detector, precision: Precision, device: torch.device) -> None:
        """Prepare; nothing is counted unless all ranks know their peaks (a collective)."""
        self._detector, self._precision, self._device = detector, precision, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name)
        self._peak = None if distributed.any_rank(peak is None) else peak
        self._flops_per_pixel: float | None = None
        self._pixels = 0

    def count(self, batch: Batch) -> None:
        """Count a micro-batch once, with a forward pass; a collective where weights are sharded."""
        if self._peak is None or self._flops_per_pixel is not None:
            return
        flops = count_flops(self._detector, batch.to(self._device), self._precision)
        self._flops_per_pixel = flops / _pixels(batch)

    def add(self, micro_batches: Sequence[Batch]) -> None:
        """Count the micro-batches of a step, by the pixels of their canvases."""
        self._pixels += sum(map(_pixels, micro_batches))

    def take(self) -> float:
        """Return the seconds since the last call at the peak of the device; 0 if not known."""
        pixels, self._pixels = self._pixels, 0
        if self._peak is None or self._flops_per_pixel is None:
            return 0.0
        return pixels * self._flops_per_pixel / self._peak


def count_flops(detector: Detector, batch: Batch, precision: Precision) -> float:
    """Return the FLOPs of the forward and backward pass of a micro-batch, from a forward pass.

    Matrix products, convolutions and attention count, a multiplication and an addition as two.
    Parts without a trained parameter have no backward pass.

    Args:
        detector: in training mode; its running statistics stay as they are.
        batch: on its device.
        precision: of the training.
    """
    counter = FlopCounterMode(display=False, depth=None)  # type: ignore[arg-type]
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        autocast(batch.images.device, precision),
        counter,
    ):
        detector(batch)
    norms.discard_statistics(detector)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    frozen = _frozen_flops(detector, type(detector).__name__, counts)
    return (1 + BACKWARD) * float(counts["Global"]) - BACKWARD * frozen


def _frozen_flops(module: nn.Module, name: str, counts: Mapping[str, int]) -> int:
    """Add up the forward FLOPs of frozen parts: those with parameters, of which none is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    is_fixed = is_frozen(module) or (trained and not any(trained))
    if is_fixed and name in counts:
        return counts[name]
    # Of a part that is not called as a whole, such as the stages of a ResNet, its own parts.
    children = module.named_children()
    return sum(_frozen_flops(child, f"{name}.{own}", counts) for own, child in children)


def _pixels(batch: Batch) -> int:
    """Count the pixels of the canvases of a micro-batch, padding too."""
    return batch.images[:, 0].numel()
