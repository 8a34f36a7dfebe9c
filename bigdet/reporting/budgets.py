"""Which group of runs is the best of those that took about the same time to train."""

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
    pooled_deviation,
)
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import MEASURES, Table, amount, decimals_of

NEAR = 1.15
"""Times of training count as one budget where each is at most so many times the next shorter one.
Budgets that are compared differ by far more, and what is meant to be equal by less."""


@dataclass(frozen=True)
class Behind:
    """A group that came to less than the best one of its budget.

    Attributes:
        name: of the group.
        ap: its last AP in [0, 1], mean over the runs.
        difference: of the best group's AP to it, not negative.
        band: within which a difference is noise; None where no group has several seeds.
    """

    name: str
    ap: float
    difference: float
    band: float | None


@dataclass(frozen=True)
class Budget:
    """Groups whose runs took about as long.

    Attributes:
        measure: of ``MEASURES``.
        time: ``CPU-hours`` or ``GPU-hours``.
        hours: the least and the most of the groups.
        best: name of the group with the highest AP.
        ap: its last AP in [0, 1], mean over the runs.
        others: best first.
    """

    measure: str
    time: str
    hours: tuple[float, float]
    best: str
    ap: float
    others: Sequence[Behind]


def equal_budgets(groups: Groups) -> list[Budget]:
    """Compare the finished runs of groups that trained for about as long, the shortest first."""
    groups = {name: [run for run in runs if run.run_dir.is_finished]
              for name, runs in groups.items()}  # fmt: skip
    found = []
    for measure in measures_of(groups):
        finals = {name: final_values(runs, measure) for name, runs in groups.items()}
        deviation = pooled_deviation(list(finals.values()))
        for time in TIMES_OF_TRAINING:
            hours = {
                name: curve[-1].costs[time]
                for name, runs in groups.items()
                if (curve := ap_curve(runs, measure)) and time in curve[-1].costs
            }
            for names in alike(hours):
                means = {name: statistics.mean(finals[name]) for name in names}
                best, *others = sorted(names, key=means.__getitem__, reverse=True)
                behind = [
                    Behind(name, means[name], means[best] - means[name],
                           None if deviation is None else
                           noise_band(deviation, len(finals[best]), len(finals[name])))
                    for name in others
                ]  # fmt: skip
                span = hours[names[0]], hours[names[-1]]
                found.append(Budget(measure, time, span, best, means[best], behind))
    return found


def alike(hours: Mapping[str, float]) -> list[list[str]]:
    """Return the names whose hours are alike, by rising hours; two or more in each list."""
    sets: list[list[str]] = []
    for name in sorted(hours, key=hours.__getitem__):
        if not sets or hours[name] > NEAR * hours[sets[-1][-1]]:
            sets.append([])
        sets[-1].append(name)
    return [names for names in sets if len(names) > 1]


def budget_table(groups: Groups) -> Table:
    """Return ``equal_budgets`` as a table, a line for each group behind the best of its budget."""
    rows = []
    for budget in equal_budgets(groups):
        decimals = decimals_of([budget.ap])
        for other in budget.others:
            band = "not known: one seed"
            if other.band is not None:
                band = f"+-{100 * other.band:.{decimals}f}"
            rows.append(
                [_hours(budget), MEASURES[budget.measure], budget.best,
                 f"{100 * budget.ap:.{decimals}f}", other.name, f"{100 * other.ap:.{decimals}f}",
                 f"{100 * other.difference:+.{decimals}f}", band, _verdict(other)]
            )  # fmt: skip
    header = ["trained for", "measure", "best", "percent", "other", "its percent", "difference",
              "noise band", "the difference is"]  # fmt: skip
    return Table(header, rows).without_empty()


def budget_sentences(groups: Groups) -> list[str]:
    """Say of each budget which group is the best, and by how much."""
    sentences = []
    for budget in equal_budgets(groups):
        decimals = decimals_of([budget.ap])
        leads = ", ".join(
            f"{100 * other.difference:.{decimals}f} more than {other.name}"
            + (f" ({_verdict(other)})" if other.band is not None else "")
            for other in budget.others
        )
        sentences.append(
            f"At {_hours(budget)}, {budget.best} has the highest {MEASURES[budget.measure]}: "
            f"{100 * budget.ap:.{decimals}f}, {leads}."
        )
    return sentences


def _hours(budget: Budget) -> str:
    least, most = (amount(each, 1.0) for each in budget.hours)
    return f"{least} {budget.time}" if least == most else f"{least} to {most} {budget.time}"


def _verdict(other: Behind) -> str:
    if other.band is None:
        return ""
    return "more than noise" if other.difference > other.band else "within noise"
