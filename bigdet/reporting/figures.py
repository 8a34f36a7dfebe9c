"""Figures of a report: data and layout for plotly.js, as plain dicts; the page adds the colors.

A trace has ``group``, the number of its group of runs, from which its color follows; ``role`` says
what it is: ``line``, ``band`` (around a line, pale), ``bar`` or ``table`` (a heat map).
Numbers that are not finite become null: JSON has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.reporting.compare import COSTS, Point, ap_curve, kinds_of, phase_costs
from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import KINDS

MAX_POINTS = 1000
"""Points of a curve; of longer ones, neighbors are averaged."""

Trace = dict[str, Any]
Layout = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One view of a figure.

    Attributes:
        label: what a reader chooses it by.
        traces: for plotly.
        layout: for plotly, but for colors and margins.
    """

    label: str
    traces: list[Trace]
    layout: Layout


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        key: another one for each figure of a page; letters, digits and dashes.
        title: above it.
        note: a sentence below it, or nothing.
        choices: its views; the first is shown first. None of them has no trace.
        height: pixels.
    """

    key: str
    title: str
    note: str
    choices: list[Choice]
    height: int = 300

    def to_json(self) -> dict[str, Any]:
        """Return it as the page's script reads it."""
        choices = [
            {"label": choice.label, "traces": _finite(choice.traces), "layout": choice.layout}
            for choice in self.choices
        ]
        return {"key": self.key, "height": self.height, "choices": choices}


def curve_figures(groups: Groups) -> list[Figure]:
    """Return AP against all that it costs, for each kind that was measured."""
    figures = []
    for kind in kinds_of(groups):
        curves = {name: ap_curve(runs, kind) for name, runs in groups.items()}
        measures: dict[str, Callable[[Point], float | None]] = {
            "steps": lambda point: point.total_step,
            **{name: _cost_of(name) for name in COSTS},
        }
        choices = []
        for label, measure in measures.items():
            traces = [
                trace
                for number, (name, points) in enumerate(curves.items())
                for trace in _ap_traces(number, name, points, measure)
            ]
            if traces:
                layout = _axes(label, "AP (%)")
                layout["yaxis"]["rangemode"] = "tozero"
                choices.append(Choice(label, traces, layout))
        if choices:
            note = "The band is one standard deviation over seeds." if any(
                point.deviation is not None for points in curves.values() for point in points
            ) else ""  # fmt: skip
            title = f"{KINDS[kind].capitalize()} AP"
            figures.append(Figure(f"ap-{kind}", title, note, choices, 380))
    return figures


def _cost_of(name: str) -> Callable[[Point], float | None]:
    return lambda point: point.costs.get(name)


def _ap_traces(
    number: int, name: str, points: Sequence[Point], measure: Callable[[Point], float | None]
) -> list[Trace]:
    """Return the line of a group, and the band around it where it has several seeds."""
    known = [(x, point) for point in points if (x := measure(point)) is not None]
    if not known:
        return []
    places = [x for x, _ in known]
    line = _line(number, name, places, [100 * point.mean for _, point in known])
    line |= {
        "mode": "lines+markers",
        "text": [f"{point.phase} {point.step}" for _, point in known],
        "hovertemplate": "%{y:.2f} at %{x:,.4~g}, %{text}<extra>%{fullData.name}</extra>",
    }
    if any(point.deviation is None for _, point in known):
        return [line]
    low = [100 * (point.mean - (point.deviation or 0)) for _, point in known]
    high = [100 * (point.mean + (point.deviation or 0)) for _, point in known]
    band = {
        "type": "scatter", "role": "band", "group": number, "name": name, "mode": "lines",
        "x": [*places, *reversed(places)], "y": [*high, *reversed(low)], "fill": "toself",
        "hoverinfo": "skip",
    }  # fmt: skip
    return [band, line]


def training_figures(groups: Groups) -> list[Figure]:
    """Return losses, learning rate, speed and memory against steps."""
    keys = dict.fromkeys(
        key for runs in groups.values() for run in runs for line in run.lines for key in line
    )
    wanted = {key: key.removeprefix("loss/").replace("_", " ") for key in keys
              if key.startswith("loss/")}  # fmt: skip
    wanted = {"loss/total": "total", **wanted} if wanted else {}
    figures = [
        _training_figure(groups, f"Loss: {title}", "loss", _value_of(key), key)
        for key, title in wanted.items()
    ]
    figures += [
        _training_figure(groups, title, unit, measure, key)
        for title, unit, key, measure in (
            ("Learning rate", "lr", "lr", _value_of("lr")),
            ("Gradient norm", "L2 norm", "grad_norm", _value_of("grad_norm")),
            ("Throughput", "images/s", "images_per_second",
             _value_of("images_per_second")),
            ("Wait for data", "% of step", "time-data", _data_wait),
            ("Memory of a rank, highest", "GiB", "memory_gib",
             _value_of("memory_gib")),
        )
    ]  # fmt: skip
    return [figure for figure in figures if figure.choices]


def _value_of(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda line: line.get(key)


def _data_wait(line: Mapping[str, Any]) -> float | None:
    """Return the wait for data in percent of the step."""
    if not line.get("time/step_seconds"):
        return None
    return float(100 * line["time/data_seconds"] / line["time/step_seconds"])


def _training_figure(
    groups: Groups,
    title: str,
    unit: str,
    measure: Callable[[Mapping[str, Any]], float | None],
    key: str,
) -> Figure:
    traces = []
    for number, (name, runs) in enumerate(groups.items()):
        for run in runs:
            points = [
                (run.total_step(line), value, f"{line['phase']} {line['step']}")
                for line in run.lines
                if (value := measure(line)) is not None and math.isfinite(value)
            ]
            if not points:
                continue
            points = thinned(points)
            label = run.name if len(runs) > 1 else name
            trace = _line(number, label, [x for x, _, _ in points], [y for _, y, _ in points])
            trace |= {
                "text": [place for _, _, place in points],
                "hovertemplate": "%{y:.4~g} at %{x:,}, %{text}<extra>%{fullData.name}</extra>",
            }
            traces.append(trace)
    choices = [Choice("", traces, _axes("steps", unit))] if traces else []
    return Figure(key.replace("/", "-"), title, "", choices)


def thinned(points: Sequence[tuple[int, float, str]]) -> list[tuple[int, float, str]]:
    """Average neighbors until at most ``MAX_POINTS`` are left; each takes the last place."""
    size = -(-len(points) // MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(each[-1][0], sum(y for _, y, _ in each) / len(each), each[-1][2]) for each in bins]


def cost_figures(groups: Groups) -> list[Figure]:
    """Return where the time of each run went."""
    runs = [run for members in groups.values() for run in members]
    counted = [run for run in runs if any(phase_costs(run, phase) for phase in run.phases)]
    if not counted:
        return []
    names = [run.name for run in counted]
    traces = []
    for part, key in (("compute", "compute_gpu_seconds"), ("data wait", "data_gpu_seconds"),
                      ("evaluation", "evaluation_gpu_seconds")):  # fmt: skip
        hours = [
            sum(phase_costs(run, phase).get(key, 0) for phase in run.phases) / 3600
            for run in counted
        ]
        traces.append(
            {"type": "bar", "role": "part", "orientation": "h", "name": part, "x": hours,
             "y": names, "hovertemplate": "%{x:.4~g} GPU-hours<extra>%{fullData.name}</extra>",
             "showlegend": True}
        )  # fmt: skip
    layout = _axes("GPU-hours", "") | {"barmode": "stack"}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    layout["legend"] = {
        "orientation": "h",
        "traceorder": "normal",
        "y": 1.02,
        "yanchor": "bottom",
        "x": 0,
    }
    layout["showlegend"] = True
    note = "Seconds times GPUs of all phases; a wait for data is time in which a GPU stands still."
    height = 130 + 26 * len(names)
    return [Figure("gpu-hours", "Where the time went", note, [Choice("", traces, layout)], height)]


def _line(number: int, name: str, x: Sequence[float], y: Sequence[float]) -> Trace:
    return {"type": "scatter", "role": "line", "mode": "lines", "group": number, "name": name,
            "x": list(x), "y": list(y)}  # fmt: skip


def _axes(x: str, y: str) -> Layout:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def first_runs(groups: Groups) -> Iterable[tuple[int, str, Run]]:
    """Yield number, name and first run with a stored evaluation of every group that has one."""
    for number, (name, runs) in enumerate(groups.items()):
        measured = [run for run in runs if run.evaluation.get("analysis")]
        if measured:
            yield number, name, measured[0]
