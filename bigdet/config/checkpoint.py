"""Checkpoints: when the run is saved, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bigdet.config.phase import PhaseConfig
from bigdet.config.rules import ConfigError, positive, require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved; every phase also ends with a checkpoint."""

    every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints to keep, in addition to the best and the last of each
    phase."""
    at: list[str] = field(default_factory=list)
    """Further checkpoints, PHASE-STEP, to write and keep, for other runs to fork from."""
    keep_every: int | None = None
    """Also keep checkpoints at multiples of this many steps of a phase. None: none of them."""
    gather: bool = False
    """Send what all ranks save to rank 0, for hosts that share no disk: rank 0 then has weights and
    optimizer state whole in its memory, and writes them. False: every rank writes its own part, and
    a file stays on the host that wrote it."""
    remote: str | None = None
    """An address such as ``s3://bucket/run`` (any that fsspec knows) to which finished checkpoints
    are copied, for machines that lose their disks: if the run folder has no checkpoint as new, the
    same command continues from there, also with the path of a checkpoint as ``resume``. Of several
    hosts, each gets what it lacks. Training and saving do not wait for a copy: checkpoints that are
    written meanwhile are not copied, and the one that is being copied stays. The end of a run waits
    for the last one. One address for each run; one of a whole sweep, or of all seeds of a run,
    becomes ADDRESS/NAME for the run NAME. Other files there stay. None: no copies."""
    with_frozen: bool = True
    """The ``model.safetensors`` at the top of the run folder has the frozen backbone of the last
    phase too, so that it is a detector by itself. False: it is left out, as of all checkpoints,
    and found by its hash in the ``frozen`` of the run folder."""


def check_checkpoint(checkpoint: CheckpointConfig, phases: Mapping[str, PhaseConfig]) -> None:
    """Check intervals, the address, and that the checkpoints to keep are steps of the run.

    Phases whose length is not in steps yet may have any number of them.
    """
    positive("checkpoint", checkpoint, "every", "keep", "keep_every")
    every, keep_every = checkpoint.every, checkpoint.keep_every
    is_multiple = keep_every is None or keep_every % every == 0
    expected = f"a multiple of checkpoint.every, {every}"
    require(is_multiple, "checkpoint.keep_every", keep_every, expected)
    remote = checkpoint.remote
    is_address = remote is None or "://" in remote
    require(is_address, "checkpoint.remote", remote, "an address, such as s3://bucket/run")
    for name in checkpoint.at:
        phase, _, step = name.rpartition("-")
        is_known = phase in phases and step.isdecimal() and step == str(int(step)) != "0"
        steps = phases[phase].steps if is_known else None
        if not is_known or (steps is not None and int(step) > steps):
            has = "" if steps is None else f" ({phase} has {steps})"
            raise ConfigError(
                f"checkpoint.at: found {name}, expected PHASE-STEP, a phase of "
                f"{', '.join(phases)} and one of its steps{has}, without leading zeros."
            )
