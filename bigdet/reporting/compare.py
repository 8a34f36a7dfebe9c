"""Groups of runs against each other: differences and noise, cost at equal AP, options, costs.

Letters in comments: n runs of a group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import KINDS, Table, amount

COSTS = {
    "GPU-hours": ("seen/gpu_seconds", 3600.0),
    "images": ("seen/images", 1.0),
    "instances": ("seen/instances", 1.0),
    "pixels": ("seen/pixels", 1.0),
}
"""What AP is held against beside steps: its key in ``metrics.jsonl`` and its unit."""


@dataclass(frozen=True)
class Point:
    """One evaluation of all runs of a group.

    Attributes:
        phase: of the evaluation.
        step: of the phase.
        total_step: over all phases.
        mean: AP in [0, 1], mean over the runs.
        deviation: standard deviation over the runs; None of one run.
        costs: up to here by the names of ``COSTS``, mean over the runs; without what was not
            counted.
    """

    phase: str
    step: int
    total_step: int
    mean: float
    deviation: float | None
    costs: Mapping[str, float]


def ap_curve(runs: Sequence[Run], kind: str) -> list[Point]:
    """Return the evaluations that all runs of a group have made.

    Args:
        runs: of the group; those without any evaluation are left out.
        kind: ``bbox``, ``segm`` or ``keypoints``.
    """
    found = [each for each in (_evaluations(run, kind) for run in runs) if each]
    if not found:
        return []
    points = []
    for place, (total_step, _, _) in found[0].items():
        if not all(place in each for each in found):
            continue
        values = [each[place][1] for each in found]
        costs = [each[place][2] for each in found]
        points.append(
            Point(
                *place,
                total_step=total_step,
                mean=statistics.mean(values),
                deviation=statistics.stdev(values) if len(values) > 1 else None,
                costs={
                    name: statistics.mean(cost[name] for cost in costs)
                    for name in COSTS
                    if all(name in cost for cost in costs)
                },
            )
        )
    return points


def _evaluations(run: Run, kind: str) -> dict[tuple[str, int], tuple[int, float, dict[str, float]]]:
    """Return total step, AP and costs of every evaluation by phase and step."""
    found = {}
    seen: dict[str, float] = {}
    for line in run.lines:
        seen |= {
            name: line[key] / unit for name, (key, unit) in COSTS.items() if line.get(key)
        }  # evaluations of older runs did not have it: that of the last step counts
        if (ap := line.get(f"{kind}/AP")) is not None:
            found[(line["phase"], line["step"])] = (run.total_step(line), ap, dict(seen))
    return found


def kinds_of(groups: Groups) -> list[str]:
    """Return what was measured in any of the runs."""
    runs = [run for members in groups.values() for run in members]
    return [kind for kind in KINDS if any(line.get(f"{kind}/AP") is not None
                                          for run in runs for line in run.lines)]  # fmt: skip


def final_values(runs: Sequence[Run], kind: str) -> list[float]:
    """Return the AP of the last evaluation of each run that has one, in [0, 1]."""
    outcomes = [run.outcome for run in runs]
    return [outcome.ap[kind] for outcome in outcomes if outcome and kind in outcome.ap]


def pooled_deviation(values: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation within groups, over all that have two or more values."""
    several = [each for each in values if len(each) > 1]
    if not several:
        return None
    squares = sum((len(each) - 1) * statistics.variance(each) for each in several)
    return math.sqrt(squares / sum(len(each) - 1 for each in several))


def noise_band(deviation: float, num_own: int, num_other: int) -> float:
    """Return two standard errors of the difference of two means."""
    return 2 * deviation * math.sqrt(1 / num_own + 1 / num_other)


def difference_table(groups: Groups) -> Table:
    """Compare the last AP of each group with the first one's, in percent points."""
    first = next(iter(groups))
    rows = []
    for kind in kinds_of(groups):
        finals = {name: final_values(runs, kind) for name, runs in groups.items()}
        deviation = pooled_deviation(list(finals.values()))
        for name, values in finals.items():
            if name == first or not values or not finals[first]:
                continue
            difference = statistics.mean(values) - statistics.mean(finals[first])
            if deviation is None:
                band, verdict = "not known: one seed", ""
            else:
                width = noise_band(deviation, len(values), len(finals[first]))
                band = f"+-{100 * width:.1f}"
                verdict = "more than noise" if abs(difference) > width else "within noise"
            ap = f"{100 * statistics.mean(values):.1f}"
            rows.append([name, KINDS[kind], ap, f"{100 * difference:+.1f}", band, verdict])
    return Table(["run", "kind", "AP", f"minus {first}", "noise band", ""], rows)


def equal_ap_table(groups: Groups) -> Table:
    """Say at which part of another group's whole cost each group first reached its last AP.

    Nothing is interpolated: the first evaluation that shows as much counts.
    """
    kind = "bbox"
    curves = {name: ap_curve(runs, kind) for name, runs in groups.items()}
    rows = []
    for name, curve in curves.items():
        for other, goal in curves.items():
            if name == other or not goal or not curve:
                continue
            end = goal[-1]
            reached = next((point for point in curve if point.mean >= end.mean), None)
            ap = f"{100 * end.mean:.1f}"
            if reached is None:
                rows.append([name, f"{other}'s {ap}", "not reached", *[""] * (len(COSTS) + 1)])
                continue
            ratios = [
                f"{reached.costs[each] / end.costs[each]:.2f}"
                if each in reached.costs and end.costs.get(each) else ""
                for each in COSTS
            ]  # fmt: skip
            steps = f"{reached.total_step / end.total_step:.2f}"
            rows.append(
                [name, f"{other}'s {ap}", f"{reached.phase} {reached.step}", *ratios, steps]
            )
    return Table(["run", "reaches the box AP of", "at", *COSTS, "steps"], rows)


def equal_ap_sentences(groups: Groups) -> list[str]:
    """Return what ``equal_ap_table`` says as sentences, of those that cost less."""
    table = equal_ap_table(groups)
    column = table.header.index("GPU-hours")
    return [
        f"{row[0]} reaches {row[1]} box AP at {row[column]} of its GPU-hours."
        for row in table.rows
        if row[column] and float(row[column]) < 1
    ]


def cost_table(groups: Groups) -> Table:
    """Return what each phase of each run has taken."""
    columns: dict[str, tuple[str, float]] = {
        "steps": ("steps", 1),
        "images": ("images", 1),
        "instances": ("instances", 1),
        "pixels (10^9)": ("pixels", 1e9),
        "compute GPU-hours": ("compute_gpu_seconds", 3600),
        "data wait GPU-hours": ("data_gpu_seconds", 3600),
        "evaluation GPU-hours": ("evaluation_gpu_seconds", 3600),
        "energy (kWh)": ("energy_joules", 3.6e6),
    }
    rows = []
    for run in (run for members in groups.values() for run in members):
        for phase in run.phases:
            last = phase_costs(run, phase)
            if last:
                cells = [
                    f"{last[key]:,}" if unit == 1 and key in last else amount(last.get(key), unit)
                    for key, unit in columns.values()
                ]
                rows.append([run.name, phase, *cells])
    return Table(["run", "phase", *columns], rows)


def phase_costs(run: Run, phase: str) -> dict[str, Any]:
    """Return what a phase has taken, by the names of ``phase_cost/``; empty if not counted."""
    lines = [line for line in run.lines if line["phase"] == phase]
    known = [line for line in lines if "phase_cost/steps" in line]
    if not known:
        return {}
    return {
        key.removeprefix("phase_cost/"): value
        for key, value in known[-1].items()
        if key.startswith("phase_cost/")
    }


def option_table(groups: Groups) -> Table:
    """Return the options in which the groups differ; a group's own differences between commas."""
    runs = [run for members in groups.values() for run in members]
    keys = dict.fromkeys(key for run in runs for key in run.options if key != "output")
    rows = []
    for key in keys:
        cells = [
            ", ".join(dict.fromkeys(_option(run.options, key) for run in members))
            for members in groups.values()
        ]
        if len(set(cells)) > 1 or any(
            len({_option(run.options, key) for run in members}) > 1 for members in groups.values()
        ):
            rows.append([key, *cells])
    return Table(["option", *groups], rows)


def _option(options: Mapping[str, Any], key: str) -> str:
    if key not in options:
        return "-"
    value = options[key]
    return "null" if value is None else str(value)


def environment_table(groups: Groups) -> Table:
    """Return what each run ran on; of a run that was started again, the last start."""
    runs = [run for members in groups.values() for run in members]
    names = dict.fromkeys(name for run in runs for start in run.starts for name in start)
    rows = [
        [run.name, str(len(run.starts)), *(str(run.starts[-1].get(name, "")) for name in names)]
        for run in runs
        if run.starts
    ]
    return Table(["run", "starts", *names], rows)
