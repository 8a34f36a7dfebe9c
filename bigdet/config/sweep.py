"""Sweeps: a file that lists runs, each a config with overrides, and what follows from it.

A run may fork from another one: it begins at a checkpoint of that run, so that what both share is
trained only once (paper 1, figure 1: the 2x to 5x schedules are a 6x run that ends earlier). Each
run has its own folder below ``output``, and below ``checkpoint.remote`` where that is set.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bigdet.config.layers import explain, read_yaml
from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.config.shipped import find_config


@dataclass(frozen=True, kw_only=True)
class ForkConfig:
    """The checkpoint of another run at which a run begins."""

    run: str = MISSING
    """Name of a run earlier in the list."""
    step: int = MISSING
    """Step of the phase; in a run that is a fork too, not before it begins."""
    phase: str | None = None
    """Phase of the checkpoint. None: the only one."""


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """One run, or one per seed."""

    config: str | None = None
    """Its config, relative to the sweep's file. None: that of the sweep."""
    overrides: list[str] = field(default_factory=list)
    """Words ``key=value``, after those of the sweep."""
    fork: ForkConfig | None = None
    """Where it begins. None: at its own start."""
    after: str | None = None
    """Name of a run above whose weights it starts from: it waits until that run has finished. A
    fork waits for its run anyway."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A list of runs to compare."""

    output: str = MISSING
    """Folder of the report and of the run folders, which have the names of the runs."""
    about: str = ""
    """What the report says first, such as the question and what others found."""
    command: str = "python -m bigdet.train"
    """What starts a run; the config and the overrides are appended."""
    config: str | None = None
    """The config of runs that name none, relative to the sweep's file."""
    overrides: list[str] = field(default_factory=list)
    """Words ``key=value`` for all runs."""
    seeds: list[int] | None = None
    """Every run is trained once with each of these seeds. None: once, with that of its config."""
    runs: dict[str, EntryConfig] = MISSING
    """The runs by name, in the order in which they are trained."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: name of its folder.
        group: name of its entry; runs of one group differ in their seed.
        config_file: path, with ``overrides`` the source of ``config``.
        fork_of: name of the run in which it begins, if any.
        after: name of the run that must have finished before it starts, if any.
    """

    name: str
    group: str
    config_file: str
    overrides: list[str]
    config: RunConfig
    fork_of: str | None
    after: str | None

    @property
    def words(self) -> list[str]:
        """The command line of ``bigdet.train``."""
        return [self.config_file, *self.overrides]


def load_sweep(path: str | Path) -> tuple[SweepConfig, list[PlannedRun]]:
    """Read a sweep and check every run of it.

    Raises:
        ConfigError: with the file, the run and the key.
    """
    path = find_config(path)
    values = read_yaml(path)
    if "runs" not in values:
        raise ConfigError(
            f"{path}: is not a sweep, as it has no `runs`. Give one, such as "
            f"sweeps/small; `bigdet train` takes the config of one run."
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SweepConfig), values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{path}: required and not set: {', '.join(missing)}.")
    sweep = OmegaConf.to_object(merged)
    assert isinstance(sweep, SweepConfig)
    sweep = dataclasses.replace(sweep, output=os.path.expanduser(sweep.output))
    if sweep.seeds is not None and (not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds)):
        raise ConfigError(
            f"{path}: seeds: found {sweep.seeds}, expected each once, such as [0, 1, 2], or null."
        )
    planned: dict[str, PlannedRun] = {}
    for group, entry in sweep.runs.items():
        for seed in [None] if sweep.seeds is None else sweep.seeds:
            try:
                run = _plan(path, sweep, group, entry, seed, planned)
            except ConfigError as error:
                raise ConfigError(f"{path}: runs.{group}: {error}") from error
            planned[run.name] = run
    if not planned:
        raise ConfigError(f"{path}: runs: found none. Write at least one, as NAME: {{}}.")
    return sweep, [_with_checkpoints(run, sweep, planned) for run in planned.values()]


def _plan(
    path: Path,
    sweep: SweepConfig,
    group: str,
    entry: EntryConfig,
    seed: int | None,
    planned: dict[str, PlannedRun],
) -> PlannedRun:
    file = entry.config or sweep.config
    if file is None:
        raise ConfigError("config: not set, here or for the whole sweep. Write the path of one.")
    config_file = os.path.normpath(find_config(file, path.parent))
    if "/" in group:
        raise ConfigError("a folder is named after the run. Write a name without /.")
    name = _name(group, seed)
    own = [f"output={sweep.output}/{name}", *([] if seed is None else [f"seed={seed}"])]
    for word in (*sweep.overrides, *entry.overrides):
        key = word.partition("=")[0]
        if key in ("output", "resume") or (key == "seed" and seed is not None):
            raise ConfigError(
                f"overrides: found {word}, but output, resume and seed of a run follow from the "
                f"sweep's output, fork and seeds. Remove it."
            )
    overrides = [*sweep.overrides, *entry.overrides, *own]
    trunk = None
    if entry.fork is not None:
        trunk = _above("fork.run", entry.fork.run, seed, planned)
        checkpoint = _checkpoint(entry.fork, planned[trunk].config)
        _check_reached(checkpoint, planned[trunk])
        overrides.append(f"resume={sweep.output}/{trunk}/checkpoints/{checkpoint}")
    after = trunk
    if entry.after is not None:
        if trunk is not None:
            raise ConfigError("after: a fork waits for the run in which it begins. Remove it.")
        after = _above("after", entry.after, seed, planned)
    config = load_config(config_file, overrides)
    has_own = any(word.partition("=")[0].strip() == "checkpoint.remote" for word in entry.overrides)
    remote = config.checkpoint.remote
    if remote is not None and (seed is not None or not has_own):
        overrides.append(f"checkpoint.remote={remote.rstrip('/')}/{name}")
        config = load_config(config_file, overrides)
    return PlannedRun(name, group, config_file, overrides, config, trunk, after)


def _above(key: str, group: str, seed: int | None, planned: dict[str, PlannedRun]) -> str:
    """Return the name of a group's run of the same seed, which must be earlier in the list."""
    name = _name(group, seed)
    if name not in planned:
        known = ", ".join(dict.fromkeys(run.group for run in planned.values())) or "none does"
        raise ConfigError(f"{key}: found {group}, expected a run earlier in the list: {known}.")
    return name


def _with_checkpoints(
    run: PlannedRun, sweep: SweepConfig, planned: dict[str, PlannedRun]
) -> PlannedRun:
    """Let a run keep the checkpoints from which others fork."""
    own = (other for other in planned.values() if other.fork_of == run.name)
    forks = [sweep.runs[other.group].fork for other in own]
    wanted = {_checkpoint(fork, run.config) for fork in forks if fork is not None}
    if not wanted:
        return run
    names = ",".join(sorted(wanted | set(run.config.checkpoint.at)))
    overrides = [*run.overrides, f"checkpoint.at=[{names}]"]
    config = load_config(run.config_file, overrides)
    return dataclasses.replace(run, overrides=overrides, config=config)


def _checkpoint(fork: ForkConfig, trunk: RunConfig) -> str:
    """Return the name of the checkpoint at which a fork begins."""
    phases = list(trunk.phases)
    phase = fork.phase or (phases[0] if len(phases) == 1 else None)
    if phase not in phases:
        raise ConfigError(f"fork.phase: found {fork.phase}, expected one of {', '.join(phases)}.")
    steps = trunk.phases[phase].steps
    if fork.step < 1 or (steps is not None and fork.step > steps):
        raise ConfigError(
            f"fork.step: found {fork.step}, expected 1 to {steps or 'the last'}, a step of the "
            f"phase {phase} of {fork.run}."
        )
    return f"{phase}-{fork.step}"


def _check_reached(checkpoint: str, trunk: PlannedRun) -> None:
    """Refuse a checkpoint from before the one at which its run begins, if that is a fork too."""
    if trunk.fork_of is None:
        return
    phases = list(trunk.config.phases)
    first = Path(trunk.config.resume).name
    places = [
        (phases.index(phase), int(step))
        for phase, _, step in (name.rpartition("-") for name in (checkpoint, first))
    ]
    if places[0] < places[1]:
        raise ConfigError(
            f"fork.step: found {checkpoint}, but {trunk.name} begins at {first} of "
            f"{trunk.fork_of}. Fork from {trunk.fork_of}, or name a later step."
        )


def _name(group: str, seed: int | None) -> str:
    return group if seed is None else f"{group}-s{seed}"
