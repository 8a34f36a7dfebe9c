"""Find out which sizes and batches fit into a GPU, and which way of sharding to use on many GPUs.

    bigdet plan configs/r50_direct.yaml --memory-gib 11
    bigdet plan configs/swin_t_direct.yaml --gpus 8x16 --link nvlink,400gb
    bigdet plan configs/vitdet_l.yaml --device h200,a100,rtx4090 --gpus 8,64,512

``--memory-gib`` (equation 1 of paper 2) measures real steps of a few sizes and batches on this
device, each in its own process, and prints the settings on the boundary of that memory, one line of
options each. With ``--gpus``, memory is that of the config's engine on so many GPUs. ``--check
384x6`` measures one more setting and compares it with the prediction (exit code 1 if the memory is
off by more than 10%). ``bigdet/planning/memory.py`` explains the prediction.

``--gpus`` without ``--memory-gib``: GPUs per host x hosts. ``--link``: what connects the GPUs of a
host, and the network adapter per GPU (``50gb`` where eight share one of 400). A few real steps are
measured on this device first; where this is not the device to plan for, ``--step-seconds`` gives
their duration. ``bigdet/planning/cluster.py`` explains the prediction.

``--device``: memory on GPUs that are not there, from the operations of a step on tensors without
memory, whether it fits, the largest ``images_per_gpu``, and an estimate of the GPU's time. No GPU
and no data are needed. With several numbers of ``--gpus``, eight on a host, a table of what start,
step and save take of a rank. ``bigdet/planning/devices.py`` explains what is predicted and how.
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
CLASSES = 80
OBJECTS = 20
DISK = 2.0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("config", help="YAML file of the experiment")
    add_overrides(parser)
    parser.add_argument(
        "--gpus",
        help=f"GPUs per host x hosts; default {GPUS}. With --device numbers, such as 8,64,512",
    )
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
    parser.add_argument("--device", help="GPUs to plan for, such as h200,a100,rtx4090")
    parser.add_argument(
        "--classes", type=int, help=f"number of classes; default: of the shards, else {CLASSES}"
    )
    parser.add_argument("--objects", type=int, help=f"objects of each image; default {OBJECTS}")
    parser.add_argument("--disk", type=float, help=f"GB/s that a host writes; default {DISK:g}")
    options = parser.parse_intermixed_args(arguments)
    _check_device(options)
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


def _check_device(options: argparse.Namespace) -> None:
    """Refuse what has no effect with --device, and what needs it."""
    others = ["link", "latency", "step_seconds", "gpu_memory_gib", "memory_gib", "sizes"]
    others += ["batches", "trials", "check", "measure"]
    with_device = ["classes", "objects", "disk"]
    for name in with_device if options.device is None else others:
        if getattr(options, name) not in (None, False):
            word = "with" if name in with_device else "without"
            raise ValueError(
                f"--{name.replace('_', '-')}: only for a plan {word} --device. Leave one of them "
                f"out."
            )
    for name in with_device:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: found {value}, expected a number above 0.")
