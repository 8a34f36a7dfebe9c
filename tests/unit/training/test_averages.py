"""Means of a line of the log: over its images, whatever was skipped, also of a resumed run."""

import json
import math

import numpy as np
import pytest
import torch

from bigdet.engine.base import StepResult
from bigdet.training.averages import LossMeter
from bigdet.training.state import Interval, RunState

CPU = torch.device("cpu")


def step(total: list[float], box: list[float], norm: float, **facts: bool) -> StepResult:
    """A step of so many lanes, all of this rank."""
    losses = {"total": torch.tensor(total), "box": torch.tensor(box)}
    return StepResult(losses, **{"is_finite": True, "grad_norm": norm, **facts})


FULL = step([1.0, 3.0], [0.5, 0.25], 5.0), np.array([2, 2])
SHORT = step([4.0, 0.0], [2.0, 0.0], 1.0), np.array([1, 0])  # one image in a step of four slots


def add(meter: LossMeter, *steps: tuple[StepResult, np.ndarray]) -> LossMeter:
    for result, images in steps:
        meter.add(result, images, range(2))
    return meter


def test_a_line_is_the_mean_over_all_images_since_the_one_before() -> None:
    meter = add(LossMeter(CPU, Interval()), FULL, SHORT)
    # 5 images: two of loss 1, two of loss 3, one of loss 4. The gradient of the short step is the
    # mean over two lanes, of which one has an image: 1 x 2, of one image of five.
    assert meter.means() == {
        "loss/total": pytest.approx(12 / 5),
        "loss/box": pytest.approx((2 * 0.5 + 2 * 0.25 + 2.0) / 5),
        "grad_norm": pytest.approx((4 * 5.0 + 1 * 2.0) / 5),
    }
    add(meter, SHORT)  # a line that is the short step alone
    assert meter.means() == {"loss/total": 4.0, "loss/box": 2.0, "grad_norm": 2.0}


def test_a_lane_that_is_not_full_counts_by_its_images_and_does_not_scale_the_norm() -> None:
    meter = LossMeter(CPU, Interval())
    meter.add(step([2.0, 5.0], [0.0, 0.0], 3.0), np.array([4, 1]), range(2))
    # (4 x 2 + 1 x 5) / 5; both lanes have an image, so the gradient is that of a full step.
    assert meter.means() == {"loss/total": pytest.approx(2.6), "loss/box": 0.0, "grad_norm": 3.0}


def test_a_step_that_is_not_finite_is_left_out_and_a_mean_of_none_is_none() -> None:
    bad = step([math.nan, 1.0], [1.0, 1.0], math.inf, is_finite=False), np.array([2, 2])
    meter = add(LossMeter(CPU, Interval()), bad, FULL, bad)
    assert meter.means() == {"loss/total": 2.0, "loss/box": 0.375, "grad_norm": 5.0}
    add(meter, bad)
    assert meter.means() == {"loss/total": None, "loss/box": None, "grad_norm": None}


def test_the_losses_of_an_overflow_of_fp16_count_and_its_norm_does_not() -> None:
    overflow = step([7.0, 9.0], [1.0, 1.0], math.inf, is_finite=False, is_overflow=True)
    meter = add(LossMeter(CPU, Interval()), FULL, (overflow, np.array([2, 2])))
    assert meter.means() == {"loss/total": 5.0, "loss/box": pytest.approx(0.6875), "grad_norm": 5.0}


def saved(meter: LossMeter) -> Interval:
    """What a resumed run reads back."""
    state = RunState("train", interval=meter.interval())
    return RunState.from_json(json.loads(json.dumps(state.to_json()))).interval


def test_a_run_that_continues_in_the_middle_of_a_line_gives_the_same_line_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = []
    for number in range(40):
        values = torch.rand(4, generator=generator).tolist()
        result = step(values[:2], [values[2], values[3] * 1e-9], 1 / (number + 3))
        steps.append((result, np.array([2, 1]) if number % 7 else np.array([1, 0])))
    whole = add(LossMeter(CPU, Interval()), *steps).means()
    for place in (1, 13, 39):
        first = add(LossMeter(CPU, Interval()), *steps[:place])
        again = LossMeter(CPU, saved(first))
        assert saved(again) == saved(first)  # saved once more before the next step
        assert add(again, *steps[place:]).means() == whole
        assert add(first, *steps[place:]).means() == whole  # saving changes nothing


def test_a_line_that_is_written_leaves_nothing_to_go_on_from() -> None:
    meter = add(LossMeter(CPU, Interval()), FULL)
    meter.means()
    assert meter.interval() == Interval()
    old = RunState("train").to_json()
    del old["interval"]  # as earlier versions wrote it
    assert RunState.from_json(old).interval == Interval()


def test_a_phase_does_not_take_over_what_the_one_before_had_not_logged() -> None:
    state = RunState("pretrain", interval=Interval(images=4.0))  # a fork that ends where it begins
    state.begin("finetune")
    assert state.interval == Interval()


def test_sums_of_two_ranks_go_on_in_one() -> None:
    ranks = [{"total": 8.0, "box": 1.5}, {"total": 4.0, "box": 2.0}]
    meter = add(LossMeter(CPU, Interval(5.0, ranks, 5.0, 22.0)), FULL)
    # 9 images: sums of 12 and 2 x 1 + 2 x 3, of 3.5 and 2 x 0.5 + 2 x 0.25, of 22 and 4 x 5.
    assert meter.means() == {
        "loss/total": pytest.approx(20 / 9),
        "loss/box": pytest.approx(5 / 9),
        "grad_norm": pytest.approx(42 / 9),
    }


def test_sums_that_only_some_ranks_have_go_on_in_one() -> None:
    # Two ranks go on in four, which save before a step: rank 0 has all, here in the second place.
    ranks: list[dict[str, float]] = [{}, {"total": 12.0, "box": 3.5}, {}, {}]
    meter = LossMeter(CPU, Interval(5.0, ranks, 5.0, 22.0))
    assert add(meter, FULL).means()["loss/total"] == pytest.approx(20 / 9)
    in_first_place = Interval(5.0, ranks[1:], 5.0, 22.0)
    assert add(LossMeter(CPU, in_first_place), FULL).means()["loss/box"] == pytest.approx(5 / 9)
