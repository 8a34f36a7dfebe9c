"""Runs that begin at a checkpoint of another run: what of the schedule they may change."""

from __future__ import annotations

from bigdet.config.derived import num_steps
from bigdet.config.load import ConfigError
from bigdet.config.phase_schema import PhaseConfig
from bigdet.config.schema import RunConfig
from bigdet.training import optim

FORK_CHANGEABLE = ("steps", "schedule", "drops", "decay_factor")
"""Options of the phase that a checkpoint of another run was written in, which the run that begins
there may change: the end of its schedule."""


def is_fork(config: RunConfig, before: RunConfig) -> bool:
    """Tell whether a run begins here, at a checkpoint that another run wrote."""
    return config.resume not in ("auto", "never") and config.output != before.output


def check_fork(name: str, step: int, phase: PhaseConfig, before: PhaseConfig) -> None:
    """Check that the schedule of a fork goes on from a checkpoint as the run before had come there.

    Args:
        name: of the phase in which the checkpoint was written.
        step: of the checkpoint.
        phase: as it is to go on.
        before: as it was.
    """
    if num_steps(phase) < step:
        raise ConfigError(
            f"phases.{name}.steps: found {phase.steps}, but the checkpoint that resume names has "
            f"{step} steps behind it. Write more steps, or name an earlier checkpoint."
        )
    if not optim.has_same_past(phase, before, step):
        raise ConfigError(
            f"phases.{name}.drops: up to the step {step} of the checkpoint that resume names, the "
            f"learning rate would have been another. Fork from an earlier checkpoint, or drop "
            f"later."
        )
