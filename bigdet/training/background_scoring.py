"""Scores the detections of an evaluation during training, so that no rank waits for the numbers.

The detections are kept in ``evaluation/PHASE-STEP.detections``; a child process of rank 0 scores
them, and the file is removed once the numbers are written. If the run ends before that, its
checkpoints note what is still to be scored, and the next start does it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.config.compare import flat_options
from bigdet.config.model import has_keypoints, has_masks
from bigdet.config.phase import num_steps
from bigdet.config.run import RunConfig, phase_data, phase_model
from bigdet.data.format.phase_sets import DataSets
from bigdet.data.format.shard_set import ShardSet
from bigdet.engine import keeping
from bigdet.evaluation import telling_images as pictures
from bigdet.evaluation.coco_metrics import evaluation_kinds
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.scoring import Metrics, evaluate_detections, limit_note
from bigdet.evaluation.waiting import work_on_main
from bigdet.host import errors
from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.logs.log import MetricsWriter
from bigdet.run_dir import RunDir
from bigdet.training import measuring
from bigdet.training.state import RunState, Unscored

logger = logging.getLogger(__name__)

_FORK = multiprocessing.get_context("fork")  # like loaders: shard sets are open, nothing is pickled
NO_EFFECT_ON_AP = ("every", "images_per_gpu", "pictures")
"""Options of evaluations that change no AP, or (by another padding) hardly."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class Scorer:
    """Scores one evaluation at a time on rank 0; does nothing on the other ranks."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        sets: Mapping[str, DataSets],
        metrics: MetricsWriter | None,
        state: RunState,
    ) -> None:
        """Prepare; the numbers go to the metrics, the best AP and what is unscored to the state.

        The sets are those of each phase.
        """
        self._config, self._run_dir, self._sets = config, run_dir, sets
        self._metrics, self._state = metrics, state
        self._process: ForkProcess | None = None
        self._message: Connection | None = None

    def resume(self) -> None:
        """Score what an earlier start of the run left unscored.

        If the detections of the current step are lost, its evaluation becomes due again, in rank
        0's state.
        """
        if not distributed.is_main():
            return
        entry, run_dir = self._state.unscored, self._run_dir
        for file in run_dir.all_detections():
            if entry is None or file != run_dir.detections(entry.phase, entry.step):
                file.unlink()  # of a later step, which is trained again
        if entry is None:
            return
        numbers = run_dir.evaluation(entry.phase, entry.step)
        if run_dir.detections(entry.phase, entry.step).is_file():
            logger.info(f"{entry.phase} step {entry.step}: scoring detections of an earlier start")
            self._start()
            return
        self._state.unscored = None
        if numbers.is_file():  # scored after the checkpoint was written
            self._note_best(entry, json.loads(numbers.read_bytes()))
            return
        is_here = (entry.phase, entry.step) == (self._state.phase, self._state.step)
        self._state.needs_evaluation |= is_here
        elsewhere = "it has no AP here; `bigdet evaluate` measures its checkpoint"
        logger.warning(
            "%s step %d: its detections are not in this run folder, so %s",
            entry.phase,
            entry.step,
            "it is evaluated again" if is_here else elsewhere,
        )

    def start(self, results: SavedResults, prefix: str = "") -> None:
        """Start to score the detections of the current step; no other scoring may be running.

        Args:
            results: the detections.
            prefix: of the names of their numbers.

        Raises:
            OSError: the detections cannot be written to disk.
        """
        state = self._state
        if distributed.is_main():
            assert state.unscored is None, "one at a time"
            results.write(self._run_dir.detections(state.phase, state.step))
            counters = measuring.counters(self._config, state)
            place = state.phase, state.step, state.total_steps
            state.unscored = Unscored(*place, counters, prefix)
            self._start()

    def collect(self) -> None:
        """Write the numbers to log, metrics and state if the scoring is done.

        Raises:
            ValueError: the process failed by something that a user can cause; with its message.
            LostProcessError: the process was killed, or failed otherwise.
        """
        # A message, or the end of the pipe, shows that the process is done. ``is_alive`` would not:
        # it is true until the system reports the exit code.
        if self._message is None or not self._message.poll():
            return
        entry = self._state.unscored
        assert self._process is not None
        assert self._metrics is not None
        assert entry is not None
        detections = self._run_dir.detections(entry.phase, entry.step)
        try:
            problem = self._message.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode or 0
            raise errors.LostProcessError(
                f"{detections}: the process that scores it ended with exit code {code}. The next "
                f"start of the run scores it again.{errors.explain_exit(code)}"
            ) from error
        finally:
            self.end()
        if problem is not None:
            raise ValueError(f"evaluation at {entry.phase} step {entry.step}: {problem}")
        file = self._run_dir.evaluation(entry.phase, entry.step, entry.prefix)
        metrics = json.loads(file.read_bytes())
        flat = measuring.flat_metrics(metrics)
        text = ", ".join(filter(None, [measuring.one_line(flat), limit_note(metrics)]))
        flat = {f"{entry.prefix}{name}": value for name, value in flat.items()}
        is_own = self._config.phases[entry.phase].data.val is not None
        where = f" on {self._sets[entry.phase].val.address}" * is_own
        place = f"{entry.phase} step {entry.step}{', newest weights' * bool(entry.prefix)}{where}"
        logger.info("%s: %s", place, text, extra={"values": flat})
        line = {"phase": entry.phase, "step": entry.step, **flat, **entry.counters}
        # AP on another set than the run's is another curve of the boards.
        curves = {name: f"{entry.phase}/{name}" for name in flat} if is_own else {}
        self._metrics.write(line, entry.total_steps, curves)
        if not entry.prefix:
            self._note_best(entry, metrics)
        self._state.unscored = None
        detections.unlink()

    def finish(self, must_stop: Callable[[], bool]) -> bool:
        """Wait until everything is scored (a collective).

        Args:
            must_stop: called repeatedly on all ranks; must return the same on all of them.

        Returns:
            False when asked to stop.
        """

        def wait_for_message() -> bool:
            if self._message is not None:
                self._message.poll(None)
            return True

        if work_on_main(wait_for_message, must_stop) is None:
            return False
        with distributed.together():
            self.collect()
            left = self._state.unscored if distributed.is_main() else None
            assert left is None, f"a run must not continue as if {left} were scored"
        return True

    def end(self) -> None:
        """End the process; the next start of the run begins it again."""
        if self._process is not None and self._message is not None:
            self._process.kill()
            self._process.join()
            self._message.close()
            self._process = self._message = None

    def _start(self) -> None:
        entry = self._state.unscored
        assert entry is not None
        val_set = self._sets[entry.phase].val
        val_set.close()  # so that no file is open in both processes
        self._message, message = _FORK.Pipe(duplex=False)
        arguments = (self._config, self._run_dir, val_set, entry, message)
        self._process = _FORK.Process(target=_score, args=arguments, daemon=True)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            with warnings.catch_warnings():
                # Python 3.12 and later warn if a process with threads forks, as this one does for
                # its loaders too.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        message.close()

    def _note_best(self, entry: Unscored, metrics: Metrics) -> None:
        state, box_ap = self._state, metrics["bbox"]["AP"]
        if box_ap is None or not math.isfinite(box_ap):
            return  # no objects
        measured_by, best = self._measured_by(entry), state.best_checkpoint
        if state.best_ap is not None and not self._is_comparable(entry, measured_by):
            logger.info(f"AP is measured in another way than that of {best}: the best begins anew")
            state.best_ap = None
        # Older versions may have stored NaN, which nothing exceeds.
        if state.best_ap is None or not box_ap <= state.best_ap:
            folder = self._run_dir.checkpoint(entry.phase, entry.step)
            state.best_ap, state.best_checkpoint = box_ap, folder.name
            state.best_by = measured_by
            keeping.mark_best(folder)

    def _measured_by(self, entry: Unscored) -> str:
        """Return what AP depends on besides the weights, as JSON."""
        options = flat_options(self._config.evaluation)
        val_set = self._sets[entry.phase].val  # may be elsewhere after a resume
        values = {key: value for key, value in options.items() if key not in NO_EFFECT_ON_AP}
        return to_json({**values, "val_set": val_set.index_hash()})

    def _is_comparable(self, entry: Unscored, measured_by: str) -> bool:
        """Tell whether the best AP was measured in the same way; later ways count."""
        if self._state.best_by is not None:
            return self._state.best_by == measured_by
        best = str(self._state.best_checkpoint).rpartition("-")[0]
        return (
            best not in self._config.phases
            or phase_data(self._config, best).val == phase_data(self._config, entry.phase).val
        )


def _score(
    config: RunConfig, run_dir: RunDir, val_set: ShardSet, entry: Unscored, message: Connection
) -> None:
    """Score detections and write the numbers; at the end of a phase also pictures.

    The message is None, or an error that a user can fix.
    """
    _begin_process()
    model, metric = phase_model(config, entry.phase), config.evaluation.metric
    kinds = evaluation_kinds(val_set, has_masks(model), has_keypoints(model), metric)
    count, limit = config.evaluation.pictures, config.evaluation.max_detections
    try:
        results = _read_detections(run_dir.detections(entry.phase, entry.step), val_set)
        metrics = evaluate_detections(val_set, results, kinds, metric, max_detections=limit)
        is_end = entry.step == num_steps(config.phases[entry.phase])
        if count and is_end and not entry.prefix:
            is_own = config.phases[entry.phase].data.val is not None
            pictures.write_pictures(
                val_set, results, kinds, count, run_dir, entry.phase, limit, has_own_set=is_own
            )
        file = run_dir.evaluation(entry.phase, entry.step, entry.prefix)
        write_text(file, to_json(metrics, indent=1))
    except (ValueError, OSError) as error:
        message.send(errors.explain(error))
    else:
        message.send(None)


def _read_detections(file: Path, val_set: ShardSet) -> SavedResults:
    """Read detections; ``ValueError`` unless they are of exactly the images of the set."""
    remedy = "Remove the file and start the run again: it repeats the evaluation."
    try:
        results = SavedResults.read(file)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    if results.image_ids() != sorted(val_set.index["image_id"].tolist()):
        raise ValueError(
            f"{file}: has {results.num_images} images, which are not the {len(val_set)} of "
            f"{val_set.address}. Give the validation set that the run had, or: {remedy}"
        )
    return results


def _begin_process() -> None:
    """Ignore requests to stop, which are for the parent; end with it; use one thread."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # It has the parent's connections too: other ranks would not notice that the parent died.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
    torch.set_num_threads(1)
