"""Figures of a report: data and layout for plotly.js, as plain dicts; the page adds the colors.

A trace has ``group``, the number of its group of runs, from which its color follows; ``role`` says
what it is: ``line``, ``band`` (around a line, pale), ``bar`` or ``table`` (a heat map).
Numbers that are not finite become null: JSON has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.reporting.compare import COSTS, Point, ap_curve, measures_of
from bigdet.reporting.facts import phase_costs, time_parts
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import MEASURES, TIMES, unit_of

MAX_POINTS = 1000
"""Points of a curve; of longer ones, neighbors are averaged."""
AXES = {
    "steps": "optimizer steps, all phases",
    "CPU-hours": "CPU-hours of training, all ranks",
    "GPU-hours": "GPU-hours of training",
    "images": "training images seen",
    "instances": "training objects seen",
    "pixels": "training pixels seen",
}
"""What an axis with this measure of cost is called."""

GPU_NOTE = "Seconds times GPUs of all phases; a wait for data is time in which a GPU stands still."
CPU_NOTE = "CPU seconds of all ranks and phases; loader processes (data.workers) are not counted."

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
    for measure in measures_of(groups):
        curves = {name: ap_curve(runs, measure) for name, runs in groups.items()}
        places: dict[str, tuple[str, Callable[[Point], float | None]]] = {
            "steps": (AXES["steps"], lambda point: point.total_step)
        }
        points = [point for curve in curves.values() for point in curve]
        for name in COSTS:
            places[name] = AXES[name], _cost_of(name, with_imports=False)
            if any(name in point.imported for point in points):
                title = f"{AXES[name]}, and those of imported weights"
                places[f"{name} with imports"] = title, _cost_of(name, with_imports=True)
        choices = []
        for label, (title, place) in places.items():
            traces = [
                trace
                for number, (name, curve) in enumerate(curves.items())
                for trace in _ap_traces(number, name, curve, place)
            ]
            if traces:
                layout = axes(title, "AP (%)")
                layout["xaxis"]["rangemode"] = layout["yaxis"]["rangemode"] = "tozero"
                choices.append(Choice(label, traces, layout))
        if choices:
            note = "The band, or whisker, is one standard deviation over seeds." if any(
                point.deviation is not None for point in points
            ) else ""  # fmt: skip
            name = MEASURES[measure]
            key = measure.replace("/AP", "").lower()
            figures.append(Figure(f"ap-{key}", name[0].upper() + name[1:], note, choices, 380))
    return figures


def _cost_of(name: str, with_imports: bool) -> Callable[[Point], float | None]:
    return lambda point: point.cost(name, with_imports)


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
    if len(known) == 1:  # a band would have no width
        return [line | {"error_y": {"type": "data", "array": [100 * (known[0][1].deviation or 0)]}}]
    low = [100 * max(0.0, point.mean - (point.deviation or 0)) for _, point in known]
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
            ("Learning rate", "learning rate", "lr", _value_of("lr")),
            ("Gradient norm", "L2 norm", "grad_norm", _value_of("grad_norm")),
            ("Throughput of all ranks", "images/s", "images_per_second",
             _value_of("images_per_second")),
            ("Wait for data", "% of step", "time-data", _data_wait),
            ("Memory of the fullest rank", "GiB", "memory_gib", _value_of("memory_gib")),
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
    layout = axes(AXES["steps"], unit) | _phase_ends(groups)
    choices = [Choice("", traces, layout)] if traces else []
    return Figure(key.replace("/", "-"), title, "", choices)


def _phase_ends(groups: Groups) -> Layout:
    """Return names of phases and lines between them; nothing where runs differ in them."""
    runs = [run for members in groups.values() for run in members]
    phases = {tuple((phase, run.last_step(phase)) for phase in run.phases) for run in runs}
    if len(phases) > 1 or len(runs[0].phases) == 1:
        return {}
    lines, names, start = [], [], 0
    for phase, steps in phases.pop():
        place = {"x": start, "xref": "x", "yref": "paper"}
        names.append({**place, "y": 1, "text": phase, "showarrow": False, "xanchor": "left",
                      "yanchor": "bottom"})  # fmt: skip
        if start:
            lines.append({"type": "line", "x0": start, "x1": start, "y0": 0, "y1": 1,
                          "xref": "x", "yref": "paper"})  # fmt: skip
        start += steps
    return {"shapes": lines, "annotations": names}


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
    taken = [[phase_costs(run, phase) for phase in run.phases] for run in counted]
    device, keys = time_parts([cost for costs in taken for cost in costs if cost])
    parts = {
        name: [sum(cost.get(key, 0) for cost in costs) for costs in taken]
        for name, key in keys.items()
    }
    unit, word = unit_of([second for seconds in parts.values() for second in seconds], TIMES)
    traces: list[Trace] = [
        {"type": "bar", "role": "part", "orientation": "h", "name": name, "y": names,
         "x": [second / unit for second in seconds],
         "hovertemplate": f"%{{x:.4~g}} {device}-{word}<extra>%{{fullData.name}}</extra>",
         "showlegend": True}
        for name, seconds in parts.items()
    ]  # fmt: skip
    layout = axes(f"{device}-{word}", "") | {"barmode": "stack"}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    layout["legend"] = {
        "orientation": "h",
        "traceorder": "normal",
        "y": 1.02,
        "yanchor": "bottom",
        "x": 0,
    }
    layout["showlegend"] = True
    note = CPU_NOTE if device == "CPU" else GPU_NOTE
    height = 130 + 26 * len(names)
    return [Figure("gpu-hours", "Where the time went", note, [Choice("", traces, layout)], height)]


def _line(number: int, name: str, x: Sequence[float], y: Sequence[float]) -> Trace:
    return {"type": "scatter", "role": "line", "mode": "lines", "group": number, "name": name,
            "x": list(x), "y": list(y)}  # fmt: skip


def axes(x: str, y: str) -> Layout:
    """Return a layout whose axes have these titles."""
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
