"""Runs that go on, or begin at a checkpoint of another run: what they may change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bigdet.config.compare import comparable, flat_options, place_of
from bigdet.config.load import parse_config
from bigdet.config.phase import PhaseConfig, num_steps
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.engine.checkpoint import Checkpoint
from bigdet.run_dir import RunDir
from bigdet.training import optim

CHANGEABLE = (
    "output", "resume", "change_batch", "data.train.shards", "data.train.more_shards",
    "data.train.subset.ids", "data.val.shards", "data.cache", "data.workers",
    "data.train.max_damaged", "engine.kind", "engine.zero_stage", "engine.offload",
    "engine.max_bad_steps", "evaluation", "checkpoint", "log",
)  # fmt: skip
"""Options and sections that a resumed run may change: they do not change what it trains."""

BATCH_OPTIONS = (
    "images_per_step", "images_per_gpu", "reference_images_per_step", "steps", "warmup_steps",
    "drops",
)  # fmt: skip
"""Options of its phase that a resumed run may change with ``change_batch``."""

FORK_CHANGEABLE = ("steps", "schedule", "drops", "decay_factor")
"""Options of the phase that a checkpoint of another run was written in, which the run that begins
there may change: the end of its schedule."""


def is_fork(config: RunConfig, saved: Checkpoint) -> bool:
    """Tell whether a run begins here, at a checkpoint that another run wrote.

    It was marked when it was copied. Earlier versions did not mark it: then it is one if ``resume``
    names a checkpoint of another folder, and that run's ``output`` was another.

    Args:
        config: of the run.
        saved: the checkpoint that it goes on from.
    """
    if saved.is_adopted or "interval" in saved.run["run"] or config.resume in ("auto", "never"):
        return saved.is_adopted
    own = RunDir(Path(config.output))
    before = parse_config(saved.run["config"], "the config of the checkpoint")
    return own_checkpoint(Path(config.resume), own) is None and place_of(config.output) != place_of(
        before.output
    )


def own_checkpoint(folder: Path, run_dir: RunDir) -> Path | None:
    """Return a checkpoint of a run by its path there, however it was written; else None.

    Args:
        folder: of any checkpoint: relative, absolute, or through links.
        run_dir: the run.
    """
    for path in (folder.resolve(), Path(os.path.abspath(folder))):  # a link may lead in, or out
        if path.parent.resolve() == run_dir.checkpoints.resolve():
            return run_dir.checkpoints / path.name
    return None


def is_same_request(config: RunConfig, before: RunConfig) -> bool:
    """Tell whether two configs of a run name the same checkpoint to go on from, or none.

    One of the run's own is the same wherever the run folder was moved to meanwhile.
    """

    def request(one: RunConfig) -> str:
        if one.resume in ("auto", "never"):
            return one.resume
        own = own_checkpoint(Path(one.resume), RunDir(Path(one.output)))
        return place_of(one.resume) if own is None else own.name

    return request(config) == request(before)


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


def changeable_options(config: RunConfig, current: str, is_fork: bool) -> list[str]:
    """Return what a run that goes on, or begins at another one's checkpoint, may change.

    Args:
        config: of the run.
        current: phase of the checkpoint.
        is_fork: another run wrote the checkpoint.
    """
    names = list(config.phases)
    to_come = names[names.index(current) + 1 :]
    own = [*(BATCH_OPTIONS if config.change_batch else ()),
           *(FORK_CHANGEABLE if is_fork else ())]  # fmt: skip
    return [
        *CHANGEABLE,
        *(f"phases.{name}" for name in to_come),
        *(f"phases.{current}.{name}" for name in own),
    ]


def changed_options(config: RunConfig, before: RunConfig, changeable: Sequence[str]) -> list[str]:
    """Return the options that differ and may not, with both values."""
    new, old = flat_options(config), flat_options(before)
    return [
        f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in sorted(new.keys() | old.keys())
        if comparable(key, new.get(key)) != comparable(key, old.get(key))
        and not any(key == name or key.startswith(f"{name}.") for name in changeable)
    ]
