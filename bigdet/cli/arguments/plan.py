"""Find out which sizes and batches fit into a GPU, and which way of sharding to use on many GPUs.

    bigdet plan configs/r50_direct.yaml --memory-gib 11
    bigdet plan configs/swin_t_direct.yaml --gpus 8x16 --link nvlink,400gb

``--memory-gib`` (equation 1 of paper 2) measures real steps of a few sizes and batches on this
device, each in its own process, and prints the settings on the boundary of that memory, one line of
options each. With ``--gpus``, memory is that of the config's engine on so many GPUs. ``--check
384x6`` measures one more setting and compares it with the prediction (exit code 1 if the memory is
off by more than 10%). ``bigdet/planning/memory.py`` explains the prediction.

``--gpus`` without ``--memory-gib``: GPUs per host x hosts. ``--link``: what connects the GPUs of a
host, and the network adapter per GPU (``50gb`` where eight share one of 400). A few real steps are
measured on this device first; where this is not the device to plan for, ``--step-seconds`` gives
their duration. ``bigdet/planning/cluster.py`` explains the prediction.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from bigdet.cli.parsing import add_overrides, command_parser

GPUS = "8x16"
LINK = "nvlink,400gb"
LATENCY = 1e-5
SIZES = "224,320,448,640"  # the paper's grid
BATCHES = "2,4,8,16"
TRIALS = 6


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("config", help="YAML file of the experiment")
    add_overrides(parser)
    parser.add_argument("--gpus", help=f"GPUs per host x hosts; default {GPUS}")
    parser.add_argument(
        "--link", help=f"link inside a host, and per GPU between hosts; default {LINK}"
    )
    parser.add_argument(
        "--latency", type=float, help=f"latency of a message, seconds; default {LATENCY}"
    )
    parser.add_argument("--phase", help="phase to plan; default: the first")
    parser.add_argument("--step-seconds", type=float, help="duration of a micro-batch on one GPU")
    parser.add_argument(
        "--gpu-memory-gib", type=float, help="memory of a GPU; default: of this device"
    )
    parser.add_argument(
        "--memory-gib", type=float, help="find the sizes and batches that fit into this much"
    )
    parser.add_argument("--sizes", help=f"values of resize.size to consider; default {SIZES}")
    parser.add_argument("--batches", help=f"images per GPU to consider; default {BATCHES}")
    parser.add_argument("--trials", type=int, help=f"settings to measure; default {TRIALS}")
    parser.add_argument("--check", help="also measure this setting, such as 384x6, and compare")
    parser.add_argument(
        "--measure", action="store_true", help="only measure steps on this device, and print JSON"
    )
    options = parser.parse_intermixed_args(arguments)
    with_memory, without = (
        ("sizes", "batches", "trials", "check"),
        ("link", "latency", "step_seconds", "gpu_memory_gib"),
    )
    for name in with_memory if options.memory_gib is None else without:
        if getattr(options, name) is not None:
            option, word = (
                f"--{name.replace('_', '-')}",
                "with" if name in with_memory else "without",
            )
            raise ValueError(
                f"{option}: only for a plan {word} --memory-gib. Leave one of them out."
            )
    for option in ("--memory-gib", "--gpu-memory-gib", "--step-seconds"):
        value = getattr(options, option[2:].replace("-", "_"))
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option}: found {value}, expected a number above 0.")
    if options.latency is not None and not 0 <= options.latency < math.inf:
        raise ValueError(f"--latency: found {options.latency}, expected seconds, 0 or more.")
    if options.trials is not None and options.trials < 3:
        raise ValueError(f"--trials: found {options.trials}, expected 3 or more.")
    return options
