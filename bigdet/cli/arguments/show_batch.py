"""Show what a run is, was or will be trained on: the exact batch of any step of a phase.

bigdet show-batch configs/swin_t_direct.yaml --phase pretrain --step 1000
bigdet show-batch CONFIG --phase pretrain --step 1000 --world 8 --rank 3 --out pictures
bigdet show-batch CONFIG --phase pretrain --step 1000 --world 8 --ids
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import add_overrides, command_parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("show-batch", __doc__)
    parser.add_argument("config", type=Path, help="YAML file of an experiment, or of a run")
    parser.add_argument("--phase", required=True, help="name of the phase in the config")
    parser.add_argument("--step", type=int, required=True, help="step of the phase, from 1")
    parser.add_argument("--world", type=int, default=1, help="number of ranks; default 1")
    parser.add_argument("--rank", type=int, help="show this rank only; default: all")
    parser.add_argument("--ids", action="store_true", help="print image ids, draw nothing")
    parser.add_argument(
        "--out", type=Path, help="folder for the pictures; default OUTPUT/pictures/batch-PHASE-STEP"
    )
    add_overrides(parser)
    return parser.parse_intermixed_args(arguments)
