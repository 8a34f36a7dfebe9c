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
class RunState:
    """Where a run is. Written to ``state.json`` of every checkpoint.

    Attributes:
        phase: name of the current phase.
        step: finished steps of it.
        total_steps: finished steps of all phases.
        seen: what has been consumed.
        needs_evaluation: the evaluation due at this step was not done yet.
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
    needs_evaluation: bool = False
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

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        """Read what ``to_json`` wrote."""
        return cls(**{**values, "seen": Seen(**values["seen"])})
