"""Rules of a phase's length, schedule and stated cost."""

from __future__ import annotations

import itertools

from bigdet.config.derived import (
    IMAGENET_COST,
    drop_points,
    in_steps,
    length_of,
    num_steps,
    stated_cost,
)
from bigdet.config.load import ConfigError
from bigdet.config.phase_schema import PhaseConfig, StartCostConfig
from bigdet.config.rules import positive, require, unused
from bigdet.config.schema import RunConfig

LENGTH_UNITS = ("steps", "passes", "images")


def check_schedule(key: str, phase: PhaseConfig) -> None:
    """Check the options of a schedule, each by itself."""
    units = [unit for unit in LENGTH_UNITS if getattr(phase, unit) is not None]
    if len(units) != 1:
        found = " and ".join(f"{unit}: {getattr(phase, unit)}" for unit in units) or "none"
        raise ConfigError(
            f"{key}.{units[-1] if units else 'steps'}: one of steps, passes and images says how "
            f"long the phase is, found {found}. Write one, and null for the others."
        )
    positive(f"{key}.{units[0]}", getattr(phase, units[0]))
    positive(f"{key}.bias_lr_factor", phase.bias_lr_factor)
    require(0 < phase.warmup_factor <= 1, f"{key}.warmup_factor", phase.warmup_factor, "in (0, 1]")
    require(0 < phase.decay_factor <= 1, f"{key}.decay_factor", phase.decay_factor, "in (0, 1]")
    require(0 <= phase.momentum < 1, f"{key}.momentum", phase.momentum, "in [0, 1)")
    require(
        all(0 <= beta < 1 for beta in phase.betas), f"{key}.betas", phase.betas, "two in [0, 1)"
    )
    idle = "momentum" if phase.optimizer == "adamw" else "betas"
    unused(key, phase, idle, f"is not used by {phase.optimizer}")
    if phase.schedule != "step":
        for name in ("drops", "decay_factor"):
            unused(key, phase, name, "is for schedule: step")


def check_length(key: str, phase: PhaseConfig) -> None:
    """Check warm-up and drops against the length of a phase, as far as its unit allows.

    Raises:
        ConfigError: the phase is shorter than its own schedule.
    """
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
    """Check that a phase, its length in steps, has its full rate before it ends or drops."""
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
            f"{steps} steps already, so that it never comes to its height. Write fewer, or a "
            f"longer phase."
        )


def check_kept(config: RunConfig) -> None:
    """Check that the checkpoints to keep are steps of the run."""
    for name in config.checkpoint.at:
        phase, _, step = name.rpartition("-")
        is_known = phase in config.phases and step.isdecimal()
        steps = config.phases[phase].steps if is_known else None
        if not is_known or int(step) < 1 or (steps is not None and int(step) > steps):
            raise ConfigError(
                f"checkpoint.at: found {name}, expected PHASE-STEP, a phase of "
                f"{', '.join(config.phases)} and one of its steps."
            )


def check_cost(key: str, cost: StartCostConfig, source: str) -> None:
    """Check what is stated of the cost of weights from elsewhere."""
    if source in ("random", "previous"):
        raise ConfigError(
            f"{key}: is for weights from elsewhere, but the source is {source}, whose cost is "
            f"counted. Remove it, or name a source."
        )
    if not stated_cost(cost):
        raise ConfigError(f"{key}: states nothing. Write preset: imagenet, images: NUMBER, ...")
    for name in ("images", "instances", "pixels", "gpu_seconds"):
        positive(f"{key}.{name}", getattr(cost, name))
        if cost.preset is not None and name in IMAGENET_COST:
            unused(key, cost, name, f"preset: {cost.preset} says it")
