"""Compare runs: one HTML file with plots, tables and pictures, and the tables in Markdown.

    bigdet report runs/quickstart --out reports/quickstart
    bigdet report runs/scratch runs/direct --out reports/regimes
    bigdet report runs/table3/*/ --out reports/table3

Writes DIR/report.html, which needs no network, and DIR/report.md. Runs that differ in nothing but
their seed become one line with mean and standard deviation; the first group is the reference for
the others. The cost of imported weights, where phases.NAME.start_from.cost gives it, is shown next
to the cost of the run itself. All runs must have been evaluated on the same images. Runs may still
be in progress.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import command_parser
from bigdet.cli.running import run_command
from bigdet.host.files import check_folder
from bigdet.logs.log import setup_logging
from bigdet.reporting.runs import group_runs, read_runs
from bigdet.reporting.writing import write_report

logger = logging.getLogger("bigdet.report")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Write the report and return the exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0)
    groups = group_runs(read_runs(options.runs))
    check_folder(options.out, "--out")
    outcomes = {name: [run.outcome for run in runs] for name, runs in groups.items()}
    title = options.title or ", ".join(groups)
    for file in write_report(groups, options.out, title, outcomes):
        kilobytes = file.stat().st_size / 1000
        size = f"{kilobytes:.0f} kB" if kilobytes < 1000 else f"{kilobytes / 1000:.1f} MB"
        logger.info("written: %s (%s)", file, size)
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--title", help="above the report; default: the names of the runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
