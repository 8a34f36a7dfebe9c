"""The moving average of the weights of a phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A moving average (EMA) of weights and running statistics, updated in each step.

    Each rank averages the part of the weights that its optimizer steps, which costs one more fp32
    copy of that part. Skipped steps do not count.
    """

    decay: float = 0.9999
    """Weight of the old average in each step; the newest weights have 1 - ``decay``. The average
    covers about 1 / (1 - ``decay``) steps: a phase should be several times as long."""
    warm_up: bool = True
    """Begin with a lower decay, so that the weights that the phase starts from soon lose their
    weight: the n-th step uses (1 + n) / (10 + n) until that reaches ``decay``, as TensorFlow does.
    False: the same decay in every step."""
    evaluate: Literal["average", "both"] = "average"
    """What is evaluated. ``average``: the average instead of the newest weights. ``both``: the
    newest weights too, as ``weights/bbox/AP`` and so on in ``metrics.jsonl``. The best checkpoint
    is always that of the best average."""
