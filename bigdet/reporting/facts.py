"""Tables next to the AP of runs: model and phases, costs, environment, options that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigdet.reporting.runs import Groups, Run
from bigdet.reporting.table import (
    COUNTS,
    MEASURES,
    TIMES,
    Table,
    amount,
    outcome_of,
    spread,
    unit_of,
)

TIME_PARTS = {
    "CPU": {"training": "cpu_seconds", "evaluation": "evaluation_cpu_seconds"},
    "GPU": {
        "compute": "compute_gpu_seconds",
        "data wait": "data_gpu_seconds",
        "evaluation": "evaluation_gpu_seconds",
    },
}
"""The parts of the time that a run took, by `device_of` it: names, and keys of `phase_costs`."""


def run_table(groups: Groups) -> Table:
    """Return the model, the phases and the validation data of each group."""
    rows = []
    for name, members in groups.items():
        options = members[0].options
        phases = "\n".join(_phase_words(options, phase) for phase in members[0].phases)
        model = f"{options['model.detector']}, {options['model.backbone']}"
        sets = members[0].val_sets
        addresses = list(dict.fromkeys(sets.values()))
        if len(addresses) > 1:
            addresses = [f"{phase}: {address}" for phase, address in sets.items()]
        rows.append([name, model, phases, "\n".join(addresses)])
    return Table(["run", "model", "phases", "evaluated on"], rows)


def other_sets_table(groups: Groups) -> Table:
    """Return the last AP of the phases that were evaluated on other sets than the last phase."""
    rows = []
    for run in (run for members in groups.values() for run in members):
        for phase in run.phases:
            outcome = outcome_of([line for line in run.lines if line["phase"] == phase], True)
            if outcome is not None and not run.is_compared(phase):
                cells = [spread([outcome.ap[m]]) if m in outcome.ap else "" for m in MEASURES]
                rows.append([run.name, phase, run.val_sets[phase], *cells])
    return Table(["run", "phase", "evaluated on", *MEASURES.values()], rows).without_empty()


def _phase_words(options: Mapping[str, Any], phase: str) -> str:
    def of(key: str) -> Any:
        return options[f"phases.{phase}.{key}"]

    length = next(f"{of(unit):,} {unit}" for unit in ("steps", "passes", "images") if of(unit))
    batch = of("images_per_step") or f"{of('images_per_gpu')} per GPU"
    size = of("resize.size") or of("resize.sizes") or of("resize.size_range")
    return f"{phase}: {length}, {batch} images per step, {of('resize.kind')} {size}"


def cost_table(groups: Groups) -> Table:
    """Return the cost of each phase of each run."""
    found = [
        (run, phase, taken)
        for members in groups.values()
        for run in members
        for phase in run.phases
        if (taken := phase_costs(run, phase))
    ]
    pixels = unit_of([taken.get("pixels") for _, _, taken in found], COUNTS)
    times = {
        f"{part} {device}": [taken.get(key) if device_of(run) == device else None
                             for run, _, taken in found]
        for device, parts in TIME_PARTS.items()
        for part, key in parts.items()
    }  # fmt: skip
    size, unit = unit_of([each for seconds in times.values() for each in seconds], TIMES)
    counts = ["steps", "images", "instances"]
    rows = [
        [
            run.name,
            phase,
            *(f"{taken[key]:,}" if key in taken else "" for key in counts),
            amount(taken.get("pixels"), pixels[0]),
            *(amount(each, size) for each in seconds),
            amount(taken.get("energy_joules"), 3.6e6),
        ]
        for (run, phase, taken), *seconds in zip(found, *times.values(), strict=True)
    ]
    header = ["run", "phase", *counts, f"pixels ({pixels[1]})" if pixels[1] else "pixels"]
    header += [*(f"{name}-{unit}" for name in times), "energy (kWh)"]
    return Table(header, rows).without_empty()


def device_of(run: Run) -> str:
    """Return whose time a run is measured by: ``CPU`` if all its phases have counted that."""
    costs = [taken for phase in run.phases if (taken := phase_costs(run, phase))]
    return "CPU" if costs and all("cpu_seconds" in taken for taken in costs) else "GPU"


def phase_costs(run: Run, phase: str) -> dict[str, Any]:
    """Return the costs of a phase by the names of ``phase_cost/``; empty if not counted."""
    prefix = "phase_cost/"
    lines = [line for line in run.lines if line["phase"] == phase and f"{prefix}steps" in line]
    last = lines[-1] if lines else {}
    return {k.removeprefix(prefix): value for k, value in last.items() if k.startswith(prefix)}


def option_table(groups: Groups) -> Table:
    """Return the options in which runs differ; values of a group are separated by commas."""
    runs = [run for members in groups.values() for run in members]
    keys = dict.fromkeys(key for run in runs for key in run.options if key != "output")
    rows = []
    for key in keys:
        found = [[_option(run.options, key) for run in members] for members in groups.values()]
        if len({value for values in found for value in values}) > 1:
            rows.append([key, *(", ".join(dict.fromkeys(values)) for values in found)])
    return Table(["option", *groups], rows)


def _option(options: Mapping[str, Any], key: str) -> str:
    if key not in options:
        return "-"
    value = options[key]
    return "null" if value is None else str(value)


def environment_table(groups: Groups) -> tuple[str, Table]:
    """Return host, device and versions: a sentence on what all runs share, a table of the rest.

    The last start of each run counts.
    """
    runs = [run for members in groups.values() for run in members if run.starts]
    names = dict.fromkeys(name for run in runs for name in run.starts[-1] if name != "time")
    values = {name: [str(run.starts[-1].get(name, "")) for run in runs] for name in names}
    same = [f"{name} {each[0]}" for name, each in values.items() if len(set(each)) == 1]
    columns = {
        "run": [run.name for run in runs],
        "starts": [str(len(run.starts)) for run in runs],
        "last start": [_minute(str(run.starts[-1].get("time", ""))) for run in runs],
        "goodput": [_goodput(run) for run in runs],
        **{name: each for name, each in values.items() if len(set(each)) > 1},
    }
    rows = [list(cells) for cells in zip(*columns.values(), strict=True)]
    words = f"{'; '.join(same)}." if same else ""
    if words and len(runs) > 1:
        words = f"The same in all runs: {words}"
    return words, Table(list(columns), rows).without_empty()


def _goodput(run: Run) -> str:
    """Return the part of the time since the first start that was in steps that counted."""
    found = [line["goodput"] for line in run.lines if "goodput" in line]
    return f"{found[-1]:.0%}" if found else ""


def _minute(time: str) -> str:
    """Return an ISO time in UTC to the minute."""
    return time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")
