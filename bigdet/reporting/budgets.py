"""Which group of runs is the best among those that trained for about the same time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigdet.reporting.compare import (
    TIMES_OF_TRAINING,
    ap_curve,
    final_values,
    measures_of,
    noise_band,
    noise_cells,
    pooled_deviation,
)
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import MEASURES, Table, amount, decimals_of

NEAR = 1.15
"""Times of training are one budget if each is at most so many times the next shorter one. Different
budgets differ by far more, and times that should be equal by less."""


@dataclass(frozen=True)
class Behind:
    """A group with a lower AP than the best one of its budget.

    Attributes:
        name: name of the group.
        ap: its last AP in [0, 1], mean over the runs.
        difference: the best group's AP minus this one, not negative.
        band: differences up to this are noise; None if no group has several seeds.
    """

    name: str
    ap: float
    difference: float
    band: float | None


@dataclass(frozen=True)
class Budget:
    """Groups whose runs took about the same time.

    Attributes:
        measure: a key of ``MEASURES``.
        time: ``CPU-hours`` or ``GPU-hours``.
        hours: the shortest and the longest of the groups.
        best: name of the group with the highest AP.
        ap: its last AP in [0, 1], mean over the runs.
        others: the other groups, best first.
    """

    measure: str
    time: str
    hours: tuple[float, float]
    best: str
    ap: float
    others: Sequence[Behind]


def equal_budgets(groups: Groups) -> list[Budget]:
    """Compare the finished runs of groups that trained for about the same time, shortest first."""
    groups = {
        name: [run for run in runs if run.run_dir.is_finished] for name, runs in groups.items()
    }
    found = []
    for measure in measures_of(groups):
        finals = {name: final_values(runs, measure) for name, runs in groups.items()}
        deviation = pooled_deviation(list(finals.values()))
        for time in TIMES_OF_TRAINING:
            hours = {
                name: curve[-1].costs[time]
                for name, runs in groups.items()
                if finals[name]  # empty where only an earlier phase has the measure
                and (curve := ap_curve(runs, measure))
                and time in curve[-1].costs
            }
            for names in alike(hours):
                means = {name: statistics.mean(finals[name]) for name in names}
                best, *others = sorted(names, key=means.__getitem__, reverse=True)
                bands = [noise_band(deviation, len(finals[best]), len(finals[n])) for n in others]
                behind = [
                    Behind(name, means[name], means[best] - means[name], band)
                    for name, band in zip(others, bands, strict=True)
                ]
                span = hours[names[0]], hours[names[-1]]
                found.append(Budget(measure, time, span, best, means[best], behind))
    return found


def alike(hours: Mapping[str, float]) -> list[list[str]]:
    """Return lists of two or more names with about the same hours, by rising hours."""
    sets: list[list[str]] = []
    for name in sorted(hours, key=hours.__getitem__):
        if not sets or hours[name] > NEAR * hours[sets[-1][-1]]:
            sets.append([])
        sets[-1].append(name)
    return [names for names in sets if len(names) > 1]


def budget_table(groups: Groups) -> Table:
    """Return ``equal_budgets`` as a table, one line for each group that is not the best."""
    rows = []
    for budget in equal_budgets(groups):
        decimals = decimals_of([budget.ap])
        for other in budget.others:
            best, ap = f"{100 * budget.ap:.{decimals}f}", f"{100 * other.ap:.{decimals}f}"
            difference = f"{100 * other.difference:+.{decimals}f}"
            noise = noise_cells(other.difference, other.band, decimals)
            first = [_hours(budget), MEASURES[budget.measure], budget.best, best]
            rows.append([*first, other.name, ap, difference, *noise])
    header = ["trained for", "measure", "best", "percent", "other", "its percent"]
    header += ["difference", "noise band", "the difference is"]
    return Table(header, rows).without_empty()


def budget_sentences(groups: Groups) -> list[str]:
    """Return a sentence for each budget: which group is the best, and by how much."""
    sentences = []
    for budget in equal_budgets(groups):
        decimals = decimals_of([budget.ap])
        verdicts = [
            noise_cells(other.difference, other.band, decimals)[1] for other in budget.others
        ]
        leads = ", ".join(
            f"{100 * other.difference:.{decimals}f} more than {other.name}"
            + (f" ({verdict})" if verdict else "")
            for other, verdict in zip(budget.others, verdicts, strict=True)
        )
        sentences.append(
            f"At {_hours(budget)}, {budget.best} has the highest {MEASURES[budget.measure]}: "
            f"{100 * budget.ap:.{decimals}f}, {leads}."
        )
    return sentences


def _hours(budget: Budget) -> str:
    least, most = (amount(each, 1.0) for each in budget.hours)
    return f"{least} {budget.time}" if least == most else f"{least} to {most} {budget.time}"
