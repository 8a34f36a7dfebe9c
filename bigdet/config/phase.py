"""A phase: its length, batch, optimizer, learning rate and schedule; its other parts by section."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.augment import AugmentConfig, check_augment
from bigdet.config.data import PhaseDataConfig
from bigdet.config.ema import EmaConfig
from bigdet.config.families import DETECTORS
from bigdet.config.model import ModelConfig, has_batch_norm, parts_with_batch_norm
from bigdet.config.own import FORM
from bigdet.config.resize import ResizeConfig, check_resize, ignored_in_resize
from bigdet.config.rules import (
    CHOICES,
    ConfigError,
    Ignored,
    below_one,
    fraction,
    not_negative,
    only_for,
    positive,
    positive_fraction,
    require,
)
from bigdet.config.start import StartFromConfig, ignored_in_start

NormMode = Literal["live", "sync", "affine", "fixed"]
LENGTH_UNITS = ("steps", "passes", "images")
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
BACKBONE_STAGES = 5


@dataclass(frozen=True, kw_only=True)
class PhaseModelConfig:
    """What a phase changes in the model; the other phases do not see it."""

    detector: str | None = field(default=None, metadata={CHOICES: (*DETECTORS, FORM)})
    """Another detector of the R-CNN family. A cascade after a plain detector (late cascade) starts
    with copies of its box head in all stages. None: ``model.detector``."""
    drop_path: float | None = None
    """Highest rate of stochastic depth. None: ``model.drop_path``."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One part of a run with settings of its own."""

    steps: int | None = None
    """Length of the phase in optimizer steps. Exactly one of ``steps``, ``passes`` and ``images``
    sets the length; the run folder's config has ``steps``."""
    passes: float | None = None
    """Length in passes through the training data."""
    images: int | None = None
    """Length in training images; the steps follow from ``images_per_step``."""
    images_per_gpu: int = MISSING
    """Images in one forward pass of one rank (micro-batch). Losses are normalized over these images
    (by their objects or samples), as in the published code, and live BN takes its statistics from
    them: another number changes the gradient even if ``images_per_step`` stays."""
    images_per_step: int | None = None
    """Images per optimizer step over all ranks; beyond ranks x ``images_per_gpu``, gradients are
    accumulated. None: one micro-batch per rank."""
    data: PhaseDataConfig = field(default_factory=PhaseDataConfig)
    """Data of this phase in place of the run's."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Size of the images."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Other random changes of the images."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = MISSING
    """Learning rate at ``reference_images_per_step``."""
    reference_images_per_step: int | None = None
    """Linear scaling rule: the rate used is ``lr`` x images per step / this, up or down. It scales
    nothing else; with a length in ``images`` or ``passes`` the steps follow the batch too. None:
    ``lr`` as given."""
    momentum: float = field(default=0.9, metadata=only_for("optimizer", "sgd"))
    """Momentum of SGD."""
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata=only_for("optimizer", "adamw")
    )
    """Betas of AdamW."""
    weight_decay: float = 1e-4
    """On weights and biases; not on normalization layers (but see ``decay_norms``), nor on the
    position tables and scales of transformers."""
    decay_norms: bool = False
    """Also decay scale and shift of BN and GN, as mmdetection does unless a config says otherwise
    (its baselines, and paper 2's fine-tuning with affine or SyncBN)."""
    decay_biases: bool = True
    """Decay biases of other layers. False in Detectron."""
    bias_lr_factor: float = 1.0
    """Learning rate of these biases over that of the weights. 2 in Detectron."""
    layer_decay: float | None = None
    """Learning rate of each layer of the backbone over that of the layer after it. The factor of a
    layer is ``layer_decay`` to the power of the layers above it: depth + 1 for the stem (and the
    positions of a ViT), 1 for the last block, and 0 for output norms, neck and heads, whose rate is
    ``lr``. ViTDet from MAE weights: 0.7, 0.8, 0.9 for B, L, H. None: one rate."""
    ema: EmaConfig | None = None
    """A moving average (EMA) of the weights: what is evaluated, and what the next phase starts
    from. None: no average."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """After the warm-up: ``constant``; ``step``: times ``decay_factor`` at each of ``drops``; or
    ``cosine``: half a cosine, from the full rate at the end of the warm-up to 0 at the end."""
    drops: list[int | float] | None = field(default=None, metadata=only_for("schedule", "step"))
    """When the rate drops, in the unit of the phase's length; negative values count from its end
    (paper 1's last 60k and last 20k steps: -60_000, -20_000). None: at 2/3 and 11/12 of the length
    (8 and 11 of 12 passes)."""
    decay_factor: float = field(default=0.1, metadata=only_for("schedule", "step"))
    """Factor of each drop."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    warmup_factor: float = 0.001
    """Fraction of the rate at which the warm-up starts."""
    norm_mode: NormMode | None = None
    """For BN only. ``live``: statistics of the batch of each GPU. ``sync``: of the batches of all
    GPUs together, so that losses depend on their number. ``affine``: statistics fixed, scale and
    shift trained. ``fixed``: both fixed. Must be null without BN."""
    freeze: Literal["backbone"] | None = None
    """``backbone``: keep the whole backbone as it starts, its matrices in bf16 (half the memory),
    without gradients, optimizer state, kept activations or drop path. Ranks have all of it or a
    share (``engine.shard_frozen``). It is in no checkpoint: the run folder has it once, in
    ``frozen``. Output norms and the pyramid of a ViT are trained. None: as ``freeze_stages``
    says."""
    freeze_stages: int = 0
    """Number of stages at the start of the backbone that are not trained; the stem is the first."""
    start_from: StartFromConfig = field(default_factory=StartFromConfig)
    """Where the weights come from."""
    model: PhaseModelConfig = field(default_factory=PhaseModelConfig)
    """What this phase changes in the model."""


def data_key(name: str, phase: PhaseConfig, split: Split) -> str:
    """Return the key of the section that a phase takes a split from: its own, or the run's."""
    key = f"data.{split}"
    return key if getattr(phase.data, split) is None else f"phases.{name}.{key}"


def length_of(phase: PhaseConfig) -> tuple[str, float]:
    """Return how long a phase is: the unit (``steps``, ``passes`` or ``images``) and the number."""
    lengths = {unit: getattr(phase, unit) for unit in LENGTH_UNITS}
    (found,) = ((unit, length) for unit, length in lengths.items() if length is not None)
    return found  # the only one: check_config refuses others


def num_steps(phase: PhaseConfig) -> int:
    """Return the optimizer steps of a phase whose length has been settled."""
    assert phase.steps is not None
    return phase.steps


def drop_points(phase: PhaseConfig) -> list[float]:
    """Return when the rate drops, in the unit of the phase's length and counted from its start."""
    length = length_of(phase)[1]
    if phase.drops is None:
        return [length * 2 / 3, length * 11 / 12]
    return [drop if drop >= 0 else length + drop for drop in phase.drops]


def in_steps(phase: PhaseConfig, steps_per_unit: float) -> PhaseConfig:
    """Return a phase with its length and its drops in steps instead of its own unit."""
    drops = phase.drops
    if drops is not None:
        drops = [round(point * steps_per_unit) for point in drop_points(phase)]
    length = length_of(phase)[1]
    steps = math.ceil(length * steps_per_unit - 1e-6)  # 1.1 x 10 is a little more than 11
    return dataclasses.replace(phase, steps=steps, passes=None, images=None, drops=drops)


def num_lanes(phase: PhaseConfig) -> int:
    """Return the micro-batches of one step over all ranks; ``images_per_step`` must be known."""
    assert phase.images_per_step is not None
    return phase.images_per_step // phase.images_per_gpu


def check_phase(key: str, phase: PhaseConfig, model: ModelConfig, loaded: list[str]) -> None:
    """Check the options of a phase, except ``start_from``.

    Args:
        key: ``phases.NAME``.
        phase: the phase.
        model: the model that it trains.
        loaded: parts of the model that do not start from random weights.
    """
    positive(key, phase, "images_per_gpu", "images_per_step", "lr", "reference_images_per_step")
    not_negative(key, phase, "warmup_steps", "weight_decay")
    fraction(key, phase, "flip")
    if phase.images_per_step is not None and phase.images_per_step % phase.images_per_gpu:
        raise ConfigError(
            f"{key}.images_per_step: found {phase.images_per_step}, expected a multiple of "
            f"images_per_gpu, {phase.images_per_gpu}."
        )
    check_resize(f"{key}.resize", phase.resize)
    check_augment(f"{key}.augment", phase.augment, phase.images_per_gpu, model)
    _check_schedule(key, phase)
    check_length(key, phase)
    _check_norm_mode(key, phase, model, loaded)
    _check_freezing(key, phase, loaded)


def _check_freezing(key: str, phase: PhaseConfig, loaded: list[str]) -> None:
    stages = phase.freeze_stages
    is_fine = 0 <= stages <= BACKBONE_STAGES
    require(is_fine, f"{key}.freeze_stages", stages, f"0 to {BACKBONE_STAGES}")
    if stages and phase.freeze is not None:
        raise ConfigError(
            f"{key}.freeze_stages: found {stages}, but freeze: {phase.freeze} freezes all of them. "
            f"Remove one of the two."
        )
    if "backbone" not in loaded and (stages or phase.freeze is not None):
        option, found = ("freeze_stages", stages) if stages else ("freeze", phase.freeze)
        raise ConfigError(
            f"{key}.{option}: found {found}, but the backbone starts from random weights, and "
            f"frozen random filters cost about 3 AP. Remove it."
        )


def _check_norm_mode(key: str, phase: PhaseConfig, model: ModelConfig, loaded: list[str]) -> None:
    mode = phase.norm_mode
    if phase.decay_norms and model.norm != "gn" and mode in (None, "fixed"):
        raise ConfigError(
            f"{key}.decay_norms: no BN or GN is trained here, so it would be ignored. Remove it."
        )
    if has_batch_norm(model) and mode is None:
        raise ConfigError(
            f"{key}.norm_mode: not set, but the model has BN. Write live (statistics of the "
            f"batch), sync (of all GPUs' batches), affine, or fixed (paper 2's fine-tuning)."
        )
    if not has_batch_norm(model) and mode is not None:
        raise ConfigError(
            f"{key}.norm_mode: found {mode}, but the model has no BN ({model.backbone} with norm: "
            f"{model.norm}). Remove it, or write null."
        )
    untrained = [part for part in parts_with_batch_norm(model) if part not in loaded]
    if mode in ("affine", "fixed") and untrained:
        raise ConfigError(
            f"{key}.norm_mode: found {mode}, but nothing is loaded into {', '.join(untrained)}, so "
            f"the BN statistics there were never trained. Write live or sync, or name a "
            f"start_from.source that has them."
        )


def _check_schedule(key: str, phase: PhaseConfig) -> None:
    units = [unit for unit in LENGTH_UNITS if getattr(phase, unit) is not None]
    if len(units) != 1:
        found = " and ".join(f"{unit}: {getattr(phase, unit)}" for unit in units) or "none"
        raise ConfigError(
            f"{key}.{units[-1] if units else 'steps'}: found {found}, expected one of steps, "
            f"passes and images, the length of the phase. Write one, and null for the others."
        )
    positive(key, phase, units[0], "bias_lr_factor")
    positive_fraction(key, phase, "warmup_factor", "decay_factor", "layer_decay")
    below_one(key, phase, "momentum")
    if phase.ema is not None:
        require(0 < phase.ema.decay < 1, f"{key}.ema.decay", phase.ema.decay, "in (0, 1)")
    is_fine = all(0 <= beta < 1 for beta in phase.betas)
    require(is_fine, f"{key}.betas", phase.betas, "two in [0, 1)")


def check_length(key: str, phase: PhaseConfig) -> None:
    """Check that warm-up and drops are within the length of a phase, as far as its unit allows."""
    unit, length = length_of(phase)
    if phase.steps is not None:
        _check_warm_up(key, phase)
    elif phase.images is not None and phase.images_per_step is not None:
        _check_warm_up(key, in_steps(phase, 1 / phase.images_per_step))
    points = [0, *(drop_points(phase) if phase.drops is not None else []), length]
    if any(second <= first for first, second in itertools.pairwise(points)):
        raise ConfigError(
            f"{key}.drops: found {phase.drops}, expected rising {unit} above 0 and below the "
            f"phase's {length:g} {unit}, or below 0, counted from its end."
        )


def _check_warm_up(key: str, phase: PhaseConfig) -> None:
    """Check that the warm-up ends before a phase in steps, and before its first drop."""
    steps, warmup = num_steps(phase), phase.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"{key}.warmup_steps: found {warmup}, but the phase has {steps} steps. Write fewer, or "
            f"0 for no warm-up."
        )
    drops = drop_points(phase) if phase.schedule == "step" else []
    if drops and 0 < round(drops[0]) < warmup:
        raise ConfigError(
            f"{key}.warmup_steps: found {warmup}, but the rate drops after {round(drops[0])} of "
            f"{steps} steps already, before it reaches its full value. Write fewer, or a "
            f"longer phase."
        )


def ignored_in_phase(key: str, phase: PhaseConfig) -> Ignored:
    """Yield the options without effect, except those that `only_for` declares."""
    yield from ignored_in_resize(f"{key}.resize", phase.resize)
    yield from ignored_in_start(key, phase.start_from)
    if phase.freeze is not None:
        yield f"{key}.layer_decay", "the backbone is frozen, and all other layers have lr"
        yield f"{key}.model.drop_path", "a frozen backbone has no drop path"
