"""The slowest rank by times made by hand, and the time of forward passes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bigdet.config.engine import EngineConfig
from bigdet.models.backbones.build import build_backbone
from bigdet.models.frozen import freeze_backbone, frozen_layers
from bigdet.training import pace
from bigdet.training.pace import ForwardClock, find_straggler
from bigdet.training.state import RunState

CPU = torch.device("cpu")


def straggler(seconds: float, data: list[float], forward: list[float]) -> tuple[int, float]:
    return find_straggler(seconds, np.array(data), np.array(forward))


def test_a_rank_with_slow_forward_passes_is_waited_for() -> None:
    # Rank 1 computes all 9 s, 3 of them forward: c = 3. Ranks 0 and 2 compute 3 x 2 s, wait 3 of 9.
    assert straggler(9.0, [0, 0, 0], [2, 3, 2]) == (1, pytest.approx(3 / 9))
    # Of four, one is as slow: its wait is 0, and the mean over the others (3 + 0 + 3) / 3 of 9 s.
    assert straggler(9.0, [0, 0, 0, 0], [2, 3, 3, 2]) == (1, pytest.approx(2 / 9))


def test_a_rank_with_slow_data_is_waited_for() -> None:
    # Rank 2 has 4 of 10 s left for its passes of 2: c = 3. The others work 1 + 6 s.
    assert straggler(10.0, [1, 1, 4], [2, 2, 2]) == (2, pytest.approx(3 / 10))


def test_both_count_together() -> None:
    # c is min(9 / 2, 10 / 3) = 10 / 3, of rank 1; rank 0 works 1 + 20 / 3 of 10 s.
    assert straggler(10.0, [1, 0], [2, 3]) == (1, pytest.approx((10 - 1 - 20 / 3) / 10))


def test_without_times_of_passes_only_data_counts() -> None:
    assert straggler(10.0, [1, 4, 2], [0, 0, 0]) == (1, pytest.approx((3 + 2) / 2 / 10))


def test_equal_ranks_wait_for_none() -> None:
    assert straggler(10.0, [1, 1], [2, 2])[1] == 0.0


class Clock:
    """The seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Gathered(nn.Module):
    """A part whose weights are gathered for 4 s, as by a hook of FSDP2; computes 1 s and 2 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.part = nn.Linear(2, 2)
        self.part.register_forward_pre_hook(lambda *_: clock.passes(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.passes(1.0)
        y = self.part(x)
        self.clock.passes(2.0)
        return y


def test_forward_passes_are_timed_without_the_gathers_of_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    module = Gathered(clock)
    forward = ForwardClock(module, [module.part], CPU)
    for _ in range(2):
        module(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        module(torch.ones(1, 2))  # an evaluation does not count
    module.part(torch.ones(1, 2))  # what runs again in a backward pass neither
    assert forward.take() == 2 * (1.0 + 2.0)
    assert forward.take() == 0.0
    forward.close()
    module(torch.ones(1, 2))
    assert forward.take() == 0.0


def test_goodput_is_the_time_in_good_steps_over_all_time_since_the_first_start() -> None:
    state = RunState("train", started=1000.0)
    assert state.goodput(1000.0) == 0.0
    state.good_seconds = 60.0
    assert state.goodput(1080.0) == 0.75
    # Killed and started again later, from a checkpoint with 60 of 75 good seconds.
    again = RunState.from_json(state.to_json())
    again.good_seconds += 40.0
    assert again.goodput(1200.0) == 0.5
    assert again.goodput(1010.0) == 1.0  # the clock of another host, behind by minutes


def test_a_checkpoint_of_an_earlier_version_counts_from_its_first_start_now() -> None:
    old = RunState("train").to_json()
    del old["started"], old["good_seconds"]
    state = RunState.from_json(old)
    assert state.good_seconds == 0.0
    assert time.time() - state.started < 60


def test_the_wait_for_gathered_layers_of_a_frozen_backbone_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    detector: Any = nn.Module()
    detector.backbone = build_backbone("resnet10", "bn", 0.0)
    freeze_backbone(detector.backbone)
    detector.forward = lambda images: detector.backbone(images)
    layer = frozen_layers(detector)[2]
    layer.register_forward_pre_hook(lambda *_: clock.passes(4.0))  # gathered
    layer.register_forward_hook(lambda *_: clock.passes(2.0))  # computed
    for option, expected in ((True, 2.0), (False, 6.0)):
        engine = EngineConfig(shard_frozen=option)
        config: Any = SimpleNamespace(engine=engine, model=SimpleNamespace(compile=False))
        timed = pace.clock_for(detector, config, CPU)
        detector(torch.zeros(1, 3, 32, 32))
        assert timed.take() == expected
        timed.close()
