"""Train a detector: all phases of a config, from the data to the final weights.

    deepspeed --num_gpus 8 -m bigdet.train configs/swin_t_direct.yaml
    torchrun --nproc-per-node 8 -m bigdet.train configs/swin_t_direct.yaml seed=1
    bigdet train configs/quickstart.yaml
    bigdet train configs/quickstart.yaml --doctor
    bigdet train --options data.train

Started again, the same command resumes from the newest checkpoint. Exit code 0: done; 1: an error,
explained by a message; 75: stopped on request (SIGTERM, SIGUSR1, or the file OUTPUT/stop) with a
checkpoint: start it again. torchrun turns every code but 0 into 1; the file OUTPUT/stopped shows
that a run was stopped on request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bigdet.cli.parsing import add_overrides, command_parser
from bigdet.config.describe import describe_options


class ShowOptions(argparse.Action):
    """Prints the options and exits, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, _space: object, value: object, _word: object = None
    ) -> None:
        """Print those below the key, or all."""
        sys.stdout.write(describe_options(str(value or "")))
        parser.exit()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; launchers add --local_rank, which is also in the environment."""
    parser = command_parser("train", __doc__)
    parser.add_argument("config", help="YAML file of the experiment")
    add_overrides(parser)
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check hosts, data, memory and collectives, then exit",
    )
    parser.add_argument(
        "--log-json",
        action="store_true",
        help="write console lines as JSON objects, with the numbers",
    )
    parser.add_argument(
        "--options",
        action=ShowOptions,
        nargs="?",
        metavar="KEY",
        help="list all options, or those below a key, with type, default and unit, then exit",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)
