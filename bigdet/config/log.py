"""The log: what a run reports, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.own import import_callable
from bigdet.config.phase import PhaseConfig
from bigdet.config.rules import ConfigError, positive


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """A run of Weights & Biases; requires ``pip install wandb``."""

    project: str = MISSING
    """Project of the run."""
    name: str | None = None
    """Name of the run. None: the name of the run folder."""
    entity: str | None = None
    """User or team. None: the default of the account that is logged in."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes to OUTPUT/wandb only, for ``wandb sync``."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps whose operators, transfers and waits are recorded."""

    steps: tuple[int, int] = MISSING
    """The first and the last of them, counted within each phase that has as many."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports."""

    every: int = 20
    """Steps between lines of the log and of ``metrics.jsonl``. Losses and ``grad_norm`` of a line
    are means over all steps since the previous line, weighted by training images (masked slots at
    the end of a pass do not count), and do not depend on ranks or accumulation. ``grad_norm`` is
    that of the mean loss over the lanes with an image, before clipping. Skipped steps are left out
    and counted by ``bad_steps``; if all steps were skipped, the means are null."""
    tensorboard: bool = True
    """Write TensorBoard event files too, with pictures: a batch with its targets at the start of a
    phase, detections at each evaluation."""
    wandb: WandbConfig | None = None
    """Show the same on Weights & Biases. None: off."""
    boards: list[str] = field(default_factory=list)
    """Boards of your own that show the same, each ``package.module:Class``."""
    profile: ProfileConfig | None = None
    """Write OUTPUT/profile/PHASE-rank-N.json.gz for https://ui.perfetto.dev, and on CUDA a snapshot
    of the memory. A run that ends because its GPU is full writes one anyway, but with what
    allocated the memory only in these steps. None: off."""
    stall_seconds: float | None = 1200.0
    """After this many seconds without progress, a rank writes its stacks and ends the run. Must
    exceed the longest step, save or scoring. None: never."""


def check_log(log: LogConfig, phases: Mapping[str, PhaseConfig]) -> None:
    """Check intervals, the steps to profile, and that a user's own boards can be imported.

    Phases whose length is not in steps yet may have any number of them.
    """
    positive("log", log, "every", "stall_seconds")
    if log.profile is not None:
        first, last = log.profile.steps
        lengths = [phase.steps for phase in phases.values()]
        longest = max((steps for steps in lengths if steps is not None), default=0)
        is_in_a_phase = None in lengths or last <= longest
        if not 1 <= first < last or not is_in_a_phase:
            raise ConfigError(
                f"log.profile.steps: found [{first}, {last}], expected two steps of a phase, the "
                f"first one lower{'' if None in lengths else f', at most {longest}'}."
            )
    for name in log.boards:
        import_callable("log.boards", name)
