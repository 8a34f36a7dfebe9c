"""What stands beside the AP of runs: what they are, took and ran on, and options that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import COUNTS, TIMES, Table, amount, unit_of


def run_table(groups: Groups) -> Table:
    """Return what the runs of each group are: the model, the phases and the validation data."""
    rows = []
    for name, members in groups.items():
        options = members[0].options
        phases = "\n".join(_phase_words(options, phase) for phase in members[0].phases)
        model = f"{options['model.detector']}, {options['model.backbone']}"
        rows.append([name, model, phases, str(options["data.val.shards"])])
    return Table(["run", "model", "phases", "measured on"], rows)


def _phase_words(options: Mapping[str, Any], phase: str) -> str:
    def of(key: str) -> Any:
        return options[f"phases.{phase}.{key}"]

    length = next(f"{of(unit):,} {unit}" for unit in ("steps", "passes", "images") if of(unit))
    batch = of("images_per_step") or f"{of('images_per_gpu')} per GPU"
    size = of("resize.size") or of("resize.sizes") or of("resize.size_range")
    return f"{phase}: {length}, {batch} images a step, {of('resize.kind')} {size}"


def cost_table(groups: Groups) -> Table:
    """Return what each phase of each run has taken."""
    found = [
        (run.name, phase, taken)
        for members in groups.values()
        for run in members
        for phase in run.phases
        if (taken := phase_costs(run, phase))
    ]
    pixels = unit_of([taken.get("pixels") for _, _, taken in found], COUNTS)
    device, times = time_parts([taken for _, _, taken in found])
    seconds, unit = unit_of([taken.get(key) for _, _, taken in found for key in times.values()],
                            TIMES)  # fmt: skip
    header = ["run", "phase", "steps", "images", "instances",
              f"pixels ({pixels[1]})" if pixels[1] else "pixels",
              *(f"{part} {device}-{unit}" for part in times), "energy (kWh)"]  # fmt: skip
    rows = [
        [name, phase,
         *(f"{taken[key]:,}" if key in taken else "" for key in ("steps", "images", "instances")),
         amount(taken.get("pixels"), pixels[0]),
         *(amount(taken.get(key), seconds) for key in times.values()),
         amount(taken.get("energy_joules"), 3.6e6)]
        for name, phase, taken in found
    ]  # fmt: skip
    return Table(header, rows).without_empty()


def time_parts(costs: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """Return ``CPU`` or ``GPU``, and the keys of the parts of the time by what people call them.

    Args:
        costs: of phases, see ``phase_costs``; CPU time is shown if all of them have counted it.
    """
    if costs and all("cpu_seconds" in taken for taken in costs):
        return "CPU", {"training": "cpu_seconds", "evaluation": "evaluation_cpu_seconds"}
    parts = {"compute": "compute", "data wait": "data", "evaluation": "evaluation"}
    return "GPU", {name: f"{part}_gpu_seconds" for name, part in parts.items()}


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


def environment_table(groups: Groups) -> tuple[str, Table]:
    """Return what the runs ran on: what is the same in all, and of each run what is not.

    Of a run that was started again, the last start counts.
    """
    runs = [run for members in groups.values() for run in members if run.starts]
    names = dict.fromkeys(name for run in runs for name in run.starts[-1] if name != "time")
    values = {name: [str(run.starts[-1].get(name, "")) for run in runs] for name in names}
    same = [f"{name} {each[0]}" for name, each in values.items() if len(set(each)) == 1]
    columns = {
        "run": [run.name for run in runs],
        "starts": [str(len(run.starts)) for run in runs],
        "last start": [_minute(str(run.starts[-1].get("time", ""))) for run in runs],
        **{name: each for name, each in values.items() if len(set(each)) > 1},
    }
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    words = f"{'; '.join(same)}." if same else ""
    if words and len(runs) > 1:
        words = f"The same in all: {words}"
    return words, Table(list(columns), rows).without_empty()


def _minute(time: str) -> str:
    """Return an ISO time in UTC as people write it."""
    return time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")
