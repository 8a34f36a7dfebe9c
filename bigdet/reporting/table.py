"""Runs side by side: what each came to and what it took, as a table."""

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
class Table:
    """A table of texts, the same in Markdown and in HTML.

    Attributes:
        header: names of the columns.
        rows: each with as many cells.
    """

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Write it as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(map(_escaped, cells))} |\n" for cells in lines)


@dataclass(frozen=True)
class Outcome:
    """Where a run ended, or has come so far. None stands for what the run did not count.

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
    images: int | None
    pixels: int | None
    gpu_seconds: float | None
    data_seconds: float | None
    evaluation_seconds: float | None
    imported_images: int
    is_finished: bool


def read_metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line that is being written just now is left out."""
    if not run_dir.metrics.is_file():
        return []
    text = run_dir.metrics.read_text(encoding="utf-8")
    whole, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{run_dir.metrics}: line {number} is not JSON ({error}). The file is damaged; a "
                f"resumed run mends it."
            ) from error
        if not isinstance(values, dict) or not {"phase", "step"} <= values.keys():
            raise ValueError(
                f"{run_dir.metrics}: line {number}: expected an object with phase and step, found "
                f"{line[:60]}. It is not written by bigdet; give the folder of a run."
            )
        lines.append(values)
    return lines


def read_outcome(run_dir: RunDir) -> Outcome | None:
    """Read where a run stands; None before its first evaluation."""
    return outcome_of(read_metrics(run_dir), run_dir.weights.is_file())


def outcome_of(lines: Sequence[Mapping[str, Any]], is_finished: bool) -> Outcome | None:
    """Return where a run stands; None before its first evaluation.

    Args:
        lines: of its ``metrics.jsonl``.
        is_finished: it has its final weights.
    """
    places = [place for place, line in enumerate(lines) if "bbox/AP" in line]
    if not places:
        return None
    last, until = lines[places[-1]], lines[: places[-1] + 1]
    seen: Mapping[str, Any] = next((line for line in reversed(until) if "seen/images" in line), {})
    values = {kind: last.get(f"{kind}/AP") for kind in KINDS}
    return Outcome(
        ap={kind: value for kind, value in values.items() if value is not None},
        images=seen.get("seen/images"),
        pixels=seen.get("seen/pixels"),
        gpu_seconds=seen.get("seen/gpu_seconds"),
        data_seconds=seen.get("cost/data_gpu_seconds"),
        evaluation_seconds=seen.get("cost/evaluation_gpu_seconds"),
        imported_images=last.get("imported/images", 0),
        is_finished=is_finished,
    )


def outcome_table(groups: Mapping[str, Sequence[Outcome | None]]) -> Table:
    """Return a table with a line for each group of runs that differ in nothing but their seed.

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
    rows = []
    for name, outcomes in groups.items():
        known = [outcome for outcome in outcomes if outcome is not None]
        rows.append([name, str(len(known)), *_cells(known, kinds), _state(outcomes)])
    return Table(header, rows)


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
    seconds = _mean([outcome.gpu_seconds for outcome in outcomes])
    waited = _mean([outcome.data_seconds for outcome in outcomes])
    imported = statistics.mean(outcome.imported_images for outcome in outcomes)
    return [
        *(
            spread([outcome.ap[kind] for outcome in outcomes if kind in outcome.ap])
            for kind in kinds
        ),
        amount(_mean([outcome.images for outcome in outcomes]), 1e6),
        amount(_mean([outcome.pixels for outcome in outcomes]), 1e12),
        amount(seconds, _HOUR),
        f"{waited / seconds:.0%}" if seconds and waited is not None else "",
        amount(_mean([outcome.evaluation_seconds for outcome in outcomes]), _HOUR),
        f"{imported / 1e6:.3g}" if imported else "",
    ]


def amount(value: float | None, unit: float) -> str:
    """Write a number in a unit with three digits; nothing where it is not known."""
    return "" if value is None else f"{value / unit:.3g}"


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where one of the values is not known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _state(outcomes: Sequence[Outcome | None]) -> str:
    finished = sum(outcome is not None and outcome.is_finished for outcome in outcomes)
    return "finished" if finished == len(outcomes) else f"{finished} of {len(outcomes)} finished"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
