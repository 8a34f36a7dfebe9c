"""What a resume needs beside weights and optimizer state: where the run is and what it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Seen:
    """What a run has consumed so far, over all ranks and phases (paper 1, figure 2).

    Attributes:
        images: training images, repeats counted, masked slots not.
        instances: objects on them that are not crowd.
        pixels: pixels of them at the size the model saw, padding not counted.
        gpu_seconds: seconds of training steps times ranks.
    """

    images: int = 0
    instances: int = 0
    pixels: int = 0
    gpu_seconds: float = 0.0


@dataclass
class Cost:
    """What a phase has taken so far, over all ranks (paper 1, figure 2; paper 2's cost columns).

    Attributes:
        steps: of the optimizer.
        images: training images, repeats counted, masked slots not.
        instances: objects on them that are not crowd.
        pixels: pixels of them at the size the model saw, padding not counted.
        compute_gpu_seconds: seconds of training steps times ranks, the wait for data left out.
        data_gpu_seconds: seconds of waiting for data times ranks.
        evaluation_gpu_seconds: seconds of evaluations times ranks.
        energy_joules: of the ranks' GPUs; None where one of them does not tell.
        cpu_seconds: of training steps, of all threads of the ranks, reading and decoding by loader
            processes (``data.workers``) left out; None where a part was trained on GPUs, or not
            counted.
        evaluation_cpu_seconds: of evaluations, likewise; a process of its own does the scoring.
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
        """Add what was taken since."""
        for name, value in asdict(more).items():
            own = getattr(self, name)
            setattr(self, name, None if own is None or value is None else own + value)


@dataclass
class Interval:
    """Sums over the steps since the last line of the log, of which the next line has the means.

    Attributes:
        images: training images of the steps whose losses count, over all ranks.
        losses: of each rank, by name: sums over its lanes of a lane's loss times its images.
        norm_images: training images of the steps whose gradient norm counts.
        norm: sum over these steps of the gradient norm times the images.
    """

    images: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)
    norm_images: float = 0.0
    norm: float = 0.0


@dataclass
class Unscored:
    """An evaluation whose detections are there, but not yet their numbers.

    Attributes:
        phase: in which the model was looked at.
        step: of the phase, after which.
        total_steps: of all phases.
        counters: what the run had taken until then, as ``metrics.jsonl`` has it.
    """

    phase: str
    step: int
    total_steps: int
    counters: dict[str, float]


@dataclass
class RunState:
    """Where a run is. Written to ``state.json`` of every checkpoint.

    Attributes:
        phase: name of the current phase.
        step: finished steps of it.
        total_steps: finished steps of all phases.
        seen: what has been consumed.
        costs: what each phase has taken, by name.
        needs_evaluation: the evaluation due at this step was not done yet.
        unscored: the evaluation that is being scored beside training; known to rank 0 alone, as
            are the best AP and checkpoint.
        interval: what was seen since the last line of the log, when this was written.
        skipped_steps: steps of the current phase that changed no weight, for whatever reason.
        bad_steps: steps skipped because a loss or gradient was not finite.
        dropped_boxes: boxes of objects that a random crop left nothing of, over all ranks.
        damaged: damaged training samples that were replaced, by kind, over all ranks.
        damaged_rows: which ones, so that no rank, phase or resumed run counts one again.
        best_ap: highest box AP of an evaluation so far, in [0, 1]; None before the first.
        best_checkpoint: name of the checkpoint that has it.
        stream: what ``step`` is relative to in the order of the data.
        stream_shift: step of that order less ``step``; not 0 once the batch size was changed.
        ranks: that trained when this was written; 0 if not known.
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
    stream: dict[str, Any] = field(default_factory=dict)
    stream_shift: int = 0
    ranks: int = 0

    @property
    def position(self) -> str:
        """Where the run is, as people read it."""
        return f"{self.phase} step {self.step}"

    def begin(self, phase: str) -> None:
        """Move on to the start of another phase."""
        self.phase, self.step, self.stream_shift = phase, 0, 0
        self.interval, self.skipped_steps = Interval(), 0

    def counters(self) -> dict[str, float]:
        """Return what the run, and its current phase, have taken so far, as ``metrics.jsonl`` does.

        ``seen/`` and ``cost/`` are of the whole run, ``phase_cost/`` of the phase.
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
