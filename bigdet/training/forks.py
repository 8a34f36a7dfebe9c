"""What a resumed run may change, and a fork: a run that begins at another run's checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bigdet.config.compare import comparable, flat_options, place_of
from bigdet.config.data import PhaseDataConfig
from bigdet.config.load import parse_config
from bigdet.config.phase import PhaseConfig, num_steps
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig, ignored_options
from bigdet.engine.checkpoint import Checkpoint
from bigdet.run_dir import RunDir
from bigdet.training import optim

DATA_CHANGEABLE = (
    "data.train.shards", "data.train.more_shards", "data.train.subset.ids",
    "data.train.max_damaged", "data.val.shards",
)  # fmt: skip
"""Options of data, of the run or of a phase, that a resumed run may change: where the data are."""

CHANGEABLE = (
    "output", "resume", "change_batch", *DATA_CHANGEABLE, "data.cache", "data.workers",
    "data.worker_kind", "engine.kind", "engine.zero_stage", "engine.shard_over", "engine.offload",
    "engine.shard_frozen", "engine.max_bad_steps", "device.cudnn_benchmark",
    "device.cuda_graphs", "device.expandable_segments", "evaluation", "checkpoint", "log",
)  # fmt: skip
"""Options and sections that a resumed run may change: they have no effect on the weights."""

BATCH_OPTIONS = (
    "images_per_step", "images_per_gpu", "reference_images_per_step", "steps", "warmup_steps",
    "drops",
)  # fmt: skip
"""Options of the present phase that a resumed run may change with ``change_batch``."""

FORK_CHANGEABLE = ("steps", "schedule", "drops", "decay_factor")
"""Options of the present phase that a fork may change: the rest of its schedule."""


def is_fork(config: RunConfig, saved: Checkpoint) -> bool:
    """Return whether the checkpoint to continue from was written by another run.

    Such a checkpoint is marked when it is copied. Earlier versions did not mark it: there it is one
    if ``resume`` names a checkpoint of another folder, and that run's ``output`` was another.
    """
    if saved.is_adopted or "interval" in saved.run["run"] or config.resume in ("auto", "never"):
        return saved.is_adopted
    own = RunDir(Path(config.output))
    before = parse_config(saved.run["config"], "the config of the checkpoint")
    return own_checkpoint(Path(config.resume), own) is None and place_of(config.output) != place_of(
        before.output
    )


def own_checkpoint(folder: Path, run_dir: RunDir) -> Path | None:
    """Return the path inside a run folder of a checkpoint of that run; None for any other.

    Args:
        folder: a checkpoint's path: relative, absolute, or through links.
        run_dir: the run folder.
    """
    for path in (folder.resolve(), Path(os.path.abspath(folder))):  # links may lead in or out
        if path.parent.resolve() == run_dir.checkpoints.resolve():
            return run_dir.checkpoints / path.name
    return None


def is_same_request(config: RunConfig, before: RunConfig) -> bool:
    """Return whether two configs of a run have the same ``resume``.

    A checkpoint of the run itself is the same even if the run folder was moved.
    """

    def request(one: RunConfig) -> str:
        if one.resume in ("auto", "never"):
            return one.resume
        own = own_checkpoint(Path(one.resume), RunDir(Path(one.output)))
        return place_of(one.resume) if own is None else own.name

    return request(config) == request(before)


def check_fork(name: str, step: int, phase: PhaseConfig, before: PhaseConfig) -> None:
    """Check that a fork's schedule equals that of the run before, up to the checkpoint.

    Args:
        name: the checkpoint's phase.
        step: the checkpoint's step of that phase.
        phase: in the fork's config.
        before: in the config of the run before.
    """
    if num_steps(phase) < step:
        raise ConfigError(
            f"phases.{name}.steps: found {phase.steps}, but the checkpoint that resume names is "
            f"of step {step}. Write more steps, or name an earlier checkpoint."
        )
    if not optim.has_same_past(phase, before, step):
        raise ConfigError(
            f"phases.{name}.drops: up to step {step}, that of the checkpoint, the learning rates "
            f"are not those of the other run. Fork from an earlier checkpoint, or drop later."
        )


def changeable_options(config: RunConfig, current: str, is_fork: bool) -> list[str]:
    """Return the keys of options and sections that a resumed run or a fork may change.

    Args:
        config: its ``change_batch`` allows more.
        current: phase of the checkpoint.
        is_fork: the checkpoint is another run's.
    """
    names = list(config.phases)
    to_come = names[names.index(current) + 1 :]
    own = BATCH_OPTIONS * config.change_batch + FORK_CHANGEABLE * is_fork
    begun = [name for name in names if name not in to_come]
    with_data = [name for name in begun if config.phases[name].data != PhaseDataConfig()]
    return [
        *CHANGEABLE,
        *(f"phases.{name}.{key}" for name in with_data for key in DATA_CHANGEABLE),
        *(f"phases.{name}" for name in to_come),
        *(f"phases.{current}.{name}" for name in own),
    ]


def changed_options(config: RunConfig, before: RunConfig, changeable: Sequence[str]) -> list[str]:
    """Return the options that differ although they may not, with both values.

    Those that have no effect in ``config`` may differ.
    """
    may_differ = [*changeable, *(key for key, _ in ignored_options(config))]
    new, old = flat_options(config), flat_options(before)
    return [
        f"{key} (was {old.get(key)}, now {new.get(key)})"
        for key in sorted(new.keys() | old.keys())
        if comparable(key, new.get(key)) != comparable(key, old.get(key))
        and not any(key == name or key.startswith(f"{name}.") for name in may_differ)
    ]
