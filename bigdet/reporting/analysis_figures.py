"""Figures of what keeps the AP down, from the numbers of ``evaluation/analysis.py``.

Each shows the last evaluation of the first run of every group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bigdet.reporting.figures import Choice, Figure, Layout, Trace, first_runs
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import KINDS

MAX_CONFUSED = 30
"""Classes in a confusion table; of more, those most often taken for others are shown."""

Measured = Sequence[tuple[int, str, dict[str, Any]]]
"""Number and name of the groups, and their ``analysis`` of one kind."""


WIDE = ("classes", "confusion")
"""Ends of the keys of figures that need room: they have a line for each class."""


def analysis_figures(groups: Groups) -> dict[str, list[Figure]]:
    """Return the figures by kind; no kind for runs whose evaluations have no analysis."""
    found = {}
    for kind in KINDS:
        measured = [
            (number, name, run.evaluation["analysis"][kind])
            for number, name, run in first_runs(groups)
            if kind in run.evaluation["analysis"]
        ]
        if measured:
            figures = [make(kind, measured) for make in _FIGURES]
            found[kind] = [figure for figure in figures if figure.choices]
    return found


def _by_iou(kind: str, measured: Measured) -> Figure:
    traces = [
        {
            "type": "scatter", "role": "line", "mode": "lines+markers", "group": number,
            "name": name, "x": [float(iou) for iou in numbers["by_iou"]],
            "y": [_percent(ap) for ap in numbers["by_iou"].values()],
            "hovertemplate": "%{y:.1f} at IoU %{x:.2f}<extra>%{fullData.name}</extra>",
        }
        for number, name, numbers in measured
    ]  # fmt: skip
    layout = _axes("OKS" if kind == "keypoints" else "IoU", "AP (%)")
    return _figure(kind, "iou", "AP by overlap", "", traces, layout)


def _by_size(kind: str, measured: Measured) -> Figure:
    note = "Small: below 32 x 32 pixels, large: above 96 x 96. Hover: objects and recall (AR)."
    traces = []
    for number, name, numbers in measured:
        sizes = numbers["by_size"]
        traces.append(
            {"type": "bar", "role": "bar", "group": number, "name": name, "x": list(sizes),
             "y": [_percent(one["AP"]) for one in sizes.values()],
             "text": [f"{one['objects']:,} objects, AR {_text(one['AR'])}"
                      for one in sizes.values()],
             "hovertemplate": "AP %{y:.1f}, %{text}<extra>%{fullData.name}</extra>",
             "textposition": "none"}
        )  # fmt: skip
    return _figure(kind, "size", "AP by size", note, traces, _axes("", "AP (%)"))


def _errors(kind: str, measured: Measured) -> Figure:
    note = "What AP50 would gain if all errors of a type were mended (TIDE). Hover: how many."
    traces = []
    for number, name, numbers in measured:
        errors = numbers["errors"]
        traces.append(
            {"type": "bar", "role": "bar", "group": number, "name": name, "x": list(errors["dAP"]),
             "y": [_percent(gain) for gain in errors["dAP"].values()],
             "text": [f"{errors['count'][each]:,} errors" for each in errors["dAP"]],
             "hovertemplate": "%{y:.1f}, %{text}<extra>%{fullData.name}</extra>",
             "textposition": "none"}
        )  # fmt: skip
    return _figure(kind, "errors", "What errors cost", note, traces, _axes("", "AP50 points"))


def _calibration(kind: str, measured: Measured) -> Figure:
    note = (
        "Of detections with such a score, how many are right at IoU 0.5; on the dashed line "
        "scores mean what they say."
    )
    traces: list[Trace] = []
    for number, name, numbers in measured:
        bins = numbers["calibration"]
        filled = [] if bins is None else [
            (score, right, count)
            for score, right, count in zip(
                bins["score"], bins["precision"], bins["count"], strict=True
            )
            if count
        ]  # fmt: skip
        if not filled:
            continue
        traces.append(
            {"type": "scatter", "role": "line", "mode": "lines+markers", "group": number,
             "name": name, "x": [score for score, _, _ in filled],
             "y": [_percent(right) for _, right, _ in filled],
             "text": [f"{count:,} detections" for _, _, count in filled],
             "hovertemplate": "%{y:.1f}% right at score %{x:.2f}, %{text}"
                              "<extra>%{fullData.name}</extra>"}
        )  # fmt: skip
    if traces:
        traces.append(
            {"type": "scatter", "role": "guide", "mode": "lines", "name": "calibrated",
             "x": [0, 1], "y": [0, 100], "hoverinfo": "skip"}
        )  # fmt: skip
    layout = _axes("score", "right (%)")
    return _figure(kind, "calibration", "Calibration of scores", note, traces, layout)


def _per_class(kind: str, measured: Measured) -> Figure:
    first = measured[0][2]["per_class"]
    classes = sorted(first, key=lambda name: first[name]["AP"] or 0.0)
    traces = [
        {
            "type": "scatter", "role": "dots", "mode": "markers", "group": number, "name": name,
            "x": [_percent(numbers["per_class"][each]["AP"]) for each in classes], "y": classes,
            "text": [
                f"{one['objects']:,} objects, AP50 {_text(one['AP50'])}, AR {_text(one['AR'])}"
                for one in (numbers["per_class"][each] for each in classes)
            ],
            "hovertemplate": "%{y}: AP %{x:.1f}, %{text}<extra>%{fullData.name}</extra>",
        }
        for number, name, numbers in measured
    ]  # fmt: skip
    layout = _axes("AP (%)", "")
    layout["yaxis"] |= {"type": "category", "dtick": 1, "range": [-0.5, len(classes) - 0.5]}
    layout["xaxis"] |= {"rangemode": "tozero"}
    height = max(300, 90 + 18 * len(classes))
    return _figure(kind, "classes", "AP by class", "", traces, layout, height)


def _confusion(kind: str, measured: Measured) -> Figure:
    choices = []
    for _, name, numbers in measured:
        pairs = numbers["confusion"]["pairs"]
        if not pairs:
            continue
        classes = _most_confused(pairs, list(numbers["per_class"]))
        counts: dict[tuple[str | None, str | None], int] = {
            (true, detected): count for true, detected, count in pairs
        }
        rows, columns = [*classes, None], [*classes, None]
        table = [[counts.get((true, detected), 0) for detected in columns] for true in rows]
        totals = [sum(count for (t, _), count in counts.items() if t == true) for true in rows]
        traces = [
            {"type": "heatmap", "role": "table", "name": name,
             "x": [each or "(nothing)" for each in columns],
             "y": [each or "(nothing)" for each in rows],
             "z": [[100 * count / total if total else None for count in row]
                   for row, total in zip(table, totals, strict=True)],
             "text": table, "zmin": 0, "zmax": 100, "colorbar": {"ticksuffix": "%",
                                                                 "thickness": 10},
             "hovertemplate": "%{y} taken for %{x}: %{text} (%{z:.1f}%)<extra></extra>"}
        ]  # fmt: skip
        layout = _axes("detected", "true")
        for axis in ("xaxis", "yaxis"):
            layout[axis] |= {"type": "category"}
        layout["yaxis"] |= {"dtick": 1, "autorange": "reversed"}
        choices.append(Choice(name, traces, layout))
    score = measured[0][2]["confusion"]["min_score"]
    note = (
        f"Each row, a true class, adds up to 100%. Scores from {score}, IoU 0.5. (nothing): not "
        f"detected, or nothing there."
    )
    height = 340 if not choices else 190 + 22 * len(choices[0].traces[0]["y"])
    title = "Which class is taken for which"
    return Figure(f"{kind}-confusion", title, note, choices, max(340, height))


def _most_confused(pairs: Sequence[Sequence[Any]], classes: list[str]) -> list[str]:
    """Return the classes to show, in the order in which they are given."""
    wrong = dict.fromkeys(classes, 0)
    for true, detected, count in pairs:
        if true is not None and detected is not None and true != detected:
            wrong[true] += count
            wrong[detected] += count
    kept = set(sorted(classes, key=lambda name: -wrong[name])[:MAX_CONFUSED])
    return [name for name in classes if name in kept]


_FIGURES: tuple[Callable[[str, Measured], Figure], ...] = (
    _by_iou, _by_size, _errors, _calibration, _per_class, _confusion,
)  # fmt: skip


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


def _axes(x: str, y: str) -> Layout:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _percent(number: float | None) -> float | None:
    return None if number is None else 100 * number


def _text(number: float | None) -> str:
    return "-" if number is None else f"{100 * number:.1f}"
