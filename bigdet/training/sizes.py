"""Sizes of a model and of its checkpoints, known before the model is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bigdet.config.phase import PhaseConfig
from bigdet.config.run import RunConfig, phase_model
from bigdet.engine.precision import rounded_parameters
from bigdet.models import norms
from bigdet.models.backbones.build import freeze_stages
from bigdet.models.build import build_detector
from bigdet.models.frozen import freeze_backbone, frozen_tensors

FP32_BYTES = 4
BF16_BYTES = 2


@dataclass(frozen=True)
class ModelSizes:
    """Counts of numbers, not bytes.

    Attributes:
        parameters: all weights.
        trained: weights that the phase trains.
        buffers: running statistics.
        frozen: weights of a frozen backbone, in bf16 and in no checkpoint.
        rounded: those of ``parameters`` that ``engine.gather_precision: bf16`` rounds.
    """

    parameters: int
    trained: int
    buffers: int
    frozen: int = 0
    rounded: int = 0


def model_sizes(config: RunConfig, phase: str, num_classes: int) -> ModelSizes:
    """Count the numbers of a phase's detector; nothing is allocated."""
    settings = config.phases[phase]
    with torch.device("meta"):
        detector = build_detector(phase_model(config, phase), num_classes)
    if settings.norm_mode is not None:
        norms.set_norm_mode(detector, settings.norm_mode)
    freeze_stages(detector.backbone, settings.freeze_stages)
    if settings.freeze == "backbone":
        freeze_backbone(detector.backbone)
    frozen = sum(tensor.numel() for tensor in frozen_tensors(detector).values())
    return ModelSizes(
        sum(parameter.numel() for parameter in detector.parameters()),
        sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad),
        sum(buffer.numel() for buffer in detector.buffers()) - frozen,
        frozen,
        sum(parameter.numel() for parameter in rounded_parameters(detector)),
    )


def optimizer_tensors(phase: PhaseConfig) -> int:
    """Tensors of a trained weight's size that the optimizer and the moving average keep."""
    of_average = phase.ema is not None
    if phase.optimizer == "adamw":
        return 2 + of_average
    return (1 if phase.momentum else 0) + of_average


def checkpoint_bytes(sizes: ModelSizes, phase: PhaseConfig) -> int:
    """Bytes of one checkpoint: weights, running statistics and optimizer state in fp32."""
    state = optimizer_tensors(phase) * sizes.trained
    return FP32_BYTES * (sizes.parameters + sizes.buffers + state)
