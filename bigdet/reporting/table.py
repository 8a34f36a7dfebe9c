"""Runs side by side: last AP and costs as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.run_dir import RunDir

MEASURES = {
    "bbox/AP": "box AP",
    "bbox/AP50": "box AP50",
    "segm/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
}
"""Measures by which runs are compared: key in ``metrics.jsonl``, and name."""
COUNTS = ((1e12, "10^12"), (1e9, "10^9"), (1e6, "million"), (1.0, ""))
TIMES = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Table:
    """A table of texts, for Markdown and HTML.

    Attributes:
        header: names of the columns.
        rows: each with one cell per column.
    """

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(map(_escaped, cells))} |\n" for cells in lines)

    def without_empty(self) -> Table:
        """Return the table without the columns in which all cells are empty."""
        kept = [place for place in range(len(self.header)) if any(row[place] for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table([self.header[place] for place in kept], rows)


@dataclass(frozen=True)
class Outcome:
    """Last AP of a run and its costs until then. None for costs that the run did not count.

    Attributes:
        ap: last evaluation by the keys of ``MEASURES``, in [0, 1].
        images: training images seen.
        pixels: pixels of them.
        gpu_seconds: seconds of training steps times GPUs.
        data_seconds: the part of them spent waiting for data.
        evaluation_seconds: seconds of evaluations times GPUs.
        imported_images: stated images of imported weights; 0 without such weights.
        is_finished: the run has its final weights, and all its numbers.
        cpu_seconds: CPU time of training steps, all ranks; only for runs on CPUs.
        evaluation_cpu_seconds: the same for evaluations.
    """

    ap: dict[str, float]
    images: int | None
    pixels: int | None
    gpu_seconds: float | None
    data_seconds: float | None
    evaluation_seconds: float | None
    imported_images: int
    is_finished: bool
    cpu_seconds: float | None = None
    evaluation_cpu_seconds: float | None = None


def read_metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, without an incomplete last line, which is being written."""
    if not run_dir.metrics.is_file():
        return []
    text = run_dir.metrics.read_text(encoding="utf-8")
    whole, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            values = json.loads(line, parse_constant=lambda _: None)  # NaN, of older runs
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{run_dir.metrics}: line {number} is not JSON ({error}). The file is damaged; "
                f"resuming the run repairs it."
            ) from error
        if not isinstance(values, dict) or not {"phase", "step"} <= values.keys():
            raise ValueError(
                f"{run_dir.metrics}: line {number}: expected an object with phase and step, found "
                f"{line[:60]}. It was not written by bigdet; give the folder of a run."
            )
        lines.append(values)
    return lines


def read_outcome(run_dir: RunDir) -> Outcome | None:
    """Read the outcome of a run; None before its first evaluation."""
    return outcome_of(read_metrics(run_dir), run_dir.is_finished)


def outcome_of(lines: Sequence[Mapping[str, Any]], is_finished: bool) -> Outcome | None:
    """Return the outcome of a run; None before its first evaluation.

    Args:
        lines: the lines of ``metrics.jsonl``.
        is_finished: the run has its final weights, and all its numbers.
    """
    places = [place for place, line in enumerate(lines) if "bbox/AP" in line]
    if not places:
        return None
    last, until = lines[places[-1]], lines[: places[-1] + 1]
    seen: Mapping[str, Any] = next((line for line in reversed(until) if "seen/images" in line), {})
    values = {measure: last.get(measure) for measure in MEASURES}
    return Outcome(
        ap={measure: value for measure, value in values.items() if value is not None},
        images=seen.get("seen/images"),
        pixels=seen.get("seen/pixels"),
        gpu_seconds=seen.get("seen/gpu_seconds"),
        data_seconds=seen.get("cost/data_gpu_seconds"),
        evaluation_seconds=seen.get("cost/evaluation_gpu_seconds"),
        imported_images=last.get("imported/images", 0),
        is_finished=is_finished,
        cpu_seconds=seen.get("cost/cpu_seconds"),
        evaluation_cpu_seconds=seen.get("cost/evaluation_cpu_seconds"),
    )


def outcome_table(groups: Mapping[str, Sequence[Outcome | None]]) -> Table:
    """Return a table with one line for each group of runs that differ only in their seed.

    AP is in percent: the mean over the runs, and their standard deviation if there are two or more.
    Costs are means, in the unit that suits the largest. Runs that are not finished count with their
    last evaluation, and the last column has their number.

    Args:
        groups: outcomes by the name of the group; None for a run without evaluation.
    """
    known = {name: [one for one in group if one is not None] for name, group in groups.items()}
    found = [outcome for outcomes in known.values() for outcome in outcomes]
    measures = [measure for measure in MEASURES if any(measure in one.ap for one in found)]

    def means(name: str) -> list[float | None]:
        return [_mean([getattr(one, name) for one in outcomes]) for outcomes in known.values()]

    def times(on_gpu: str, on_cpu: str) -> dict[str, list[float | None]]:
        cpu = means(on_cpu)
        gpu = [one if own is None else None for one, own in zip(means(on_gpu), cpu, strict=True)]
        return {"CPU": cpu, "GPU": gpu}

    trained, waited = means("gpu_seconds"), means("data_seconds")
    training = times("gpu_seconds", "cpu_seconds")
    evaluating = times("evaluation_seconds", "evaluation_cpu_seconds")
    seconds = [each for device in ("CPU", "GPU") for each in training[device] + evaluating[device]]
    time_unit = unit_of(seconds, TIMES)
    columns = {
        "run": list(known),
        "seeds": [str(len(outcomes)) for outcomes in known.values()],
        **{
            MEASURES[measure]: _ap_column(
                [one.ap[measure] for one in outcomes if measure in one.ap]
                for outcomes in known.values()
            )
            for measure in measures
        },
        **_counts("images", means("images")),
        **_counts("pixels", means("pixels")),
        **{
            f"{device}-{time_unit[1]}": [amount(each, time_unit[0]) for each in values]
            for device, values in training.items()
        },
        "data wait": [
            f"{wait / whole:.0%}" if whole and wait is not None else ""
            for whole, wait in zip(trained, waited, strict=True)
        ],
        **{
            f"evaluation {device}-{time_unit[1]}": [amount(each, time_unit[0]) for each in values]
            for device, values in evaluating.items()
        },
        **_counts("imported images", [each or None for each in means("imported_images")]),
        "state": [_state(outcomes) for outcomes in groups.values()],
    }
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    return Table(list(columns), rows).without_empty()


def _ap_column(groups: Iterable[Sequence[float]]) -> list[str]:
    aps = list(groups)
    decimals = decimals_of([value for values in aps for value in values])
    return [spread(values, decimals) for values in aps]


def decimals_of(values: Sequence[float]) -> int:
    """Return the number of decimals for values in [0, 1] in percent, by the largest."""
    largest = max(values, default=1.0)
    return 1 if largest >= 0.05 else 2 if largest >= 0.005 else 3


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """Format values in [0, 1] as percent: ``40.1``, or ``40.1 +- 0.2`` (standard deviation)."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {100 * statistics.stdev(values):.{decimals}f}"


def unit_of(
    values: Sequence[float | None], units: Sequence[tuple[float, str]]
) -> tuple[float, str]:
    """Return the unit that suits the largest value: the first that it reaches, or the last.

    Args:
        values: None is ignored.
        units: ``COUNTS`` or ``TIMES``.
    """
    largest = max((value for value in values if value is not None), default=0)
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def amount(value: float | None, unit: float) -> str:
    """Format a number in a unit with three digits; empty for None."""
    if value is None:
        return ""
    number = value / unit
    if 0 < number < 0.001:
        return "<0.001"
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def _counts(name: str, values: Sequence[float | None]) -> dict[str, list[str]]:
    """Return a column of counts, by its header with the unit."""
    unit, word = unit_of(values, COUNTS)
    header = f"{name} ({word})" if word else name
    return {header: [amount(value, unit) for value in values]}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one of the values is None."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _state(outcomes: Sequence[Outcome | None]) -> str:
    finished = sum(outcome is not None and outcome.is_finished for outcome in outcomes)
    return "finished" if finished == len(outcomes) else f"{finished} of {len(outcomes)} finished"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", "; ")
