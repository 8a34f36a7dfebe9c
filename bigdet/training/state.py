"""What a resume needs besides weights and optimizer state: the run's position and counters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NEWEST = "weights/"
"""Before the names of the numbers of the newest weights, where their average is evaluated too."""


@dataclass
class Seen:
    """What a run has consumed so far, over all ranks and phases (paper 1, figure 2).

    Attributes:
        images: training images, repeats counted, masked slots not.
        instances: objects on them that are not crowd.
        pixels: pixels of these images at the size the model saw, padding not counted.
        gpu_seconds: seconds of training steps times ranks.
    """

    images: int = 0
    instances: int = 0
    pixels: int = 0
    gpu_seconds: float = 0.0


@dataclass
class Cost:
    """What a phase has cost so far, over all ranks (paper 1, figure 2; paper 2's cost columns).

    Attributes:
        steps: optimizer steps.
        images: training images, repeats counted, masked slots not.
        instances: objects on them that are not crowd.
        pixels: pixels of these images at the size the model saw, padding not counted.
        compute_gpu_seconds: seconds of training steps times ranks, without the wait for data.
        data_gpu_seconds: seconds of waiting for data times ranks.
        evaluation_gpu_seconds: seconds of evaluations times ranks.
        energy_joules: energy of the ranks' GPUs; None if one of them has no counter.
        cpu_seconds: CPU time of training steps, all threads of the ranks but not their loader
            processes (``data.workers``); None if a part was trained on GPUs or not counted.
        evaluation_cpu_seconds: the same of evaluations, without the process that scores.
    """

    steps: int = 0
    images: int = 0
    instances: int = 0
    pixels: int = 0
    compute_gpu_seconds: float = 0.0
    data_gpu_seconds: float = 0.0
    evaluation_gpu_seconds: float = 0.0
    energy_joules: float | None = 0.0
    cpu_seconds: float | None = 0.0
    evaluation_cpu_seconds: float | None = 0.0

    def add(self, more: Cost) -> None:
        """Add the cost of later steps."""
        for name, value in asdict(more).items():
            own = getattr(self, name)
            setattr(self, name, None if own is None or value is None else own + value)


@dataclass
class Interval:
    """Sums over the steps since the last log line; the next line has their means.

    Attributes:
        images: training images of the steps whose losses count, over all ranks.
        losses: for each rank, by name: sum over its lanes of loss times images.
        norm_images: training images of the steps whose gradient norm counts.
        norm: sum over these steps of the gradient norm times the images.
    """

    images: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    norm_images: float = 0.0
    norm: float = 0.0


@dataclass
class Unscored:
    """An evaluation whose detections are not scored yet.

    Attributes:
        phase: phase of the model that was evaluated.
        step: its finished steps of that phase.
        total_steps: its finished steps of all phases.
        counters: the costs until then, as in ``metrics.jsonl``.
        prefix: what comes before the names of its numbers there: nothing, or `NEWEST`.
    """

    phase: str
    step: int
    total_steps: int
    counters: dict[str, float]
    prefix: str = ""


@dataclass
class RunState:
    """Position and counters of a run. Written to ``state.json`` of every checkpoint.

    Attributes:
        phase: name of the current phase.
        step: finished steps of this phase.
        total_steps: finished steps of all phases.
        seen: images and other counts since the start of the run.
        costs: cost of each phase, by name.
        needs_evaluation: an evaluation is due at this step and not done yet.
        unscored: the evaluation that is being scored in the background; only on rank 0, like the
            best AP and checkpoint.
        interval: sums since the last log line, at the time of the checkpoint.
        skipped_steps: steps of the current phase that changed no weight, for any reason.
        bad_steps: steps skipped because a loss or gradient was not finite.
        dropped_boxes: boxes that a random crop removed entirely, over all ranks.
        damaged: damaged samples of the present training set that were replaced, by kind, over all
            ranks.
        damaged_rows: their rows, so that no rank, phase or resumed run counts one again.
        best_ap: highest box AP of an evaluation so far on the newest validation set, in [0, 1];
            None before the first.
        best_checkpoint: name of the checkpoint with this AP.
        best_by: how this AP was measured, as JSON: options of the evaluation, hash of the
            validation set. None if an earlier version measured it.
        stream: what the order of the data depends on (``TrainStream.state``).
        stream_shift: step of that order minus ``step``; not 0 after a change of the batch size.
        frozen: hash of the frozen backbone of the phase, None where there is none.
        ranks: number of ranks when this was written; 0 if not known.
        started: when the run was started first, seconds since 1970, by the clock of rank 0.
        good_seconds: time in steps that counted, without those that a killed run has lost.
    """

    phase: str
    step: int = 0
    total_steps: int = 0
    seen: Seen = field(default_factory=Seen)
    costs: dict[str, Cost] = field(default_factory=dict)
    needs_evaluation: bool = False
    unscored: Unscored | None = None
    interval: Interval = field(default_factory=Interval)
    skipped_steps: int = 0
    bad_steps: int = 0
    dropped_boxes: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    damaged_rows: list[int] = field(default_factory=list)
    best_ap: float | None = None
    best_checkpoint: str | None = None
    best_by: str | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    stream_shift: int = 0
    frozen: str | None = None
    ranks: int = 0
    started: float = field(default_factory=time.time)
    good_seconds: float = 0.0

    def goodput(self, now: float) -> float:
        """Return the part of the time since the first start that was in steps that counted.

        Args:
            now: seconds since 1970.
        """
        passed = max(now - self.started, self.good_seconds)  # clocks of hosts differ
        return self.good_seconds / passed if passed else 0.0

    @property
    def position(self) -> str:
        """Phase and step, for messages."""
        return f"{self.phase} step {self.step}"

    def begin(self, phase: str, *, has_other_images: bool = False) -> None:
        """Move on to the start of another phase, whose training set may be another."""
        self.phase, self.step, self.stream_shift, self.frozen = phase, 0, 0, None
        self.interval, self.skipped_steps = Interval(), 0
        if has_other_images:
            self.damaged, self.damaged_rows = {}, []

    def counters(self) -> dict[str, float]:
        """Return the costs by the names of ``metrics.jsonl``.

        ``seen/`` and ``cost/`` are of the whole run, ``phase_cost/`` of the current phase.
        """
        total = Cost()
        for cost in self.costs.values():
            total.add(cost)
        own = self.costs.get(self.phase, Cost())
        seen = asdict(self.seen)
        values = {f"seen/{name}": value for name, value in seen.items()}
        values |= {
            f"cost/{name}": value for name, value in asdict(total).items() if name not in seen
        }
        values |= {f"phase_cost/{name}": value for name, value in asdict(own).items()}
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        """Read what ``to_json`` wrote."""
        uncounted = {"cpu_seconds": None, "evaluation_cpu_seconds": None}  # by earlier versions
        costs = {
            phase: Cost(**{**uncounted, **cost}) for phase, cost in values.get("costs", {}).items()
        }
        unscored = values.get("unscored")
        read = {
            "seen": Seen(**values["seen"]),
            "costs": costs,
            "interval": Interval(**values.get("interval", {})),
            "unscored": None if unscored is None else Unscored(**unscored),
        }
        return cls(**{**values, **read})
