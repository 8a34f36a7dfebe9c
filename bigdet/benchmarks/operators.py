"""Measures which share of a training step convolutions and matrix products take.

torch's profiler gives the seconds of every operator in the same step, without those of operators
that it calls. What is left is everything else: normalization, copies, proposals, RoI pooling,
losses, the optimizer, and ``step``, the Python code between operators. Steps in fp32 and bf16 take
turns after one of each that does not count. Seconds include what the profiler itself takes, which
is more for many small operators: without it products take a larger share.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bigdet.engine.precision import autocast
from bigdet.models.detector import Detector
from bigdet.structures import Batch

PRODUCTS = (
    "convolution", "conv2d", "addmm", "bmm", "::mm", "::linear", "mkldnn_linear",
    "scaled_dot_product",
)  # fmt: skip
"""Parts of the names of operators that are convolutions or products, forward and backward."""
WHOLE = "step"
NUM_SHOWN = 8


def run(detector: Detector, batch: Batch, rounds: int) -> dict[str, Any]:
    """Measure steps on a CPU; return medians over the rounds, by precision.

    ``products`` is the share of the step, from 0 to 1, of convolutions and products; ``others`` has
    the shares of the slowest other operators.
    """
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-9, momentum=0.9)
    steps: dict[Literal["fp32", "bf16"], list[dict[str, float]]] = {"fp32": [], "bf16": []}
    for _ in range(rounds + 1):
        for precision, measured in steps.items():
            measured.append(_seconds(detector, batch, optimizer, precision))
    return {precision: _summary(measured[1:]) for precision, measured in steps.items()}


def is_product(name: str) -> bool:
    """Return whether an operator is a convolution or a matrix product."""
    return any(part in name for part in PRODUCTS) and "Backward" not in name  # autograd's wrapper


def _seconds(
    detector: Detector,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    precision: Literal["fp32", "bf16"],
) -> dict[str, float]:
    """Take a step; return the seconds of each operator by itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function(WHOLE):
        with autocast(batch.images.device, precision):
            losses = detector(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return {one.key: one.self_cpu_time_total / 1e6 for one in profiled.key_averages()}


def _summary(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of seconds and of shares."""
    totals = [sum(step.values()) for step in steps]
    shares = [
        sum(seconds for name, seconds in step.items() if is_product(name)) / total
        for step, total in zip(steps, totals, strict=True)
    ]
    others = {}
    for name in set().union(*steps):
        if not is_product(name):
            pairs = zip(steps, totals, strict=True)
            others[name] = statistics.median(step.get(name, 0.0) / total for step, total in pairs)
    slowest = sorted(others, key=others.__getitem__, reverse=True)[:NUM_SHOWN]
    return {
        "step_seconds": round(statistics.median(totals), 4),
        "products": round(statistics.median(shares), 3),
        "others": {name: round(others[name], 3) for name in slowest},
    }
