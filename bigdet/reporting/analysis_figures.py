"""Figures on errors and AP by class, size and overlap, from ``evaluation/analysis.py``.

Each shows the last evaluation of every group: means over its seeds, and whiskers of one standard
deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.evaluation.coco_metrics import KIND_NAMES
from bigdet.evaluation.detections import Kind
from bigdet.reporting.figures import Choice, Figure, Layout, Trace, axes
from bigdet.reporting.runs import Groups
from bigdet.reporting.seeds import Analysis, deviations, mean_analysis

MAX_CONFUSED = 30
"""The most classes in a confusion table; of more classes, the most often confused are shown."""

MAX_WRITTEN = 12
"""Up to this many classes a confusion table shows its numbers."""

_STYLES: dict[str, Trace] = {
    "line": {"type": "scatter", "mode": "lines+markers"},
    "bar": {"type": "bar", "textposition": "none"},
    "dots": {"type": "scatter", "mode": "markers"},
}


@dataclass(frozen=True)
class Measured:
    """The analyses of one kind of a group of runs.

    Attributes:
        number: place of the group in the report, for its color.
        name: name of the group.
        mean: mean over the seeds, see ``mean_analysis``.
        deviation: standard deviation over the seeds; None for one seed.
    """

    number: int
    name: str
    mean: Analysis
    deviation: Analysis | None

    def trace(self, role: str, hover: str, **values: Any) -> Trace:
        """Return a trace of this group; ``hover`` is shown next to the group's name."""
        values["hovertemplate"] = f"{hover}<extra>%{{fullData.name}}</extra>"
        return {"role": role, "group": self.number, "name": self.name, **_STYLES[role], **values}

    def whiskers(self, of: Callable[[Analysis], Iterable[float | None]]) -> dict[str, Any]:
        """Return the standard deviations in percent as plotly's error bars; empty for one seed."""
        if self.deviation is None:
            return {}
        up = [_percent(each) or 0.0 for each in of(self.deviation)]
        means = [_percent(each) or 0.0 for each in of(self.mean)]
        # Neither AP nor a gain is below 0.
        down = [min(pair) for pair in zip(up, means, strict=True)]
        return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


WIDE = ("classes", "confusion")
"""Ends of the keys of wide figures, which have a line for each class."""


def analysis_figures(groups: Groups) -> dict[Kind, list[Figure]]:
    """Return the figures by kind, without kinds for which no evaluation has an analysis."""
    found: dict[Kind, list[Figure]] = {}
    for kind in KIND_NAMES:
        measured = []
        for number, (name, runs) in enumerate(groups.items()):
            analyses = [run.evaluation.get("analysis", {}).get(kind) for run in runs]
            if known := [each for each in analyses if each is not None]:
                measured.append(Measured(number, name, mean_analysis(known), deviations(known)))
        if measured:
            makers = (_by_iou, _by_size, _errors, _calibration, _per_class, _confusion)
            figures = [make(kind, measured) for make in makers]
            found[kind] = [figure for figure in figures if figure.choices]
    return found


def _by_iou(kind: str, measured: Sequence[Measured]) -> Figure:
    def values(numbers: Analysis) -> list[float | None]:
        return list(numbers["by_iou"].values())

    traces = [
        one.trace(
            "line",
            "%{y:.1f} at %{x:.2f}",
            y=list(map(_percent, values(one.mean))),
            x=[float(iou) for iou in one.mean["by_iou"]],
            error_y=one.whiskers(values),
        )
        for one in measured
    ]
    overlap = "OKS" if kind == "keypoints" else "IoU"
    layout = axes(f"least {overlap} of a right detection", "AP (%)")
    layout["xaxis"] |= {"tick0": 0.5, "dtick": 0.1}
    layout["yaxis"] |= {"rangemode": "tozero"}
    return _figure(kind, "iou", "AP by overlap", "", traces, layout)


def _by_size(kind: str, measured: Sequence[Measured]) -> Figure:
    note = "Small: below 32 x 32 pixels, large: above 96 x 96. Hover for recall (AR)."
    sizes = measured[0].mean["by_size"]
    traces = [
        one.trace(
            "bar",
            "AP %{y:.1f}, %{text}",
            x=list(sizes),
            y=[_percent(each["AP"]) for each in one.mean["by_size"].values()],
            error_y=one.whiskers(
                lambda numbers: (each["AP"] for each in numbers["by_size"].values())
            ),
            text=[f"AR {_text(each['AR'])}" for each in one.mean["by_size"].values()],
        )
        for one in measured
    ]
    layout = axes("size, and number of objects", "AP (%)")
    layout["xaxis"] |= {
        "tickvals": list(sizes),
        "ticktext": [f"{name}<br>{each['objects']:,.0f}" for name, each in sizes.items()],
    }
    return _figure(kind, "size", "AP by size", note, traces, layout)


def _errors(kind: str, measured: Sequence[Measured]) -> Figure:
    note = "Gain in AP50 if all errors of a type were corrected (TIDE). Hover for their number."
    traces = [
        one.trace(
            "bar",
            "%{x:.1f}, %{text}",
            orientation="h",
            y=list(one.mean["errors"]["dAP"]),
            x=[_percent(gain) for gain in one.mean["errors"]["dAP"].values()],
            error_x=one.whiskers(lambda numbers: numbers["errors"]["dAP"].values()),
            text=[
                f"{one.mean['errors']['count'][each]:,.0f} errors"
                for each in one.mean["errors"]["dAP"]
            ],
        )
        for one in measured
    ]
    layout = axes("AP50 points", "")
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return _figure(kind, "errors", "Cost of errors", note, traces, layout)


def _calibration(kind: str, measured: Sequence[Measured]) -> Figure:
    note = (
        "How many of the detections with this score are right at IoU 0.5; on the dashed line the "
        "score is that probability."
    )
    traces: list[Trace] = []
    for one in measured:
        if (bins := one.mean["calibration"]) is None:
            continue
        columns = zip(bins["score"], bins["precision"], bins["count"], strict=True)
        filled = [row for row in columns if row[2]]
        if not filled:
            continue
        traces.append(
            one.trace(
                "line",
                "%{y:.1f}% right at score %{x:.2f}, %{text}",
                x=[score for score, _, _ in filled],
                y=[_percent(right) for _, right, _ in filled],
                text=[f"{count:,} detections" for _, _, count in filled],
            )
        )
    if traces:
        guide = {"type": "scatter", "role": "guide", "mode": "lines", "name": "calibrated"}
        traces.append({**guide, "x": [0, 1], "y": [0, 100], "hoverinfo": "skip"})
    layout = axes("score", "right (%)")
    layout["yaxis"] |= {"rangemode": "tozero"}
    return _figure(kind, "calibration", "Calibration of scores", note, traces, layout)


def _per_class(kind: str, measured: Sequence[Measured]) -> Figure:
    first = measured[0].mean["per_class"]
    classes = sorted(first, key=lambda name: first[name]["AP"] or 0.0)
    traces = [
        one.trace(
            "dots",
            "%{y}: AP %{x:.1f}, %{text}",
            y=classes,
            x=[_percent(one.mean["per_class"][each]["AP"]) for each in classes],
            error_x=one.whiskers(
                lambda numbers: (numbers["per_class"][each]["AP"] for each in classes)
            ),
            text=[
                f"{each['objects']:,.0f} objects, AP50 {_text(each['AP50'])}, "
                f"AR {_text(each['AR'])}"
                for each in (one.mean["per_class"][name] for name in classes)
            ],
        )
        for one in measured
    ]
    layout = axes("AP (%)", "")
    layout["yaxis"] |= {"type": "category", "dtick": 1, "range": [-0.5, len(classes) - 0.5]}
    # room between the names and dots at 0
    layout["yaxis"] |= {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
    layout["xaxis"] |= {"rangemode": "tozero"}
    height = max(300, 90 + 18 * len(classes))
    return _figure(kind, "classes", "AP by class", "", traces, layout, height)


def _confusion(kind: str, measured: Sequence[Measured]) -> Figure:
    choices = []
    for one in measured:
        pairs = one.mean["confusion"]["pairs"]
        if not pairs:
            continue
        classes = _most_confused(pairs, list(one.mean["per_class"]))
        counts: dict[tuple[str | None, str | None], int] = {
            (true, detected): count for true, detected, count in pairs
        }
        rows, columns = [*classes, None], [*classes, None]
        table = [[counts.get((true, detected), 0) for detected in columns] for true in rows]
        totals = [sum(count for (t, _), count in counts.items() if t == true) for true in rows]
        trace: Trace = {
            "type": "heatmap",
            "role": "table",
            "name": one.name,
            "x": [each or "(nothing)" for each in columns],
            "y": [each or "(nothing)" for each in rows],
            "z": [
                [100 * count / total if total else None for count in row]
                for row, total in zip(table, totals, strict=True)
            ],
            "text": table,
            "zmin": 0,
            "zmax": 100,
            "colorbar": {"ticksuffix": "%", "thickness": 10},
            "hovertemplate": "%{y} detected as %{x}: %{text} (%{z:.1f}%)<extra></extra>",
        }
        if len(classes) <= MAX_WRITTEN:
            trace["texttemplate"] = "%{z:.0f}"
        layout = axes("detected", "true")
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"type": "category", "showgrid": False}
        layout["yaxis"] |= {"dtick": 1, "autorange": "reversed"}
        choices.append(Choice(one.name, [trace], layout))
    score = measured[0].mean["confusion"]["min_score"]
    seeds = " All seeds together." if any(one.deviation is not None for one in measured) else ""
    note = (
        f"Each row, a true class, adds up to 100%. Scores from {score}, IoU 0.5. (nothing): an "
        f"object without detection, or a detection without object.{seeds}"
    )
    height = 340 if not choices else 190 + 22 * len(choices[0].traces[0]["y"])
    title = "Which class is detected as which"
    return Figure(f"{kind}-confusion", title, note, choices, max(340, height))


def _most_confused(pairs: Sequence[Sequence[Any]], classes: list[str]) -> list[str]:
    """Return the classes to show, in the given order."""
    wrong = dict.fromkeys(classes, 0)
    for true, detected, count in pairs:
        if true is not None and detected is not None and true != detected:
            wrong[true] += count
            wrong[detected] += count
    kept = set(sorted(classes, key=lambda name: -wrong[name])[:MAX_CONFUSED])
    return [name for name in classes if name in kept]


def _figure(
    kind: str,
    key: str,
    title: str,
    note: str,
    traces: list[Trace],
    layout: Layout,
    height: int = 300,
) -> Figure:
    choices = [Choice("", traces, layout)] if traces else []
    return Figure(f"{kind}-{key}", title, note, choices, height)


def _percent(number: float | None) -> float | None:
    return None if number is None else 100 * number


def _text(number: float | None) -> str:
    return "-" if number is None else f"{100 * number:.1f}"
