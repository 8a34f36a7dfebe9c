"""Measures what a step costs besides computing: messages between the hosts, and waits for devices.

For each number of ranks, on this host, medians over the rounds of the slowest rank:

- ``meeting_seconds``: the one message before a step (whether any rank has a problem or was asked to
  stop), and ``two_meetings_seconds``: one message for each;
- ``norm_seconds``: summing a number over the ranks on the device, and reading it on the host;
- ``step_seconds``: steps of the config's engine whose results are read one step late, as in
  training, and ``step_read_at_once_seconds``: steps whose results are read before the next one.

A step of a phase has one message and, under FSDP2 and ZeRO-0, reads late. On a CPU a step is done
when it is launched, so that the last two differ by chance only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bigdet import distributed
from bigdet.benchmarks.ranks import run_ranks
from bigdet.benchmarks.step import NUM_CLASSES, make_scene
from bigdet.config.load import check_phase
from bigdet.config.phase import PhaseConfig
from bigdet.config.run import RunConfig
from bigdet.engine.base import Launched
from bigdet.engine.build import build_engine
from bigdet.models.build import build_detector
from bigdet.models.norms import set_norm_mode, update_running_statistics
from bigdet.training import optim

MESSAGES_PER_ROUND = 20
"""Messages are short, so that one alone cannot be timed."""


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all numbers of ranks, one after the other."""
    name = arguments.phase or next(iter(config.phases))
    check_phase(config, name)
    measure = partial(_measure, config, config.phases[name], arguments.size, arguments.rounds)
    report = {}
    for num_ranks in arguments.ranks:
        ranks = run_ranks(measure, num_ranks, f"{num_ranks}")
        report[f"{num_ranks} ranks"] = {
            key: round(max(rank[key] for rank in ranks), 6) for key in ranks[0]
        }
    return {
        "what": "meetings",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "engine": config.engine.kind,
        "zero_stage": config.engine.zero_stage,
        **report,
    }


def _measure(config: RunConfig, phase: PhaseConfig, size: int, rounds: int) -> dict[str, float]:
    """Measure on this rank."""
    device = distributed.device()
    number = torch.ones((), dtype=torch.float64, device=device)

    def meet() -> None:
        with distributed.together() as wish:
            wish.is_asked = False

    def meet_twice() -> None:
        with distributed.together():
            pass
        distributed.any_rank(False)

    def sum_and_read() -> None:
        float(distributed.sum_over_ranks(number))

    def repeated(message: Callable[[], None]) -> None:
        for _ in range(MESSAGES_PER_ROUND):
            message()

    found = {
        name: _median(partial(repeated, message), rounds) / MESSAGES_PER_ROUND
        for name, message in (
            ("meeting_seconds", meet),
            ("two_meetings_seconds", meet_twice),
            ("norm_seconds", sum_and_read),
        )
    }
    return found | _measure_steps(config, phase, size, rounds, device)


def _measure_steps(
    config: RunConfig, phase: PhaseConfig, size: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Measure steps of the config's detector on a random scene, read late and at once, in turn."""
    torch.manual_seed(config.seed)
    detector = build_detector(config.model, NUM_CLASSES).train()
    if phase.norm_mode is not None:
        set_norm_mode(detector, phase.norm_mode)
    make_optimizer = partial(optim.build_optimizer, phase=phase)
    engine = build_engine(detector, make_optimizer, config.engine, 1, device, detector.units)
    engine.set_lr(phase.lr)
    seed = config.seed + distributed.rank()
    batch = make_scene(phase.images_per_gpu, (size, size), 5, seed).to(device)
    unread: list[Launched] = []

    def step() -> None:
        unread.append(engine.launch_step([batch]))
        update_running_statistics(detector, counts=unread[-1].counts)
        if len(unread) > 1:
            unread.pop(0).read()

    def step_at_once() -> None:
        step()
        unread.pop().read()

    step()
    late = _median(step, rounds)
    unread.pop().read()
    return {"step_seconds": late, "step_read_at_once_seconds": _median(step_at_once, rounds)}


def _median(action: Callable[[], None], rounds: int) -> float:
    """Return the median time of an action that all ranks begin together."""
    times = []
    for _ in range(rounds + 1):
        distributed.barrier()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
