"""Reads run folders for a report, and groups those that differ only in their seed."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigdet.config.compare import comparable, flat_options, place_of
from bigdet.config.load import read_config
from bigdet.config.run import phase_data
from bigdet.reporting.table import Outcome, outcome_of, read_metrics
from bigdet.run_dir import RunDir

logger = logging.getLogger(__name__)

UNCOUNTED = (
    "output", "seed", "resume", "checkpoint", "log", "data.workers", "data.cache",
)  # fmt: skip
"""Options and sections in which runs of one group may differ: seed, and those without effect.

``data.worker_kind`` has one: CPU time is without loader processes, but with loader threads.
"""


@dataclass(frozen=True)
class Run:
    """What a report needs of a run.

    Attributes:
        name: short and unique.
        run_dir: its folder.
        options: the resolved config, by full key.
        phases: names in the order in which they run.
        val_sets: address of the validation set of each phase.
        lines: the lines of ``metrics.jsonl``.
        evaluation: numbers of the last evaluation with a file; empty if there is none.
        starts: host and versions of each start; empty for runs of earlier versions.
    """

    name: str
    run_dir: RunDir
    options: Mapping[str, Any]
    phases: Sequence[str]
    val_sets: Mapping[str, str]
    lines: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]

    @property
    def outcome(self) -> Outcome | None:
        """Last AP and costs; None before its first evaluation."""
        return outcome_of(self.lines, self.run_dir.is_finished)

    @functools.cached_property
    def evaluated_on(self) -> str:
        """Address of the validation set of the last evaluation, or of the last phase before any."""
        measured = [line["phase"] for line in self.lines if "bbox/AP" in line]
        return self.val_sets[measured[-1] if measured else self.phases[-1]]

    def is_compared(self, phase: str) -> bool:
        """Tell whether a phase was evaluated on the set of the last evaluation."""
        return place_of(self.val_sets[phase]) == place_of(self.evaluated_on)

    def total_step(self, line: Mapping[str, Any]) -> int:
        """Return the optimizer steps of all phases up to a line."""
        before = self.phases[: self.phases.index(line["phase"])]
        return sum(self.last_step(phase) for phase in before) + int(line["step"])

    def last_step(self, phase: str) -> int:
        """Return the steps of a phase; those made if its length is not given in steps."""
        given = self.options[f"phases.{phase}.steps"]
        made = (int(line["step"]) for line in self.lines if line["phase"] == phase)
        return int(given) if given else max(made, default=0)


Groups = Mapping[str, Sequence[Run]]
"""By name: runs that differ only in their seed."""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders in the given order, each once.

    Raises:
        ValueError: a folder is not a run, has nothing to report, or was evaluated on other data.
    """
    by_place: dict[Path, Path] = {}
    for folder in folders:
        by_place.setdefault(folder.resolve(), Path(os.path.abspath(folder)))
    unique = list(by_place.values())
    names = short_names(unique)
    runs = [read_run(folder, name) for folder, name in zip(unique, names, strict=True)]
    check_same_data(runs)
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder."""
    run_dir = RunDir(folder)
    if not run_dir.config.is_file():
        found = "is not a folder" if not folder.is_dir() else f"has no {run_dir.config.name}"
        raise ValueError(
            f"{folder}: not a run: it {found}. Give the output folder of `bigdet train`."
        )
    config = read_config(run_dir.config)
    lines = read_metrics(run_dir)
    if not lines:
        raise ValueError(
            f"{run_dir.metrics}: has no line, so there is nothing to report. Wait for the first "
            f"log.every ({config.log.every}) steps of the run, or leave it out."
        )
    phases = list(config.phases)
    if unknown := sorted({str(line["phase"]) for line in lines} - set(phases)):
        raise ValueError(
            f"{run_dir.metrics}: has the phases {', '.join(unknown)}, which {run_dir.config.name} "
            f"does not list ({', '.join(phases)}). The files are of different runs."
        )
    if run_dir.weights.is_file() and not run_dir.is_finished:
        logger.warning(
            "%s: its last evaluation is not scored yet; start the run again, which only does that",
            folder,
        )
    evaluation, starts = _last_evaluation(run_dir, lines), _read_json(run_dir.environment, [])
    val_sets = {phase: phase_data(config, phase).val.shards for phase in phases}
    return Run(name, run_dir, flat_options(config), phases, val_sets, lines, evaluation, starts)


def check_same_data(runs: Sequence[Run]) -> None:
    """Check that all runs were evaluated on the same objects in the same way.

    The paths of the data may differ: classes, objects per class and the definition of AP are
    compared.
    """
    measured = [run for run in runs if run.evaluation]
    keys = ("evaluation.metric", "evaluation.max_detections")
    for run in measured[1:]:
        first = measured[0]
        for what, own, other in (
            ("classes", _classes(run), _classes(first)),
            ("objects of each class", _objects(run), _objects(first)),
            *((key, run.options[key], first.options[key]) for key in keys),
        ):
            if own is not None and other is not None and own != other:
                raise ValueError(
                    f"{run.run_dir.root}: was evaluated on other data than {first.run_dir.root}: "
                    f"{what}: {_brief(own)}, not {_brief(other)}. Their AP cannot be compared: "
                    f"make a report for each, or evaluate one again with `bigdet evaluate`."
                )


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ only in their seed, in the given order.

    A second run with the same seed is not another seed: it is a group of its own.
    """
    by_options: dict[tuple[str, int], list[Run]] = {}
    times: Counter[tuple[str, str]] = Counter()
    for run in runs:
        kept = {
            key: comparable(key, value)
            for key, value in run.options.items()
            if not _is_uncounted(key)
        }
        options, seed = json.dumps(kept, sort_keys=True, default=str), str(run.options.get("seed"))
        by_options.setdefault((options, times[options, seed]), []).append(run)
        times[options, seed] += 1
    groups: dict[str, list[Run]] = {}
    for members in by_options.values():
        names = [run.name for run in members]
        others = groups.keys() | {run.name for run in runs} - set(names)
        name = common_name(names)
        if name in others:
            name = _first_of(names)
        while name in others:  # of a folder that is called so
            name += "*"
        groups[name] = members
    return groups


def common_name(names: Sequence[str]) -> str:
    """Return the common part of names, such as ``direct`` for ``direct-s0`` and ``direct-s1``."""
    if len(names) == 1:
        return names[0]
    without = {re.sub(r"[-_.]?(s|seed)[-_]?\d+$", "", name) for name in names}
    shared = without.pop() if len(without) == 1 else ""
    return shared or _first_of(names)


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more"


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return each folder's name, with as many parents as are needed to make all different."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def _is_uncounted(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in UNCOUNTED)


def _last_evaluation(run_dir: RunDir, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for line in reversed(lines):
        file = run_dir.evaluation(line["phase"], line["step"])
        if "bbox/AP" in line and file.is_file():
            found: Mapping[str, Any] = _read_json(file, {})
            return found
    return {}


def _read_json(file: Path, absent: Any) -> Any:
    """Return the content of a JSON file, or ``absent`` if there is no file."""
    if not file.is_file():
        return absent
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON ({error}). Remove the file.") from error
    if not isinstance(found, type(absent)):
        raise ValueError(
            f"{file}: expected a {type(absent).__name__}, found a {type(found).__name__}. Remove "
            f"the file."
        )
    return found


def _classes(run: Run) -> list[str] | None:
    per_class = run.evaluation.get("per_class", {}).get("bbox")
    return None if per_class is None else sorted(per_class)


def _objects(run: Run) -> dict[str, int] | None:
    analysis = run.evaluation.get("analysis", {}).get("bbox")
    if analysis is None:
        return None
    return {name: numbers["objects"] for name, numbers in analysis["per_class"].items()}


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
