"""Checkpoints in the background, and the final weights."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigdet import distributed
from bigdet.config.load import dump_config
from bigdet.config.phase import num_steps
from bigdet.config.run import RunConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.engine import checkpoint
from bigdet.engine.base import Engine, EngineState
from bigdet.host import errors
from bigdet.host.files import put_in_place
from bigdet.models.weights import weights_metadata
from bigdet.ops.finite import describe_not_finite
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run during training, one at a time.

    Training waits only for the copy to rank 0's memory (two or three times the size of the
    weights); a thread of rank 0 writes it. If a write fails, the run continues with a warning and
    the checkpoints before it stay; if the next write fails too, or it was the last one of a phase
    or before a stop, the run ends with the reason.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, train_set: ShardSet) -> None:
        """Prepare; nothing is written yet."""
        self._config, self._run_dir = config, run_dir
        self._categories = [asdict(category) for category in train_set.categories]
        self._is_pending = False  # the same on all ranks, as is the number of failures
        self._num_failures = 0
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(self, engine: Engine, state: RunState) -> None:
        """Start to write a checkpoint, after the one before it is written (collective).

        Raises:
            SharedError: on all ranks: two saves in a row failed, or the weights are not finite;
                nothing is written then.
        """
        self.wait()
        started = time.perf_counter()
        saved = engine.state()
        if found := distributed.broadcast_object(describe_not_finite(saved.model)):
            raise distributed.SharedError(
                f"{state.position}: {found}. The run has diverged, and no checkpoint of it is "
                f"written. Lower phases.{state.phase}.lr, or set engine.clip_norm. Last good "
                f"checkpoint: {last_good_checkpoint(self._run_dir) or 'none'}."
            )
        if distributed.is_main():
            folder = self._run_dir.checkpoint(state.phase, state.step)
            metadata = weights_metadata(self._config, self._categories, state.phase, state.frozen)
            run = {"config": dump_config(self._config), "run": state.to_json()}
            unscored = state.unscored  # its checkpoint may become the best
            needed = [
                *([] if state.best_checkpoint is None else [state.best_checkpoint]),
                *([] if unscored is None else [f"{unscored.phase}-{unscored.step}"]),
            ]
            copied = time.perf_counter() - started
            self._thread = threading.Thread(
                target=self._write, args=(folder, saved, metadata, run, needed, copied)
            )
            self._thread.start()
        self._is_pending = True

    def _write(
        self,
        folder: Path,
        saved: EngineState,
        metadata: dict[str, str],
        run: dict[str, Any],
        needed: Sequence[str],
        copied: float,
    ) -> None:
        """Write a checkpoint and delete those that are not kept (the thread of rank 0)."""
        started = time.perf_counter()
        settings = self._config.checkpoint
        try:
            checkpoint.save(folder, saved, metadata, run)
            phases = self._config.phases.items()
            ends = {self._run_dir.checkpoint(name, num_steps(phase)).name for name, phase in phases}
            kept = ends | {*settings.at, *needed}
            checkpoint.clean(self._run_dir.checkpoints, settings.keep, kept, settings.keep_every)
        except (OSError, ValueError) as error:
            self._problem = errors.explain(error)
            return
        except Exception as error:  # of a thread: it would not end the run
            logger.exception("%s: the checkpoint is not written", folder)
            self._problem = f"{folder}: cannot write the checkpoint: {error!r}."
            return
        written = time.perf_counter() - started
        logger.info(
            f"checkpoint written: {folder} (copied in {copied:.2f} s, written during training in "
            f"{written:.2f} s)"
        )

    def wait(self) -> None:
        """Wait until the last save is written (collective).

        Raises:
            SharedError: on all ranks: it failed, and the one before it too.
        """
        if not self._is_pending:
            return
        self.join()
        problem = distributed.broadcast_object(self._problem)
        self._is_pending, self._problem = False, None
        self._num_failures = 0 if problem is None else self._num_failures + 1
        if self._num_failures > 1:
            raise distributed.SharedError(f"{problem} Two saves in a row failed.")
        if problem is not None:
            logger.warning("%s The run continues, and stops if the next save fails too.", problem)

    def finish(self) -> None:
        """Wait until everything is written (collective).

        Raises:
            SharedError: on all ranks: the last save failed.
        """
        self.wait()
        if self._num_failures:
            raise distributed.SharedError(
                f"{self._run_dir.checkpoints}: the last checkpoint could not be written; see the "
                f"warning above. Make room and start the run again: it continues from "
                f"{newest_checkpoint(self._run_dir) or 'its beginning'}."
            )

    def join(self) -> None:
        """Wait for this rank's thread, without the other ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def write_final_weights(config: RunConfig, run_dir: RunDir) -> None:
    """Copy the weights of the last checkpoint to the top of the run folder (rank 0 writes)."""
    name, phase = list(config.phases.items())[-1]
    with distributed.together():
        if distributed.is_main():
            source = run_dir.checkpoint(name, num_steps(phase)) / checkpoint.MODEL_FILE
            temporary = run_dir.weights.with_suffix(".tmp")
            shutil.copyfile(source, temporary)
            put_in_place(temporary, run_dir.weights)
    logger.info("finished: final weights in %s", run_dir.weights)


def last_good_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the newest checkpoint that is intact and has finite weights (collective)."""
    found = checkpoint.newest_usable(run_dir.checkpoints) if distributed.is_main() else None
    return distributed.broadcast_object(found)


def newest_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the checkpoint that ``latest`` names, None before the first."""
    if not run_dir.latest.is_file():
        return None
    return run_dir.checkpoints / run_dir.latest.read_text(encoding="utf-8").strip()
