"""Parameter groups, optimizers and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bigdet.config.phase import PhaseConfig, drop_points, num_steps
from bigdet.models.norms import BatchNorm2d

# Position tables: offsets added to attention scores or features, not weights of a map. And scales:
# ConvNeXt's of layers, SwinV2's of attention.
PLAIN = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed", "gamma", "logit_scale")
POSITION_NETWORK = ".cpb_mlp."  # SwinV2's, which stands for a position table


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    decay_norms: bool = False,
    decay_biases: bool = True,
    bias_lr_factor: float = 1.0,
) -> list[dict[str, object]]:
    """Split what is trained into at most three groups: by weight decay, and by rate.

    Position tables and scales of transformers are never decayed. Few groups, because multi-tensor
    updates work within a group.

    Args:
        module: whose parameters are trained where they require gradients.
        weight_decay: of the weights.
        decay_norms: decay scale and shift of BN and GN too (LayerNorm's, in transformers, never
            are in the published codes).
        decay_biases: decay the biases of other layers.
        bias_lr_factor: rate of these biases over that of the weights.

    Returns:
        Groups for a torch optimizer, each with its ``lr_factor``; an empty one is left out.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    biases: list[Tensor] = []
    of_biases = decayed if decay_biases else plain
    if bias_lr_factor != 1.0:
        of_biases = biases
    for place, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        # Of all layers only normalizations have a weight with one dimension.
        is_norm = isinstance(weight, Tensor) and weight.ndim == 1
        is_decayed_norm = decay_norms and isinstance(layer, (BatchNorm2d, nn.GroupNorm))
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = is_norm or name in PLAIN or POSITION_NETWORK in f".{place}."
                if is_plain and not is_decayed_norm:
                    plain.append(parameter)
                elif name == "bias" and not is_norm:
                    of_biases.append(parameter)
                else:
                    decayed.append(parameter)
    bias_decay = weight_decay if decay_biases else 0.0
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": biases, "weight_decay": bias_decay, "lr_factor": bias_lr_factor},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, phase: PhaseConfig) -> Optimizer:
    """Make the optimizer of a phase over what is trained in the module.

    Its learning rate is set anew for every step.
    """
    groups = parameter_groups(
        module,
        phase.weight_decay,
        decay_norms=phase.decay_norms,
        decay_biases=phase.decay_biases,
        bias_lr_factor=phase.bias_lr_factor,
    )
    if phase.optimizer == "adamw":
        return AdamW(groups, lr=phase.lr, betas=phase.betas, foreach=True)
    return SGD(groups, lr=phase.lr, momentum=phase.momentum, foreach=True)


def scaled_lr(phase: PhaseConfig, images_per_step: int) -> float:
    """The learning rate after the warm-up, by the linear scaling rule where it is asked for."""
    if phase.reference_images_per_step is None:
        return phase.lr
    return phase.lr * images_per_step / phase.reference_images_per_step


def describe_lr(phase: PhaseConfig, images_per_step: int) -> str:
    """Say how the learning rate came about: ``lr 0.02 at 16 images per step -> 0.08 at 64``."""
    if phase.reference_images_per_step is None:
        return f"lr {phase.lr:.3g} as written, whatever the images per step"
    return (
        f"lr {phase.lr:.3g} at {phase.reference_images_per_step} images per step -> "
        f"{scaled_lr(phase, images_per_step):.3g} at {images_per_step}"
    )


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Part of ``scaled_lr`` that a step uses.

    Linear warm-up from ``warmup_factor``. After it, for ``step``: times ``decay_factor`` for each
    drop that so many finished steps have reached; for ``cosine``: (1 + cos(pi t)) / 2, where t goes
    from 0 at the end of the warm-up to 1 at the end of the phase.

    Args:
        phase: its length in steps.
        step: counted from 1.
    """
    finished = step - 1
    factor = 1.0
    if phase.schedule == "step":
        factor = phase.decay_factor ** sum(finished >= drop for drop in drop_steps(phase))
    elif phase.schedule == "cosine" and finished > phase.warmup_steps:
        done = (finished - phase.warmup_steps) / (num_steps(phase) - phase.warmup_steps)
        factor = (1 + math.cos(math.pi * done)) / 2
    if finished < phase.warmup_steps:
        progress = finished / phase.warmup_steps
        factor *= phase.warmup_factor * (1 - progress) + progress
    return factor


def drop_steps(phase: PhaseConfig) -> list[int]:
    """Finished steps after which the rate drops; by default 8/12 and 11/12 of the phase."""
    return [round(point) for point in drop_points(phase)]


def has_same_past(phase: PhaseConfig, other: PhaseConfig, steps: int) -> bool:
    """Tell whether two schedules give the first steps the same learning rates."""
    return all(lr_factor(phase, step) == lr_factor(other, step) for step in range(1, steps + 1))
