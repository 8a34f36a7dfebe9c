"""The results of steps, read when the device is busy with the next step.

Until then the host does not know whether a step counted. The device does: a step with a loss or
gradient that is not finite on any rank changes nothing, whenever that is known here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigdet import distributed
from bigdet.engine.base import Launched, StepResult
from bigdet.training import saving
from bigdet.training.averages import LossMeter
from bigdet.training.metrics import StepMeter
from bigdet.training.pace import Mark

if TYPE_CHECKING:
    from bigdet.training.loop import Run

logger = logging.getLogger(__name__)


@dataclass
class Taken:
    """A step that was launched, and what is needed when its result is read.

    Attributes:
        step: its number in the phase.
        launched: gives its result.
        images: ``(L,)`` images of each lane, masked slots not counted.
        image_ids: of this rank's micro-batches.
        data_seconds: how long the host waited for them.
        begin: before its work on the device.
        end: after it.
        seconds: of the whole step on the host, once it is over.
    """

    step: int
    launched: Launched
    images: NDArray[np.int64]
    image_ids: list[int]
    data_seconds: float
    begin: Mark
    end: Mark
    seconds: float = 0.0


class Results:
    """Reads the results of a phase's steps and counts them.

    Attributes:
        last: the result that was read last.
    """

    last: StepResult

    def __init__(self, run: Run, losses: LossMeter, meter: StepMeter, lanes: range) -> None:
        """Prepare.

        Args:
            run: its state is changed in place.
            losses: gets the losses of each step.
            meter: learns how much of the wait for data the device did not notice.
            lanes: numbers of the lanes that this rank runs.
        """
        self._run, self._losses, self._meter, self._lanes = run, losses, meter, lanes
        self._unread: Taken | None = None
        self._last_end: Mark | None = None

    def add(self, taken: Taken) -> None:
        """Note a step; `settle` has read the one before."""
        assert self._unread is None
        self._unread = taken

    def end_step(self, seconds: float) -> None:
        """Note how long the step that was added last took on the host; good if it counts."""
        if self._unread is not None:
            self._unread.seconds = seconds
        elif self.last.is_finite:
            self._run.state.good_seconds += seconds

    def settle(self) -> None:
        """Read the result of the step that was added last, if that has not been done.

        Raises:
            SharedError: too many steps were not finite.
        """
        taken, self._unread = self._unread, None
        if taken is None:
            return
        state, self.last = self._run.state, taken.launched.read()
        self._losses.add(self.last, taken.images, self._lanes)
        if self._last_end is not None:  # while the host waited, the device may have had work
            idle_seconds = taken.begin.seconds_since(self._last_end)
            self._meter.add_hidden_wait(max(0.0, taken.data_seconds - idle_seconds))
        self._last_end = taken.end
        if self.last.is_finite:
            state.good_seconds += taken.seconds
            return
        state.skipped_steps += 1
        where = f"{state.phase} step {taken.step}"
        if self.last.is_overflow:
            scale = self.last.loss_scale / 2
            logger.info("%s: fp16 overflow, step skipped, loss scale now %g", where, scale)
        else:
            self._note_bad_step(where, taken.image_ids)

    def _note_bad_step(self, where: str, image_ids: list[int]) -> None:
        """Count a step that was not finite, on any rank; too many of them stop the run."""
        state, config = self._run.state, self._run.config
        state.bad_steps += 1
        logger.warning(
            "%s: loss or gradient not finite, step skipped (%d so far); images of this rank: %s",
            where,
            state.bad_steps,
            image_ids,
        )
        if state.bad_steps > config.engine.max_bad_steps:
            self._run.saver.wait()
            last = saving.last_good_checkpoint(self._run.run_dir)
            raise distributed.SharedError(
                f"{where}: {state.bad_steps} steps had a loss or gradient that is not finite, more "
                f"than engine.max_bad_steps. Lower phases.{state.phase}.lr, or set "
                f"engine.clip_norm. Last good checkpoint: {last or 'none'}."
            )

    def check_trained(self, num_steps: int) -> None:
        """Stop on all ranks at the end of a phase in which no step changed a weight."""
        state, config = self._run.state, self._run.config
        if state.skipped_steps < num_steps:
            return
        is_fp16 = config.engine.precision == "fp16"
        also = " fp16 needs some steps to find its loss scale: set more, or bf16." * is_fp16
        raise distributed.SharedError(
            f"{state.position}: all {num_steps} steps of the phase were skipped, since a "
            f"loss or gradient was not finite: nothing was trained, so the run ends. "
            f"Lower phases.{state.phase}.lr, set engine.clip_norm, or look at the weights that the "
            f"phase starts from.{also}"
        )
