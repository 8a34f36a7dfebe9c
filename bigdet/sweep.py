"""Train the runs of a sweep one after another, or print them as commands or as Slurm arrays.

Its command line is in ``cli/arguments/sweep.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.sweep import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import argparse
import dataclasses
import logging
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from bigdet.cli.running import STOPPED, run_command
from bigdet.config.compare import place_of
from bigdet.config.load import read_config
from bigdet.config.phase import in_steps
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.config.sweep import PlannedRun, SweepConfig, load_sweep
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.phase_sets import open_phase_sets
from bigdet.host import locks
from bigdet.host.errors import explain_exit
from bigdet.host.files import check_folder, write_text
from bigdet.logs.log import setup_logging
from bigdet.reporting.runs import Run, check_same_data, read_run, short_names
from bigdet.reporting.table import Outcome, outcome_table, read_metrics, read_outcome
from bigdet.reporting.writing import write_report
from bigdet.run_dir import RunDir
from bigdet.training.forks import CHANGEABLE, changeable_options, changed_options, check_fork
from bigdet.training.resume import settle_config

logger = logging.getLogger("bigdet.sweep")  # not __name__, which is __main__ as a command

LOCK_NAME = "sweep.lock"
"""In the sweep's folder: which process trains its runs; see ``host/locks.py``."""
SLURM_COMMAND = "srun python -m bigdet.train"

_stop_requested = False


def main(arguments: Sequence[str]) -> int:
    """Run or print a sweep and return the exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0)
    sweep, runs = load_sweep(options.sweep)
    for run in runs:
        _check_finished(run)
    check_forks(runs)
    command = read_command(options, sweep)
    left = [run for run in runs if not _run_dir(run).is_finished]
    if options.print:
        sys.stdout.writelines(f"{shlex.join([*command, *run.words])}\n" for run in left)
        return 0
    if options.slurm:
        sys.stdout.write(slurm_script(Path(options.sweep).stem, left, command))
        return 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)
    folder = Path(sweep.output)
    check_folder(folder, "output")
    with locks.held(folder, folder / LOCK_NAME):
        failed = run_all(runs, command)
        report(sweep, runs)
    if _stop_requested:
        return STOPPED
    if failed:
        raise ValueError(
            f"{options.sweep}: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. "
            f"Their messages are above and in their logs/rank-0.log. The same command repeats them."
        )
    return 0


def read_command(options: argparse.Namespace, sweep: SweepConfig) -> list[str]:
    """Return the command that starts a run; ``ConfigError`` if this machine does not have it."""
    text = SLURM_COMMAND if options.slurm else sweep.command
    source = f"{options.sweep}: command" if options.command is None else "--command"
    try:
        words = shlex.split(text if options.command is None else options.command)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}. Write it as for a shell.") from error
    is_here = options.print or options.slurm or (words and shutil.which(words[0]) is not None)
    if not words or not is_here:
        raise ConfigError(
            f"{source}: found {shlex.join(words)!r}, expected a command of this machine, such as "
            f"'python -m bigdet.train'."
        )
    return words


def check_forks(runs: Sequence[PlannedRun]) -> None:
    """Check that each fork equals its trunk up to the step where it begins.

    Learning rates of phases whose length is in passes are checked when the fork begins: that
    needs the data.
    """
    by_name = {run.name: run for run in runs}
    for run in runs:
        if run.fork_of is None:
            continue
        trunk = by_name[run.fork_of].config
        phase, _, step = Path(run.config.resume).name.rpartition("-")
        _check_past(run, trunk, phase)
        pair = [each.phases[phase] for each in (run.config, trunk)]
        if all(each.passes is None and (each.steps or each.images_per_step) for each in pair):
            fork, before = (
                in_steps(each, 1 if each.steps else 1 / (each.images_per_step or 1))
                for each in pair
            )
            try:
                check_fork(phase, int(step), fork, before)
            except ConfigError as error:
                raise ConfigError(f"runs.{run.group}: {error}") from error


def _check_past(run: PlannedRun, trunk: RunConfig, phase: str) -> None:
    """Refuse a fork that differs from its trunk before the checkpoint where it begins."""
    if list(run.config.phases) != list(trunk.phases):
        raise ConfigError(
            f"runs.{run.group}: fork.run: {run.fork_of} has the phases {', '.join(trunk.phases)}, "
            f"this run {', '.join(run.config.phases)}. Fork from a run with the same phases."
        )
    changeable = [
        *changeable_options(run.config, phase, is_fork=True),
        *(f"phases.{phase}.{unit}" for unit in ("passes", "images")),
    ]
    if changed := changed_options(run.config, trunk, changeable):
        raise ConfigError(
            f"runs.{run.group}: fork.run: {run.fork_of} has other options until then: "
            f"{', '.join(changed)}. Give both the same options, or leave out fork."
        )


def run_all(runs: Sequence[PlannedRun], command: Sequence[str]) -> list[str]:
    """Train all runs that are not finished.

    Returns:
        The names of those that failed, or that could not begin because another one failed.
    """
    failed: list[str] = []
    for number, run in enumerate(runs, start=1):
        place = f"run {number} of {len(runs)}, {run.name}"
        if _run_dir(run).is_finished:
            logger.info("%s: already finished", place)
        elif run.after in failed:
            logger.warning("%s: not started, because %s failed", place, run.after)
            failed.append(run.name)
        else:
            logger.info("%s: %s", place, shlex.join([*command, *run.words]))
            code = _run(run, command)
            # Launchers change exit codes; the run folder says what happened.
            is_stopped = _run_dir(run).stopped.is_file()
            if not _run_dir(run).is_finished and not is_stopped:
                logger.warning(
                    "%s: failed: its command ended with exit code %d, and %s is neither finished "
                    "nor stopped.%s",
                    place,
                    code,
                    _run_dir(run).root,
                    explain_exit(code),
                )
                failed.append(run.name)
            if is_stopped or _stop_requested:
                _note(0, None)
                logger.info("stopped on request; start again to continue")
                break
    return failed


def report(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> None:
    """Write the report into the sweep's folder, and show its first table.

    Where runs are evaluated on several data sets, each set has its own folder with a report.
    """
    folder = Path(sweep.output)
    begun = [run for run in runs if read_metrics(_run_dir(run))]
    read = {run.name: read_run(_run_dir(run).root, run.name) for run in begun}
    spelled: dict[str, str] = {}  # of several ways to write a place, the first
    shards = {
        name: spelled.setdefault(place_of(text), text)
        for name, run in read.items()
        if (text := run.evaluated_on)
    }
    places = list(dict.fromkeys(shards.values()))
    names = short_names([Path(place) for place in places])
    table = outcome_table(_outcomes(sweep.runs, runs)).markdown()
    links = ""
    if len(places) > 1:
        (folder / "report.html").unlink(missing_ok=True)  # of an earlier start with fewer runs
        links = "\n" + "".join(
            f"- runs on {place}: {_report_folder(name)}/report.html\n"
            for place, name in zip(places, names, strict=True)
        )
    about = f"{sweep.about}\n\n" if sweep.about else ""
    write_text(folder / "report.md", about + table + links)
    for place, name in zip(places, names, strict=True):
        own = [run for run in begun if shards[run.name] == place]
        try:
            check_same_data([read[run.name] for run in own])
        except ValueError as error:
            logger.warning("no plots: %s", error)
            continue
        groups: dict[str, list[Run]] = {}
        for run in own:
            groups.setdefault(run.group, []).append(read[run.name])
        if len(places) == 1:  # runs that have not begun are listed too
            out, title, outcomes = folder, folder.name, _outcomes(sweep.runs, runs)
        else:
            out, title = folder / _report_folder(name), f"{folder.name}, {name}"
            outcomes = _outcomes(groups, own)
        _, page = write_report(groups, out, title, outcomes, sweep.about)
        logger.info("written: %s", page)
    logger.info("%s:\n%s", folder / "report.md", table)


def _report_folder(name: str) -> str:
    """Return the folder of the report on one data set of several."""
    return f"report-{name.replace('/', '-')}"


def _outcomes(groups: Iterable[str], runs: Sequence[PlannedRun]) -> dict[str, list[Outcome | None]]:
    """Return the progress and results of the runs, by group."""
    return {
        group: [read_outcome(_run_dir(run)) for run in runs if run.group == group]
        for group in groups
    }


def slurm_script(name: str, runs: Sequence[PlannedRun], command: Sequence[str]) -> str:
    """Return a shell script that submits runs as arrays, each of which waits for the one before.

    Args:
        name: job name in Slurm.
        runs: those to train; one that waits for none of them is in the first array.
        command: starts a run inside a job.
    """
    waves: list[list[PlannedRun]] = []
    wave_of: dict[str, int] = {}
    for run in runs:
        place = wave_of.get(run.after or "", -1) + 1
        wave_of[run.name] = place
        waves += [[]] if place == len(waves) else []
        waves[place].append(run)
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits the runs of {name} that were not finished when this was written. Words after",
        "# it are options of sbatch: --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --time=24:0:0",
        "set -euo pipefail",
    ]
    for number, wave in enumerate(waves):
        wait = f' --dependency="afterok:$wave{number - 1}"' if number else ""
        lines += [
            f"wave{number}=$(sbatch --parsable --job-name={shlex.quote(name)} --signal=TERM@120 "
            f"--array=0-{len(wave) - 1}{wait} \"$@\" <<'JOB'",
            "#!/usr/bin/env bash",
            "# Slurm 22.05 to 23.02 give a task one CPU unless srun asks for them too.",
            'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
            "commands=(",
            *(f"  {shlex.quote(shlex.join([*command, *run.words]))}" for run in wave),
            ")",
            'eval "${commands[$SLURM_ARRAY_TASK_ID]}"',
            "JOB",
            ")",
            f'echo "submitted array $wave{number} of {len(wave)} runs"',
        ]
    return "\n".join(lines) + "\n"


def _run(run: PlannedRun, command: Sequence[str]) -> int:
    """Train one run in its own process and return the exit code.

    A request to stop is passed on as the file OUTPUT/stop: launchers differ in how they handle
    signals. It is written until the run ends, because a run that is just starting removes it.
    """
    _run_dir(run).stopped.unlink(missing_ok=True)  # of an earlier start
    process = subprocess.Popen([*command, *run.words])
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if _stop_requested:
                _run_dir(run).root.mkdir(parents=True, exist_ok=True)
                _run_dir(run).stop.touch()


def _check_finished(run: PlannedRun) -> None:
    """Refuse a sweep whose finished runs were trained with other options than it now lists."""
    if not _run_dir(run).is_finished:
        return
    made = read_config(_run_dir(run).config)
    changed = changed_options(_settled(run, made), made, CHANGEABLE)
    if changed:
        raise ConfigError(
            f"runs.{run.group}: {_run_dir(run).root} holds a finished run with other options: "
            f"{', '.join(changed)}. Give this one another name, or remove the folder."
        )


def _settled(run: PlannedRun, made: RunConfig) -> RunConfig:
    """Return the config of a run as its folder has it: with all lengths in steps.

    Images per step that it does not set, as they follow from the number of ranks, are those of
    ``made``, the config in the folder; so are lengths in passes if the data are not here.
    """
    phases = {
        name: dataclasses.replace(
            phase, images_per_step=phase.images_per_step or made.phases[name].images_per_step
        )
        for name, phase in run.config.phases.items()
        if name in made.phases
    }
    config = dataclasses.replace(run.config, phases={**run.config.phases, **phases})
    sets = None
    if any(phase.passes is not None for phase in config.phases.values()):
        try:
            sets = open_phase_sets(config)
        except (ShardError, OSError) as error:
            logger.warning("%s: its lengths in passes cannot be compared: %s", run.name, error)
    phases = settle_config(config, None, None, sets).phases
    for name, phase in phases.items():
        if phase.passes is not None and name in made.phases:
            steps, drops = made.phases[name].steps, made.phases[name].drops
            phases[name] = dataclasses.replace(phase, passes=None, steps=steps, drops=drops)
    return dataclasses.replace(config, phases=phases)


def _run_dir(run: PlannedRun) -> RunDir:
    return RunDir(Path(run.config.output))


def _note(number: int, frame: FrameType | None) -> None:
    global _stop_requested
    _stop_requested = True


if __name__ == "__main__":
    run_command(main)
