"""Parameter groups, optimizers and the learning rate of each step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bigdet.config.ema import EmaConfig
from bigdet.config.phase import PhaseConfig, drop_points, num_steps
from bigdet.models.layer_ids import layer_ids
from bigdet.models.norms import BatchNorm2d

# Position tables and tokens: offsets added to attention scores or features, not weights of a map.
# And scales: LayerScale's and ConvNeXt's of layers, SwinV2's of attention. Not the relative
# positions of ViTDet (``rel_pos_h``), which detectron2 decays.
PLAIN = re.compile(
    r"pos_emb|_pos$|_token\d?$|relative_position_bias_table|position_embedding_table|"
    r"attention_biases|temperature|logit_scale|gamma"
)
POSITION_NETWORK = ".cpb_mlp."  # SwinV2's, which computes a position table
BACKBONE = "backbone"


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    decay_norms: bool = False,
    decay_biases: bool = True,
    bias_lr_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict[str, object]]:
    """Split the trained parameters into groups of one weight decay and one rate.

    Position tables and scales of transformers are never decayed. Few groups, because multi-tensor
    updates work within a group: at most three, with layer decay for each of depth + 2 layers.

    Args:
        module: its parameters with ``requires_grad`` are trained.
        weight_decay: factor for all parameters that are decayed.
        decay_norms: decay scale and shift of BN and GN too (published code never decays those of
            LayerNorm).
        decay_biases: decay the biases of other layers.
        bias_lr_factor: rate of these biases divided by that of the weights.
        layer_decay: rate of a layer of ``module.backbone`` divided by that of the next layer
            (see `layer_factors`). None: one rate.

    Returns:
        Groups for a torch optimizer, each with its ``lr_factor``, without empty ones.
    """
    factors = {} if layer_decay is None else layer_factors(module, layer_decay)
    decays = {"weight": weight_decay, "plain": 0.0, "bias": weight_decay if decay_biases else 0.0}
    kind_of_biases = "bias" if bias_lr_factor != 1.0 else "weight" if decay_biases else "plain"
    found: dict[tuple[str, float], list[Tensor]] = {}
    for name, parameter, kind in _kinds(module, decay_norms):
        key = kind_of_biases if kind == "bias" else kind, factors.get(name, 1.0)
        found.setdefault(key, []).append(parameter)
    return [
        {
            "params": found[kind, factor],
            "weight_decay": decay,
            "lr_factor": factor * bias_lr_factor if kind == "bias" else factor,
        }
        for kind, decay in decays.items()
        for factor in sorted({factor for of_kind, factor in found if of_kind == kind})
    ]


def _kinds(module: nn.Module, decay_norms: bool) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield trained parameters with name and kind: ``weight``, ``bias``, ``plain`` (no decay)."""
    for place, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        # Only normalization layers have a weight with one dimension.
        is_norm = isinstance(weight, Tensor) and weight.ndim == 1
        is_decayed_norm = decay_norms and isinstance(layer, (BatchNorm2d, nn.GroupNorm))
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_bias = name.endswith("bias")
            is_plain = is_norm or PLAIN.search(name) or POSITION_NETWORK in f".{place}."
            is_plain = is_plain or (parameter.ndim <= 1 and not is_bias)
            kind = "bias" if is_bias and not is_norm else "weight"
            full_name = f"{place}.{name}" if place else name
            yield full_name, parameter, "plain" if is_plain and not is_decayed_norm else kind


def layer_factors(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the rate of each backbone parameter divided by that of the heads.

    ``layer_decay ** (depth + 1 - layer)`` with the layers of `layer_ids`, as BEiT, ViTDet and timm
    have it: output norms, pyramid, neck and heads are layer depth + 1, with factor 1.
    """
    backbone = getattr(module, BACKBONE)
    ids, last = layer_ids(backbone)
    return {f"{BACKBONE}.{name}": layer_decay ** (last - number) for name, number in ids.items()}


def build_optimizer(module: nn.Module, phase: PhaseConfig) -> Optimizer:
    """Make the optimizer of a phase; its learning rate is set at every step."""
    groups = parameter_groups(
        module,
        phase.weight_decay,
        decay_norms=phase.decay_norms,
        decay_biases=phase.decay_biases,
        bias_lr_factor=phase.bias_lr_factor,
        layer_decay=phase.layer_decay,
    )
    if phase.optimizer == "adamw":
        return AdamW(groups, lr=phase.lr, betas=phase.betas, foreach=True)
    return SGD(groups, lr=phase.lr, momentum=phase.momentum, foreach=True)


def scaled_lr(phase: PhaseConfig, images_per_step: int) -> float:
    """Return the learning rate after the warm-up, by the linear scaling rule if it is enabled."""
    if phase.reference_images_per_step is None:
        return phase.lr
    return phase.lr * images_per_step / phase.reference_images_per_step


def describe_lr(phase: PhaseConfig, images_per_step: int) -> str:
    """Describe the rate for the log: ``lr 0.02 at 16 images per step -> 0.08 at 64``."""
    decay = phase.layer_decay
    layers = "" if decay is None else f", times {decay:g} per layer of the backbone"
    if phase.reference_images_per_step is None:
        return f"lr {phase.lr:.3g} as written, not scaled with the images per step{layers}"
    return (
        f"lr {phase.lr:.3g} at {phase.reference_images_per_step} images per step -> "
        f"{scaled_lr(phase, images_per_step):.3g} at {images_per_step}{layers}"
    )


def describe_ema(ema: EmaConfig | None) -> str:
    """Describe the moving average for the log, after a comma; empty where there is none."""
    if ema is None:
        return ""
    also = " and the newest weights" * (ema.evaluate == "both")
    return f", the average of the weights (EMA {ema.decay:g}){also} evaluated"


def lr_at(phase: PhaseConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1, without the factors of groups."""
    assert phase.images_per_step is not None
    return scaled_lr(phase, phase.images_per_step) * lr_factor(phase, step)


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Return the factor of ``scaled_lr`` at a step.

    Linear warm-up from ``warmup_factor``. Schedule ``step``: times ``decay_factor`` at each drop;
    ``cosine``: (1 + cos(pi t)) / 2, where t goes from 0 at the end of the warm-up to 1 at the end
    of the phase.

    Args:
        phase: with its length in steps.
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


def ema_decay(ema: EmaConfig, step: int) -> float:
    """Return the part of the old average that stays in a step.

    Args:
        ema: section of the phase.
        step: number of the step among those that count, from 1.
    """
    return min(ema.decay, (1 + step) / (10 + step)) if ema.warm_up else ema.decay


def drop_steps(phase: PhaseConfig) -> list[int]:
    """Return the finished steps after which the rate drops; by default 8/12 and 11/12."""
    return [round(point) for point in drop_points(phase)]


def has_same_past(phase: PhaseConfig, other: PhaseConfig, steps: int) -> bool:
    """Return whether two schedules have the same factors in the first steps."""
    return all(lr_factor(phase, step) == lr_factor(other, step) for step in range(1, steps + 1))
