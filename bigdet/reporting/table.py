"""Runs side by side: what each came to and what it took, as a Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.run_dir import RunDir

KINDS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""What is measured, by its name in ``metrics.jsonl``, and what people call it."""
_HOUR = 3600


@dataclass(frozen=True)
class Outcome:
    """Where a run ended, or has come so far.

    Attributes:
        ap: AP of the last evaluation by kind, in [0, 1].
        images: training images seen.
        pixels: pixels seen.
        gpu_seconds: of training steps times GPUs.
        data_seconds: of them, spent waiting for data.
        evaluation_seconds: of evaluations times GPUs.
        imported_images: images that were stated for weights from elsewhere; 0 where none were.
        is_finished: the run has its final weights.
    """

    ap: dict[str, float]
    images: int
    pixels: int
    gpu_seconds: float
    data_seconds: float
    evaluation_seconds: float
    imported_images: int
    is_finished: bool


def read_outcome(run_dir: RunDir) -> Outcome | None:
    """Read where a run stands; None before its first evaluation."""
    last: dict[str, Any] | None = None
    if run_dir.metrics.is_file():
        for line in run_dir.metrics.read_text(encoding="utf-8").splitlines():
            if '"bbox/AP"' in line:
                last = json.loads(line)
    if last is None:
        return None
    values = {kind: last.get(f"{kind}/AP") for kind in KINDS}
    return Outcome(
        ap={kind: value for kind, value in values.items() if value is not None},
        images=last["seen/images"],
        pixels=last["seen/pixels"],
        gpu_seconds=last["seen/gpu_seconds"],
        data_seconds=last["cost/data_gpu_seconds"],
        evaluation_seconds=last["cost/evaluation_gpu_seconds"],
        imported_images=last.get("imported/images", 0),
        is_finished=run_dir.weights.is_file(),
    )


def markdown_table(groups: Mapping[str, Sequence[Outcome | None]]) -> str:
    """Write a table with a line for each group of runs that differ in nothing but their seed.

    AP is in percent: the mean over the runs, and behind it their standard deviation where there are
    two or more. Costs are means. Runs that are not finished count with what they came to so far,
    and are told in the last column.

    Args:
        groups: by name; None stands for a run without an evaluation.
    """
    found = [outcome for outcomes in groups.values() for outcome in outcomes if outcome is not None]
    kinds = [kind for kind in KINDS if any(kind in outcome.ap for outcome in found)]
    header = ["run", "seeds", *(f"{KINDS[kind]} AP" for kind in kinds), "images (million)",
              "pixels (10^12)", "GPU-hours", "data wait", "evaluation GPU-hours",
              "imported images (million)", "state"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for name, outcomes in groups.items():
        known = [outcome for outcome in outcomes if outcome is not None]
        lines.append([name, str(len(known)), *_cells(known, kinds), _state(outcomes)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Write values in [0, 1] as percent: ``40.1``, or ``40.1 +- 0.2`` with a standard deviation."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +- {100 * statistics.stdev(values):.1f}"


def _cells(outcomes: Sequence[Outcome], kinds: Sequence[str]) -> list[str]:
    """Write the columns from the APs to the imported images."""
    if not outcomes:
        return [""] * (len(kinds) + 6)
    seconds = statistics.mean(outcome.gpu_seconds for outcome in outcomes)
    waited = statistics.mean(outcome.data_seconds for outcome in outcomes)
    evaluated = statistics.mean(outcome.evaluation_seconds for outcome in outcomes)
    imported = statistics.mean(outcome.imported_images for outcome in outcomes)
    return [
        *(
            spread([outcome.ap[kind] for outcome in outcomes if kind in outcome.ap])
            for kind in kinds
        ),
        f"{statistics.mean(outcome.images for outcome in outcomes) / 1e6:.3g}",
        f"{statistics.mean(outcome.pixels for outcome in outcomes) / 1e12:.3g}",
        f"{seconds / _HOUR:.3g}",
        f"{waited / seconds:.0%}" if seconds else "",
        f"{evaluated / _HOUR:.3g}",
        f"{imported / 1e6:.3g}" if imported else "",
    ]


def _state(outcomes: Sequence[Outcome | None]) -> str:
    finished = sum(outcome is not None and outcome.is_finished for outcome in outcomes)
    return "finished" if finished == len(outcomes) else f"{finished} of {len(outcomes)} finished"
