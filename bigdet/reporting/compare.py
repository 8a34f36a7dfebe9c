"""Groups of runs compared: curves over seeds, differences and noise, cost at equal AP.

Letters in comments: n runs of a group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import MEASURES, Table, decimals_of

COSTS = {
    "CPU-hours": ("cost/cpu_seconds", 3600.0),
    "GPU-hours": ("seen/gpu_seconds", 3600.0),
    "images": ("seen/images", 1.0),
    "instances": ("seen/instances", 1.0),
    "pixels": ("seen/pixels", 1.0),
}
"""Costs that AP is compared by, besides steps: key in ``metrics.jsonl``, and unit. For imported
weights the key begins with ``imported/`` instead. A run that counted its CPU time, because it
trained on CPUs, has CPU-hours instead of GPU-hours."""
TIMES_OF_TRAINING = ("CPU-hours", "GPU-hours")
"""The costs that are times; a run has one of them."""


@dataclass(frozen=True)
class Point:
    """One evaluation of all runs of a group.

    Attributes:
        phase: phase of the evaluation.
        step: finished steps of that phase.
        total_step: finished steps of all phases.
        mean: AP in [0, 1], mean over the runs.
        deviation: standard deviation over the runs; None for one run.
        costs: costs so far by the names of ``COSTS``, means over the runs; without those that were
            not counted.
        imported: stated costs of imported weights, in the same form; empty without such weights.
    """

    phase: str
    step: int
    total_step: int
    mean: float
    deviation: float | None
    costs: Mapping[str, float]
    imported: Mapping[str, float]

    def cost(self, name: str, with_imports: bool) -> float | None:
        """Return one of the costs; None if it, or that of imported weights, is not known.

        Args:
            name: a key of ``COSTS``.
            with_imports: add the stated cost of imported weights.
        """
        if name not in self.costs or (with_imports and self.imported and name not in self.imported):
            return None
        return self.costs[name] + (self.imported.get(name, 0.0) if with_imports else 0.0)


def ap_curve(runs: Sequence[Run], measure: str) -> list[Point]:
    """Return the evaluations that all runs of a group have.

    Args:
        runs: the group; runs without evaluations are left out.
        measure: a key of ``MEASURES``.
    """
    found = [each for each in (_evaluations(run, measure) for run in runs) if each]
    if not found:
        return []
    points = []
    for place, (total_step, _, _, _) in found[0].items():
        if not all(place in each for each in found):
            continue
        values = [each[place][1] for each in found]
        points.append(
            Point(
                *place,
                total_step=total_step,
                mean=statistics.mean(values),
                deviation=statistics.stdev(values) if len(values) > 1 else None,
                costs=_mean_costs([each[place][2] for each in found]),
                imported=_mean_costs([each[place][3] for each in found]),
            )
        )
    return points


_Evaluation = tuple[int, float, dict[str, float], dict[str, float]]
"""Total step, AP, costs and imported costs."""


def _evaluations(run: Run, measure: str) -> dict[tuple[str, int], _Evaluation]:
    """Return every evaluation on the set of the last one, by phase and step."""
    found = {}
    seen: dict[str, float] = {}
    for line in run.lines:
        seen |= _costs_in(line)  # older versions wrote none at evaluations: those of the last step
        if (ap := line.get(measure)) is not None and run.is_compared(line["phase"]):
            place = line["phase"], line["step"]
            found[place] = run.total_step(line), ap, dict(seen), _imports_in(line)
    return found


def _costs_in(line: Mapping[str, Any]) -> dict[str, float]:
    found = {name: line[key] / unit for name, (key, unit) in COSTS.items() if line.get(key)}
    if "CPU-hours" in found:
        found.pop("GPU-hours", None)
    return found


def _imports_in(line: Mapping[str, Any]) -> dict[str, float]:
    keys = {name: f"imported/{key.partition('/')[2]}" for name, (key, _) in COSTS.items()}
    return {name: line[key] / COSTS[name][1] for name, key in keys.items() if line.get(key)}


def _mean_costs(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: statistics.mean(cost[name] for cost in costs)
        for name in COSTS
        if all(name in cost for cost in costs)
    }


def measures_of(groups: Groups) -> list[str]:
    """Return the measures that runs have; AP50 only if the metric of some run is VOC's."""
    runs = [run for members in groups.values() for run in members]
    with_ap50 = any(run.options["evaluation.metric"] != "coco" for run in runs)
    return [
        measure
        for measure in MEASURES
        if any(
            line.get(measure) is not None and run.is_compared(line["phase"])
            for run in runs
            for line in run.lines
        )
        and (with_ap50 or measure != "bbox/AP50")
    ]


def final_values(runs: Sequence[Run], measure: str) -> list[float]:
    """Return the AP of the last evaluation of each run that has one, in [0, 1]."""
    outcomes = [run.outcome for run in runs]
    return [outcome.ap[measure] for outcome in outcomes if outcome and measure in outcome.ap]


def pooled_deviation(values: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation within the groups of two or more values; None without any."""
    several = [each for each in values if len(each) > 1]
    if not several:
        return None
    squares = sum((len(each) - 1) * statistics.variance(each) for each in several)
    return math.sqrt(squares / sum(len(each) - 1 for each in several))


def noise_band(deviation: float | None, num_own: int, num_other: int) -> float | None:
    """Return two standard errors of the difference of two means; None without a deviation."""
    if deviation is None:
        return None
    return 2 * deviation * math.sqrt(1 / num_own + 1 / num_other)


def noise_cells(difference: float, band: float | None, decimals: int) -> tuple[str, str]:
    """Return the noise band in percent, and whether a difference is larger, as cells."""
    if band is None:
        return "not known: one seed", ""
    verdict = "more than noise" if abs(difference) > band else "within noise"
    return f"+-{100 * band:.{decimals}f}", verdict


def difference_table(groups: Groups) -> Table:
    """Compare the last AP of each group with that of the first, in percentage points."""
    first = next(iter(groups))
    rows = []
    for measure in measures_of(groups):
        finals = {name: final_values(runs, measure) for name, runs in groups.items()}
        deviation = pooled_deviation(list(finals.values()))
        decimals = decimals_of([value for values in finals.values() for value in values])
        for name, values in finals.items():
            if name == first or not values or not finals[first]:
                continue
            difference = statistics.mean(values) - statistics.mean(finals[first])
            band = noise_band(deviation, len(values), len(finals[first]))
            ap = f"{100 * statistics.mean(values):.{decimals}f}"
            minus = f"{100 * difference:+.{decimals}f}"
            noise = noise_cells(difference, band, decimals)
            rows.append([name, MEASURES[measure], ap, minus, *noise])
    header = ["run", "measure", "percent", f"minus {first}", "noise band", "the difference is"]
    return Table(header, rows).without_empty()


@dataclass(frozen=True)
class Reached:
    """Where a group first reached the last AP of another group.

    Attributes:
        name: name of the group.
        other: name of the other group.
        goal: the AP in words.
        point: the evaluation; None if it never reached that AP.
        steps: its steps as a fraction of the other's.
        parts: its costs as fractions of the other's, by the names of ``COSTS``.
        parts_with_imports: the same with the stated costs of imported weights on both sides; empty
            if neither has any.
    """

    name: str
    other: str
    goal: str
    point: Point | None
    steps: float
    parts: Mapping[str, float]
    parts_with_imports: Mapping[str, float]


def equal_ap(groups: Groups) -> list[Reached]:
    """Compare the cost of each group when it first reached the last AP of each other group.

    Nothing is interpolated: the first evaluation that reaches it counts.
    """
    found = []
    for measure in measures_of(groups):
        curves = {name: ap_curve(runs, measure) for name, runs in groups.items()}
        # Empty where only an earlier phase has the measure: the end of that curve is not the last.
        finals = {name: final_values(runs, measure) for name, runs in groups.items()}
        decimals = decimals_of([curve[-1].mean for curve in curves.values() if curve])
        for name, curve in curves.items():
            for other, goal in curves.items():
                if name == other or not goal or not curve or not finals[other]:
                    continue
                end = goal[-1]
                words = f"{other}'s {100 * end.mean:.{decimals}f} {MEASURES[measure]}"
                point = next((point for point in curve if point.mean >= end.mean), None)
                if point is None:
                    found.append(Reached(name, other, words, None, 0.0, {}, {}))
                    continue
                has_imports = bool(point.imported or end.imported)
                steps = point.total_step / end.total_step
                parts = _parts(point, end, with_imports=False)
                imports = _parts(point, end, with_imports=True) if has_imports else {}
                found.append(Reached(name, other, words, point, steps, parts, imports))
    return found


def _parts(point: Point, end: Point, with_imports: bool) -> dict[str, float]:
    """Return the costs of one evaluation as fractions of those of another."""
    costs = {name: (point.cost(name, with_imports), end.cost(name, with_imports)) for name in COSTS}
    return {name: own / whole for name, (own, whole) in costs.items() if own is not None and whole}


def equal_ap_table(groups: Groups) -> Table:
    """Return ``equal_ap`` as a table, with one line per group for all that it never reached."""
    rows, missed = [], dict[str, list[str]]()
    for one in equal_ap(groups):
        if one.point is None:
            missed.setdefault(one.name, []).append(one.goal)
            continue
        cells = [f"{one.steps:.2f}"]
        for name in COSTS:
            cells += [
                f"{parts[name]:.2f}" if name in parts else ""
                for parts in (one.parts, one.parts_with_imports)
            ]
        rows.append([one.name, one.goal, f"{one.point.phase} {one.point.step}", *cells])
    costs = [header for name in COSTS for header in (name, f"{name} with imports")]
    header = ["run", "reaches", "at", "steps", *costs]
    width = len(header) - 3
    rows += [
        [name, ", ".join(goals), "not reached", *[""] * width] for name, goals in missed.items()
    ]
    return Table(header, rows).without_empty()


def equal_ap_sentences(groups: Groups) -> list[str]:
    """Return the lines of ``equal_ap`` with the first group as sentences, if the cost is lower."""
    first = next(iter(groups))
    sentences = []
    for one in equal_ap(groups):
        time = next((name for name in TIMES_OF_TRAINING if name in one.parts), "")
        own, whole = one.parts.get(time), one.parts_with_imports.get(time)
        if own is None or first not in (one.name, one.other) or min(own, whole or own) >= 1:
            continue
        imports = "" if whole is None else f" ({whole:.2f} with the cost of imported weights)"
        sentences.append(f"{one.name} reaches {one.goal} at {own:.2f} of its {time}{imports}.")
    return sentences
