"""Train the runs of a sweep one after another, or print them as commands or as Slurm arrays.

    bigdet sweep configs/sweeps/small.yaml
    bigdet sweep configs/sweeps/figure1.yaml --print
    bigdet sweep configs/sweeps/figure1.yaml --slurm > submit.sh; bash submit.sh --nodes=1

Started again, it skips finished runs and resumes the others. SIGTERM and SIGUSR1 stop the current
run with a checkpoint. At the end it writes a report on all runs, OUTPUT/report.html, with its
tables in report.md; if runs are measured on several data sets, one report each, in
OUTPUT/report-DATA.
Exit code 0: all runs are finished; 1: an error, or failed runs; 75: stopped on request.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bigdet.cli.parsing import command_parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("sweep", __doc__)
    parser.add_argument("sweep", help="YAML file of the sweep")
    parser.add_argument("--command", help="command that starts a run, instead of the sweep's own")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--print", action="store_true", help="print the commands of the remaining runs"
    )
    instead.add_argument(
        "--slurm",
        action="store_true",
        help="print a script that submits the remaining runs as arrays",
    )
    return parser.parse_args(arguments)
