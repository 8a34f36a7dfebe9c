"""Figures of a report: data and layout for plotly.js, as plain dicts; the page adds the colors.

The color of a trace follows from ``group``, the number of its group of runs, and its style from
``role``: ``line``, ``band`` (around a line, pale), ``bar`` or ``table`` (a heat map).
Numbers that are not finite become null, as JSON has no such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigdet.reporting.compare import COSTS, Point, ap_curve, measures_of
from bigdet.reporting.facts import TIME_PARTS, device_of, phase_costs
from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import MEASURES, TIMES, unit_of

MAX_POINTS = 1000
"""The most points of a curve; in longer curves neighbors are averaged."""
AXES = {
    "steps": "optimizer steps, all phases",
    "CPU-hours": "CPU-hours of training, all ranks",
    "GPU-hours": "GPU-hours of training",
    "images": "training images seen",
    "instances": "training objects seen",
    "pixels": "training pixels seen",
}
"""Titles of axes by the names of ``COSTS``."""

NOTES = {
    "CPU": "CPU seconds of all ranks and phases, with loader threads and without loader processes "
    "(data.worker_kind).",
    "GPU": "Seconds times GPUs, all phases; during a wait for data the GPU is idle.",
}

Trace = dict[str, Any]
Layout = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One view of a figure.

    Attributes:
        label: entry in the menu of the figure.
        traces: of plotly.
        layout: of plotly, without colors and margins.
    """

    label: str
    traces: list[Trace]
    layout: Layout


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        key: unique on the page; letters, digits and dashes.
        title: heading.
        note: a sentence below it, or empty.
        choices: its views, each with one or more traces; the first is shown first.
        height: pixels.
    """

    key: str
    title: str
    note: str
    choices: list[Choice]
    height: int = 300

    def to_json(self) -> dict[str, Any]:
        """Return the figure for the script of the page."""
        choices = [
            {"label": choice.label, "traces": _finite(choice.traces), "layout": choice.layout}
            for choice in self.choices
        ]
        return {"key": self.key, "height": self.height, "choices": choices}


def curve_figures(groups: Groups) -> list[Figure]:
    """Return one figure per measure: AP over steps and over each cost."""
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
                title = f"{AXES[name]}, including imported weights"
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
            several = any(point.deviation is not None for point in points)
            note = "The band, or whisker, is one standard deviation over seeds." * several
            name = MEASURES[measure]
            key = measure.replace("/AP", "").lower()
            figures.append(Figure(f"ap-{key}", name[0].upper() + name[1:], note, choices, 380))
    return figures


def _cost_of(name: str, with_imports: bool) -> Callable[[Point], float | None]:
    return lambda point: point.cost(name, with_imports)


def _ap_traces(
    number: int, name: str, points: Sequence[Point], measure: Callable[[Point], float | None]
) -> list[Trace]:
    """Return the line of a group, with a band around it if it has several seeds."""
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
    band = _line(number, name, [*places, *reversed(places)], [*high, *reversed(low)])
    return [band | {"role": "band", "fill": "toself", "hoverinfo": "skip"}, line]


def training_figures(groups: Groups) -> list[Figure]:
    """Return losses, learning rate, speed and memory over steps."""
    keys = dict.fromkeys(
        key for runs in groups.values() for run in runs for line in run.lines for key in line
    )
    losses = sorted((key for key in keys if key.startswith("loss/")), key="loss/total".__ne__)
    wanted = {key: (f"Loss: {key[len('loss/') :].replace('_', ' ')}", "loss") for key in losses}
    wanted |= {
        "lr": ("Learning rate", "learning rate"),
        "grad_norm": ("Gradient norm", "L2 norm"),
        "images_per_second": ("Throughput of all ranks", "images/s"),
        "time-data": ("Wait for data", "% of step"),
        "memory_gib": ("Memory of the rank that uses most", "GiB"),
    }
    figures = [_training_figure(groups, key, *words) for key, words in wanted.items()]
    return [figure for figure in figures if figure.choices]


def _data_wait(line: Mapping[str, Any]) -> float | None:
    """Return the wait for data in percent of the step."""
    if not line.get("time/step_seconds"):
        return None
    return float(100 * line["time/data_seconds"] / line["time/step_seconds"])


def _training_figure(groups: Groups, key: str, title: str, unit: str) -> Figure:
    measure = _data_wait if key == "time-data" else lambda line: line.get(key)
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
    """Return names of phases and lines between them; nothing if the phases of runs differ."""
    runs = [run for members in groups.values() for run in members]
    phases = {tuple((phase, run.last_step(phase)) for phase in run.phases) for run in runs}
    if len(phases) > 1 or len(runs[0].phases) == 1:
        return {}
    lines, names, start = [], [], 0
    for phase, steps in phases.pop():
        place = {"x": start, "xref": "x", "yref": "paper"}
        anchor = {"y": 1, "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
        names.append({**place, **anchor, "text": phase})
        if start:
            ends = {"x0": start, "x1": start, "y0": 0, "y1": 1}
            lines.append({"type": "line", **ends, "xref": "x", "yref": "paper"})
        start += steps
    return {"shapes": lines, "annotations": names}


def thinned(points: Sequence[tuple[int, float, str]]) -> list[tuple[int, float, str]]:
    """Average neighbors until at most ``MAX_POINTS`` are left, each at its last step."""
    size = -(-len(points) // MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(each[-1][0], sum(y for _, y, _ in each) / len(each), each[-1][2]) for each in bins]


def cost_figures(groups: Groups) -> list[Figure]:
    """Return the parts of each run's time: a figure for runs on CPUs, and one for those on GPUs."""
    runs = [run for members in groups.values() for run in members]
    counted = [run for run in runs if any(phase_costs(run, phase) for phase in run.phases)]
    return [
        _cost_figure(device, own)
        for device in TIME_PARTS
        if (own := [run for run in counted if device_of(run) == device])
    ]


def _cost_figure(device: str, runs: Sequence[Run]) -> Figure:
    names = [run.name for run in runs]
    taken = [[phase_costs(run, phase) for phase in run.phases] for run in runs]
    parts = {
        name: [sum(cost.get(key, 0) for cost in costs) for costs in taken]
        for name, key in TIME_PARTS[device].items()
    }
    unit, word = unit_of([second for seconds in parts.values() for second in seconds], TIMES)
    style: Trace = {
        "type": "bar",
        "role": "part",
        "orientation": "h",
        "y": names,
        "hovertemplate": f"%{{x:.4~g}} {device}-{word}<extra>%{{fullData.name}}</extra>",
        "showlegend": True,
    }
    traces = [
        {**style, "name": name, "x": [second / unit for second in seconds]}
        for name, seconds in parts.items()
    ]
    layout = axes(f"{device}-{word}", "") | {"barmode": "stack"}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    layout["legend"] = {"orientation": "h", "traceorder": "normal"}
    layout["legend"] |= {"x": 0, "y": 1.02, "yanchor": "bottom"}
    layout["showlegend"] = True
    key, title = f"{device.lower()}-hours", f"Where the {device} time went"
    choices, height = [Choice("", traces, layout)], 130 + 26 * len(names)
    return Figure(key, title, NOTES[device], choices, height)


def _line(number: int, name: str, x: Sequence[float], y: Sequence[float]) -> Trace:
    style = {"type": "scatter", "role": "line", "mode": "lines"}
    return {**style, "group": number, "name": name, "x": list(x), "y": list(y)}


def axes(x: str, y: str) -> Layout:
    """Return a layout with these titles of the axes."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
