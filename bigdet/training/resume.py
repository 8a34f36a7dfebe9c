"""Where a run begins: fresh, or at a checkpoint whose config and weights fit."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from bigdet.config.load import ConfigError, dump_config, flat_options, load_config
from bigdet.config.schema import RunConfig
from bigdet.engine import checkpoint
from bigdet.log import cut_metrics
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "output", "resume", "data.train.shards", "data.val.shards", "data.workers",
    "data.train.max_damaged", "engine.kind", "engine.zero_stage", "engine.max_bad_steps",
    "evaluation", "checkpoint", "log",
)  # fmt: skip
"""Options (or sections) that a resumed run may change without changing what it trains."""


def find_checkpoint(config: RunConfig, run_dir: RunDir) -> Path | None:
    """Return the checkpoint to go on from, None for a fresh start.

    Raises:
        ConfigError: the folder holds a finished run, or one that ``resume`` says not to touch.
    """
    if config.resume not in ("auto", "never"):
        folder = Path(config.resume)
        if not (folder / checkpoint.STATE_FILE).is_file():
            raise ConfigError(
                f"resume: {folder} is not a checkpoint (it has no {checkpoint.STATE_FILE}). Write "
                f"auto, never, or the path of a checkpoint such as runs/x/checkpoints/train-1000."
            )
        return folder
    if not run_dir.latest.is_file():
        return None
    if config.resume == "never":
        raise ConfigError(
            f"resume: found never, but {run_dir.root} has checkpoints. Choose another output, "
            f"remove the folder, or write resume=auto to go on."
        )
    if run_dir.weights.is_file():
        raise ConfigError(
            f"output: {run_dir.root} holds a finished run ({run_dir.weights.name} is there). "
            f"Choose another output, or remove the folder to run again."
        )
    return run_dir.checkpoints / run_dir.latest.read_text(encoding="utf-8").strip()


def adopt_batch_sizes(config: RunConfig, saved: RunConfig | None, world_size: int) -> RunConfig:
    """Fill in ``images_per_step`` where the config leaves it open.

    Args:
        config: as the user wrote it.
        saved: the resolved config of the run that goes on, whose numbers stay; None when fresh.
        world_size: number of ranks; a fresh phase takes one micro-batch of each per step.
    """
    phases = {}
    for name, phase in config.phases.items():
        images_per_step = phase.images_per_step
        if images_per_step is None and saved is not None and name in saved.phases:
            images_per_step = saved.phases[name].images_per_step
        if images_per_step is None:
            images_per_step = phase.images_per_gpu * world_size
        phases[name] = dataclasses.replace(phase, images_per_step=images_per_step)
    return dataclasses.replace(config, phases=phases)


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Check that every rank gets the same number of micro-batches in every phase."""
    for name, phase in config.phases.items():
        assert phase.images_per_step is not None
        lanes = phase.images_per_step // phase.images_per_gpu
        if lanes % world_size:
            raise ConfigError(
                f"phases.{name}.images_per_step: {phase.images_per_step} images are {lanes} "
                f"micro-batches of {phase.images_per_gpu}, which {world_size} ranks cannot share "
                f"equally. Change images_per_step, images_per_gpu or the number of ranks."
            )


def check_unchanged(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    """Refuse to go on with options that would make it another run.

    Raises:
        ConfigError: naming each changed option with both values.
    """
    now, before = flat_options(config), flat_options(saved)
    changed = [
        f"{key} (was {before.get(key)}, now {now.get(key)})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not _is_changeable(key)
    ]
    if changed:
        raise ConfigError(
            f"{folder}: the run to go on was started with other options: {', '.join(changed)}. Set "
            f"them back, or choose another output. A resumed run may change "
            f"{', '.join(CHANGEABLE)}."
        )


def saved_config(folder: Path) -> RunConfig:
    """Read the resolved config of the run that a checkpoint belongs to."""
    return load_config(RunDir(folder.resolve().parent.parent).config)


def prepare_run_dir(config: RunConfig, run_dir: RunDir, state: RunState, is_resumed: bool) -> None:
    """Write the resolved config and cut the log back to where the run goes on (rank 0 only)."""
    run_dir.root.mkdir(parents=True, exist_ok=True)
    names = list(config.phases)
    if not is_resumed:
        run_dir.metrics.unlink(missing_ok=True)
        shutil.rmtree(run_dir.tensorboard, ignore_errors=True)
    current = (names.index(state.phase), state.step)
    cut_metrics(run_dir.metrics, lambda line: (names.index(line["phase"]), line["step"]) <= current)
    run_dir.config.write_text(dump_config(config), encoding="utf-8")
    run_dir.stop.unlink(missing_ok=True)


def _is_changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
