"""What a run leaves on disk besides its log: checkpoints, and the final weights."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from bigdet import distributed
from bigdet.config.derived import num_steps
from bigdet.config.load import dump_config
from bigdet.config.schema import RunConfig
from bigdet.data.shards import ShardSet
from bigdet.engine import checkpoint
from bigdet.engine.base import Engine
from bigdet.models.weights import weights_metadata
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState

logger = logging.getLogger(__name__)


def save_checkpoint(
    config: RunConfig, run_dir: RunDir, engine: Engine, train_set: ShardSet, state: RunState
) -> None:
    """Write a checkpoint, make it the latest, and delete those that are not kept (collective).

    Raises:
        SharedError: on all ranks, when it cannot be written; earlier ones are untouched.
    """
    folder = run_dir.checkpoint(state.phase, state.step)
    metadata = weights_metadata(config, categories_of(train_set), state.phase)
    run = {"config": dump_config(config), "run": state.to_json()}
    checkpoint.save(folder, engine.state(), metadata, run)
    with distributed.together():
        if distributed.is_main():
            # From the state, so that a crash right here is made good by the next checkpoint.
            if state.best_checkpoint is not None:
                checkpoint.mark_best(run_dir.checkpoints / state.best_checkpoint)
            phases = config.phases.items()
            ends = {run_dir.checkpoint(name, num_steps(phase)).name for name, phase in phases}
            kept = ends | set(config.checkpoint.at)
            checkpoint.clean(run_dir.checkpoints, config.checkpoint.keep, kept)
    logger.info("checkpoint written: %s", folder)


def write_final_weights(config: RunConfig, run_dir: RunDir) -> None:
    """Copy the weights of the last checkpoint to the top of the run folder (rank 0 writes)."""
    name, phase = list(config.phases.items())[-1]
    with distributed.together():
        if distributed.is_main():
            source = run_dir.checkpoint(name, num_steps(phase)) / checkpoint.MODEL_FILE
            temporary = run_dir.weights.with_suffix(".tmp")
            shutil.copyfile(source, temporary)
            os.replace(temporary, run_dir.weights)
    logger.info("finished: final weights in %s", run_dir.weights)


def categories_of(shards: ShardSet) -> list[dict[str, object]]:
    """Return what the labels mean, as weights files carry it."""
    return [asdict(category) for category in shards.categories]


def newest_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the checkpoint that ``latest`` names, None before the first."""
    if not run_dir.latest.is_file():
        return None
    return run_dir.checkpoints / run_dir.latest.read_text(encoding="utf-8").strip()
