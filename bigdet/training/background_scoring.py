"""Scores the detections of an evaluation beside training, so that no rank waits for the numbers.

The detections wait in ``evaluation/PHASE-STEP.detections``; a process of rank 0 measures them, and
they go when the numbers are written down. A run that ends before is told by its checkpoints what is
still to be scored, and does so when it is started again.
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
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.config.derived import has_keypoints, has_masks, num_steps, phase_model
from bigdet.config.schema import RunConfig
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

_FORK = multiprocessing.get_context("fork")  # as loaders: the sets are open, nothing is pickled
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class Scorer:
    """Measures one evaluation at a time on rank 0; on the other ranks it does nothing."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        val_set: ShardSet,
        metrics: MetricsWriter | None,
        state: RunState,
    ) -> None:
        """Take where numbers go; what became of them is noted in the state."""
        self._config, self._run_dir, self._val_set = config, run_dir, val_set
        self._metrics, self._state = metrics, state
        self._process: ForkProcess | None = None
        self._message: Connection | None = None

    def resume(self) -> None:
        """Go on with what an earlier process of the run left unscored.

        The evaluation of the current step is due again where its detections are lost: so says the
        state of rank 0 then.
        """
        if not distributed.is_main():
            return
        entry, run_dir = self._state.unscored, self._run_dir
        for file in run_dir.all_detections():
            if entry is None or file != run_dir.detections(entry.phase, entry.step):
                file.unlink()  # of a later step, which will come again
        if entry is None:
            return
        numbers = run_dir.evaluation(entry.phase, entry.step)
        if run_dir.detections(entry.phase, entry.step).is_file():
            logger.info("%s step %d: scoring what an earlier start has detected",
                        entry.phase, entry.step)  # fmt: skip
            self._start()
            return
        self._state.unscored = None
        if numbers.is_file():  # scored after the checkpoint was written
            self._note_best(entry, json.loads(numbers.read_bytes()))
            return
        is_here = (entry.phase, entry.step) == (self._state.phase, self._state.step)
        self._state.needs_evaluation |= is_here
        logger.warning(
            "%s step %d: its detections are not in this run folder, so %s", entry.phase, entry.step,
            "it is evaluated again" if is_here else
            "it has no AP here; `bigdet evaluate` measures its checkpoint",
        )  # fmt: skip

    def start(self, results: SavedResults) -> None:
        """Score the detections of the current step from now on; none may be under way.

        Raises:
            OSError: they cannot be written to disk.
        """
        state = self._state
        if distributed.is_main():
            assert state.unscored is None, "one at a time"
            results.write(self._run_dir.detections(state.phase, state.step))
            counters = measuring.counters(self._config, state)
            state.unscored = Unscored(state.phase, state.step, state.total_steps, counters)
            self._start()

    def collect(self) -> None:
        """Write the numbers down if they are there.

        Raises:
            ValueError: the process failed by what a user can cause; with what it said.
            LostProcessError: it was killed, or failed otherwise.
        """
        # Its message says that the process is done; without one the end of the pipe does. A process
        # that has ended still counts as alive until the system has said how.
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
                f"{detections}: the process that scores it ended with exit code {code}. Started "
                f"again, the run scores it once more.{errors.explain_exit(code)}"
            ) from error
        finally:
            self.end()
        if problem is not None:
            raise ValueError(f"evaluation at {entry.phase} step {entry.step}: {problem}")
        file = self._run_dir.evaluation(entry.phase, entry.step)
        metrics = json.loads(file.read_bytes())
        flat = measuring.flat_metrics(metrics)
        text = ", ".join(filter(None, [measuring.one_line(flat), limit_note(metrics)]))
        logger.info("%s step %d: %s", entry.phase, entry.step, text, extra={"values": flat})
        line = {"phase": entry.phase, "step": entry.step, **flat, **entry.counters}
        self._metrics.write(line, entry.total_steps)
        self._note_best(entry, metrics)
        self._state.unscored = None
        detections.unlink()

    def finish(self, must_stop: Callable[[], bool]) -> bool:
        """Wait until nothing is under way (a collective).

        Args:
            must_stop: asked on all ranks again and again (a collective); the same answer on all.

        Returns:
            False when they had to stop.
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
            assert left is None, f"a run must not go on as if {left} were scored"
        return True

    def end(self) -> None:
        """End the process; a run that goes on later begins it again."""
        if self._process is not None and self._message is not None:
            self._process.kill()
            self._process.join()
            self._message.close()
            self._process = self._message = None

    def _start(self) -> None:
        self._val_set.close()  # so that no file is open in both processes
        self._message, message = _FORK.Pipe(duplex=False)
        arguments = (self._config, self._run_dir, self._val_set, self._state.unscored, message)
        self._process = _FORK.Process(target=_score, args=arguments, daemon=True)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            with warnings.catch_warnings():
                # Python 3.12 and later warn of any fork of a process with threads; the loaders
                # are forked from the same one.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        message.close()

    def _note_best(self, entry: Unscored, metrics: Metrics) -> None:
        state, box_ap = self._state, metrics["bbox"]["AP"]
        if box_ap is None or not math.isfinite(box_ap):
            return  # nothing to measure
        # Older runs may have noted NaN, which nothing exceeds.
        if state.best_ap is None or not box_ap <= state.best_ap:
            folder = self._run_dir.checkpoint(entry.phase, entry.step)
            state.best_ap, state.best_checkpoint = box_ap, folder.name
            keeping.mark_best(folder)


def _score(
    config: RunConfig, run_dir: RunDir, val_set: ShardSet, entry: Unscored, message: Connection
) -> None:
    """Measure detections and write the numbers, and at the end of a phase pictures.

    The message is None, or what a user has to mend.
    """
    _begin_process()
    model, metric = phase_model(config, entry.phase), config.evaluation.metric
    kinds = evaluation_kinds(val_set, has_masks(model), has_keypoints(model), metric)
    count, limit = config.evaluation.pictures, config.evaluation.max_detections
    try:
        results = _read_detections(run_dir.detections(entry.phase, entry.step), val_set)
        metrics = evaluate_detections(val_set, results, kinds, metric, max_detections=limit)
        if count and entry.step == num_steps(config.phases[entry.phase]):
            pictures.write_pictures(val_set, results, kinds, count, run_dir, entry.phase, limit)
        write_text(run_dir.evaluation(entry.phase, entry.step), to_json(metrics, indent=1))
    except (ValueError, OSError) as error:
        message.send(errors.explain(error))
    else:
        message.send(None)


def _read_detections(file: Path, val_set: ShardSet) -> SavedResults:
    """Read detections; ``ValueError`` unless they are of all images of the set."""
    remedy = "Remove the file and start the run again: it evaluates once more."
    try:
        results = SavedResults.read(file)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    if results.image_ids() != sorted(val_set.index["image_id"].tolist()):
        raise ValueError(
            f"{file}: is of {results.num_images} images, which are not the {len(val_set)} of "
            f"{val_set.address}. Give the validation set that the run had, or: {remedy}"
        )
    return results


def _begin_process() -> None:
    """Leave requests to stop to the parent, end with it, and take one thread."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # It holds the parent's connections too: other ranks would not notice that the parent died.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
    torch.set_num_threads(1)
