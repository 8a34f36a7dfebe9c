"""Results of steps that are read one step late: each is counted once, by its own number."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigdet import distributed
from bigdet.engine.base import Launched, StepResult
from bigdet.run_dir import RunDir
from bigdet.training.averages import LossMeter
from bigdet.training.metrics import StepMeter
from bigdet.training.pace import Mark
from bigdet.training.results import Results, Taken
from bigdet.training.state import Interval, RunState
from tests.unit.models.scenes import make_scene

CPU = torch.device("cpu")


class Steps:
    """A phase of steps with given gradient norms; not finite ones are bad."""

    def __init__(self, folder: Path, limit: int = 5) -> None:
        self.state = RunState("train")
        engine = SimpleNamespace(max_bad_steps=limit, precision="fp32")
        run: Any = SimpleNamespace(
            state=self.state,
            config=SimpleNamespace(engine=engine),
            saver=SimpleNamespace(wait=lambda: None),
            run_dir=RunDir(folder),
        )
        self.losses, self.meter = LossMeter(CPU, Interval()), StepMeter(CPU)
        self.results = Results(run, self.losses, self.meter, range(1))
        self.read: list[int] = []

    def take(
        self,
        norm: float,
        seconds: float,
        *,
        is_needed: bool = False,
        data_seconds: float = 0.0,
        idle_seconds: float = 0.0,
    ) -> None:
        """Launch a step as the loop does: the step before is read after it."""
        self.state.step += 1
        step = self.state.step
        result = StepResult({"total": torch.tensor([norm])}, math.isfinite(norm), norm)

        def read() -> StepResult:
            self.read.append(step)
            return result

        launched = Launched(torch.tensor(result.is_finite), read)
        begin: Any = SimpleNamespace(seconds_since=lambda earlier: idle_seconds)
        taken = Taken(
            step, launched, np.array([2]), [step * 10], data_seconds, begin, end=Mark(CPU)
        )
        self.results.settle()
        self.results.add(taken)
        if is_needed:
            self.results.settle()
        self.results.end_step(seconds)
        self.meter.add([make_scene([[(0, 0, 9, 9)]], [(32, 32)], (32, 32))], seconds, data_seconds)


def test_each_result_is_read_after_the_next_step_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(tmp_path)
    steps.take(1.0, 2.0)
    assert steps.read == []
    steps.take(math.nan, 4.0)
    assert (steps.read, steps.state.skipped_steps, steps.state.good_seconds) == ([1], 0, 2.0)
    with caplog.at_level(logging.WARNING):
        steps.take(3.0, 8.0)
    assert (steps.state.skipped_steps, steps.state.bad_steps) == (1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "train step 2: loss or gradient not finite, step skipped (1 so far); images of this "
        "rank: [20]"
    ]
    steps.take(5.0, 16.0, is_needed=True)  # a line of the log is due
    assert steps.read == [1, 2, 3, 4]
    assert (steps.state.skipped_steps, steps.state.bad_steps) == (1, 1)
    assert steps.state.good_seconds == 2.0 + 8.0 + 16.0
    assert steps.results.last.grad_norm == 5.0
    assert steps.losses.means() == {"loss/total": 3.0, "grad_norm": 3.0}  # of 1, 3 and 5


def test_a_bad_step_that_is_read_at_once_is_no_good_time(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.take(math.inf, 2.0, is_needed=True)
    steps.take(1.0, 4.0, is_needed=True)
    assert (steps.state.skipped_steps, steps.state.good_seconds) == (1, 4.0)


def test_a_wait_for_data_counts_only_while_the_device_has_nothing_to_do(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.take(1.0, 4.0, data_seconds=2.0)  # the first: nothing was launched before
    steps.take(1.0, 4.0, data_seconds=2.0, idle_seconds=0.5)
    steps.take(1.0, 4.0, data_seconds=2.0, idle_seconds=9.0)  # an evaluation came before
    steps.take(1.0, 4.0, data_seconds=0.25, idle_seconds=0.5, is_needed=True)
    assert steps.meter.rates()["time/data_seconds"] == (2.0 + 0.5 + 2.0 + 0.25) / 4


def test_too_many_bad_steps_stop_the_run_by_the_number_of_the_last(tmp_path: Path) -> None:
    steps = Steps(tmp_path, limit=1)
    steps.take(math.nan, 1.0)
    steps.take(math.nan, 1.0)
    with pytest.raises(distributed.SharedError, match=r"^train step 2: 2 steps had a loss"):
        steps.take(1.0, 1.0)
