"""Checkpoints in the background, and the final weights."""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bigdet import distributed
from bigdet.config.load import dump_config
from bigdet.config.phase import num_steps
from bigdet.config.run import RunConfig
from bigdet.data.format.phase_sets import DataSets
from bigdet.engine import checkpoint, keeping, whole, writing
from bigdet.engine.base import Engine
from bigdet.engine.parts import Share, gather_share
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Disks, Save, align, find_disks
from bigdet.host import errors
from bigdet.host.files import put_in_place
from bigdet.models.frozen import FROZEN, add_frozen, find_frozen
from bigdet.models.weights import weights_metadata
from bigdet.ops.finite import describe_not_finite
from bigdet.pieces.index import MODEL, MODEL_FILE, STATE_FILE
from bigdet.run_dir import RunDir
from bigdet.training.state import RunState
from bigdet.training.uploads import Uploads

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""Ranks that wait for a save meet so often."""
COPY_PART = 0.9
"""The last copy may take this part of ``log.stall_seconds``."""


class Saver:
    """Writes the checkpoints of a run during training, one at a time.

    Training waits only for the copy of each rank's share to its own memory; a thread of each rank
    writes it. If a write fails on any rank, the run continues with a warning and the checkpoints
    before it stay; if the next write fails too, or it was the last one of a phase or before a stop,
    the run ends with the reason. Copies to ``checkpoint.remote`` are made meanwhile, one at a time:
    what is saved while another checkpoint is being copied is not copied, but at the end of the run.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, sets: Mapping[str, DataSets]) -> None:
        """Prepare; nothing is written yet. The sets are those of each phase."""
        self._config, self._run_dir, self._sets = config, run_dir, sets
        self._disks: Disks | None = None
        address = config.checkpoint.remote
        self._uploads = None if address is None else Uploads(Remote(address))
        self._uncopied: tuple[Save, Collection[str]] | None = None  # the last one, if it is not
        self._is_pending = False  # the same on all ranks, as is the number of failures
        self._num_failures = self._num_saves = 0
        self._thread: threading.Thread | None = None
        self._deadline = math.inf
        self._problem: str | None = None

    def save(self, engine: Engine, state: RunState) -> None:
        """Start to write a checkpoint, after the one before it is written (collective).

        Raises:
            SharedError: on all ranks: two saves in a row failed, or weights or optimizer state are
                not finite; nothing is written then.
        """
        self.wait()
        started = time.perf_counter()
        if self._disks is None:
            self._disks = find_disks(self._run_dir.checkpoints)
        share = self._copy(engine, self._disks.sharing)
        self._check_finite(share, state)
        plan = None
        folder = self._run_dir.checkpoint(state.phase, state.step)
        align(self._run_dir.checkpoints, self._disks)
        with distributed.together():
            if self._disks.is_owner:
                keeping.remove_leftovers(self._run_dir.checkpoints)
            if distributed.is_main():
                number = writing.next_number(self._run_dir.checkpoints)
                busy = "" if self._uploads is None else self._uploads.under_way
                plan = number, {*self._kept(state), busy}, busy
        number, kept, busy = distributed.broadcast_object(plan) or (0, set(), "")
        metadata, run = {}, {}
        if distributed.is_main():
            categories = [asdict(each) for each in self._sets[state.phase].train.categories]
            metadata = weights_metadata(self._config, categories, state.phase, state.frozen)
            run = {"config": dump_config(self._config), "run": state.to_json()}
        self._num_saves += 1
        save = Save(folder, number, self._disks, metadata, run, self._num_saves)
        copied = time.perf_counter() - started
        # A copy of the same checkpoint ends by itself: this save replaces its files.
        is_copied = busy in ("", folder.name)
        self._uncopied = None if is_copied else (save, kept)
        arguments = (save, share, kept, copied, is_copied)
        self._thread = threading.Thread(target=self._write, args=arguments)
        self._thread.start()
        self._is_pending = True

    def _copy(self, engine: Engine, sharing: Sequence[int]) -> Share:
        """Copy what this rank saves (collective); ``sharing`` are the ranks on its disk."""
        if self._config.checkpoint.gather:
            return gather_share(engine.share(distributed.rank(), distributed.world_size()))
        return engine.share(sharing.index(distributed.rank()), len(sharing))

    def _check_finite(self, share: Share, state: RunState) -> None:
        """Refuse numbers that are not finite, as whoever loads them would (collective)."""
        tensors = {}
        for piece in share.pieces:  # several of one tensor where rank 0 gathers those of all ranks
            name = piece.name if piece.kind == MODEL else f"{piece.name}/{piece.kind}"
            tensors[name if name not in tensors else f"{name} from {piece.first}"] = piece.values
        found = distributed.all_gather_objects(describe_not_finite(tensors))
        if any(found):
            raise distributed.SharedError(
                f"{state.position}: {next(filter(None, found))}. The run has diverged, and no "
                f"checkpoint of it is written. Lower phases.{state.phase}.lr, or set "
                f"engine.clip_norm. Last good checkpoint: "
                f"{last_good_checkpoint(self._run_dir) or 'none'}."
            )

    def _kept(self, state: RunState) -> set[str]:
        """Return the names of checkpoints that stay although newer ones are there (rank 0)."""
        unscored = state.unscored  # its checkpoint may become the best
        needed = [
            *([] if state.best_checkpoint is None else [state.best_checkpoint]),
            *([] if unscored is None else [f"{unscored.phase}-{unscored.step}"]),
        ]
        return {*self._ends(), *self._config.checkpoint.at, *needed}

    def _ends(self) -> list[str]:
        """Return the names of the checkpoints at the ends of the phases."""
        phases = self._config.phases.items()
        return [self._run_dir.checkpoint(name, num_steps(phase)).name for name, phase in phases]

    def _write(
        self, save: Save, share: Share, kept: Collection[str], copied: float, is_copied: bool
    ) -> None:
        """Write a checkpoint and delete those that are not kept (a thread of each rank)."""
        started = time.perf_counter()
        settings = self._config.checkpoint
        try:
            writing.write(save, share, self._must_end)
            if save.disks.is_owner:
                keeping.clean(save.folder.parent, settings.keep, kept, settings.keep_every)
            if distributed.is_main():
                self._write_whole()
        except Exception as error:  # of a thread: it would not end the run
            if lost := distributed.lost_peer(error):  # the run ends where the ranks meet
                self._problem = f"{save.folder}: the checkpoint is not written: {lost}"
                logger.warning(self._problem)
                return
            if isinstance(error, (OSError, ValueError)):
                self._problem = errors.explain(error)
            else:
                logger.exception("%s: the checkpoint is not written", save.folder)
                self._problem = f"{save.folder}: cannot write the checkpoint: {error!r}."
            self._warn(self._problem)
            if self._uploads is not None and is_copied and not distributed.is_main():
                self._copy_away(self._uploads, save, kept)  # rank 0 may be waiting for it
            return
        written = time.perf_counter() - started
        logger.info(
            f"checkpoint written: {save.folder} (copied in {copied:.2f} s, written during training "
            f"in {written:.2f} s)"
        )
        if self._uploads is not None and is_copied:
            self._copy_away(self._uploads, save, kept)
        elif self._uploads is not None and distributed.is_main():
            logger.warning(
                f"{save.folder} is not copied to {self._uploads.address}, as an earlier checkpoint "
                f"still is being copied. Raise checkpoint.every if this comes again."
            )

    def _warn(self, problem: str) -> None:
        """Log at once that a save has failed; `wait` may be far away."""
        if self._num_failures:
            outlook = "It is the second save in a row that fails: the run ends before the next one."
        else:
            outlook = "The run continues, and stops if the next save fails too."
        logger.warning("%s %s", problem, outlook)

    def _must_end(self) -> bool:
        """Tell the thread whether to wait for the other ranks no longer."""
        return time.monotonic() > self._deadline

    def _copy_away(self, uploads: Uploads, save: Save, kept: Collection[str]) -> None:
        """Start to copy a checkpoint to ``checkpoint.remote`` (a thread of each rank)."""
        keep_every = self._config.checkpoint.keep_every

        def is_kept(name: str) -> bool:  # of what a machine before has left, only what always stays
            phase, _, step = name.rpartition("-")
            is_of_run = phase in self._config.phases and step.isdecimal()
            is_here = (save.folder.with_name(name) / STATE_FILE).is_file()
            return not is_of_run or is_here or keeping.stays(name, kept, keep_every)

        uploads.start(save, is_kept, self._needed(save))

    def _needed(self, save: Save) -> dict[str, Path]:
        """Return the frozen backbone of a checkpoint, if any, by its path in the run folder.

        Earlier versions named the file otherwise; whoever fetches it asks for the name of today.
        """
        digest, root = save.metadata.get(FROZEN), self._run_dir.root
        file = None if digest is None else find_frozen(root, digest, save.metadata["phase"])
        if digest is None or file is None:
            return {}
        return {str(self._run_dir.frozen(digest).relative_to(root)): file}

    def _write_whole(self) -> list[Path]:
        """Write the weights of the best checkpoint and of ends of phases to one file each (rank 0).

        Returns:
            The checkpoints of which other hosts have pieces, so that it takes all ranks.
        """
        best = keeping.read_mark(self._run_dir.checkpoints, "best")
        folders = [self._run_dir.checkpoints / name for name in {*self._ends(), best} - {""}]
        complete = [folder for folder in folders if (folder / STATE_FILE).is_file()]
        return [folder for folder in complete if not whole.write_whole(folder)]

    def wait(self) -> None:
        """Wait until the last save is written (collective).

        Raises:
            SharedError: on all ranks: it failed, and the one before it too.
            RuntimeError: the connection to another rank is lost.
        """
        if not self._is_pending:
            return
        is_writing = True
        while is_writing:  # the ranks meet, or one that is gone would be waited for without end
            thread = self._thread
            if thread is not None:
                thread.join(POLL_SECONDS)
            is_writing = distributed.any_rank(thread is not None and thread.is_alive())
        self._thread = None
        problems = distributed.all_gather_objects(self._problem)
        problem = next(filter(None, problems), None)
        if problem is not None and self._problem is None:  # of another rank
            self._warn(problem)
        self._is_pending, self._problem = False, None
        self._num_failures = 0 if problem is None else self._num_failures + 1
        if self._num_failures > 1:
            raise distributed.SharedError(f"{problem} Two saves in a row failed.")

    def finish(self) -> None:
        """Wait until everything is written (collective).

        Raises:
            SharedError: on all ranks: the last save failed.
        """
        self.wait()
        left = None
        with distributed.together():
            if distributed.is_main() and self._run_dir.checkpoints.is_dir():
                left = self._write_whole()
        for folder in distributed.broadcast_object(left) or []:
            whole.write_whole_together(folder)
        if self._num_failures:
            raise distributed.SharedError(
                f"{self._run_dir.checkpoints}: the last checkpoint could not be written; see the "
                f"warning above. Make room and start the run again: it continues from "
                f"{newest_checkpoint(self._run_dir) or 'its beginning'}."
            )

    def finish_copies(self) -> None:
        """Wait until the last checkpoint is at ``checkpoint.remote`` too (collective).

        For so long that the watchdog does not end the run; after that it is a warning.
        """
        if self._uploads is None:
            return
        if self._uncopied is not None:
            self._copy_away(self._uploads, *self._uncopied)
            self._uncopied = None
        self._uploads.join(COPY_PART * (self._config.log.stall_seconds or math.inf))
        distributed.barrier()  # launchers kill all ranks some seconds after the first one ends

    def join(self, seconds: float = math.inf) -> None:
        """Wait for this rank's threads.

        Args:
            seconds: after these they no longer wait for the other ranks, nor this one for copies.
        """
        if self._thread is not None:
            self._deadline = time.monotonic() + seconds
            self._thread.join()
            self._thread = None
        if self._uploads is not None and seconds < math.inf:
            self._uploads.join(seconds)


def write_final_weights(config: RunConfig, run_dir: RunDir) -> None:
    """Copy the weights of the last checkpoint to the top of the run folder (rank 0 writes)."""
    name, phase = list(config.phases.items())[-1]
    with distributed.together():
        if distributed.is_main():
            source = run_dir.checkpoint(name, num_steps(phase)) / MODEL_FILE
            temporary = run_dir.weights.with_suffix(".tmp")
            copy = add_frozen if config.checkpoint.with_frozen else shutil.copyfile
            copy(source, temporary)
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
