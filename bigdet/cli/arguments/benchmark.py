"""Measure one part of bigdet and an alternative in the same process; print one JSON object.

bigdet benchmark stream configs/swin_t_direct.yaml --workers 2
bigdet benchmark step configs/quickstart.yaml
bigdet benchmark predict configs/r50_direct.yaml --phase finetune
bigdet benchmark step configs/quickstart.yaml --engines all --ranks 2
bigdet benchmark meetings configs/quickstart.yaml engine.kind=fsdp engine.zero_stage=null
bigdet benchmark resume configs/quickstart.yaml --samples 118000
bigdet benchmark evaluate configs/r50_direct.yaml data.val.shards=data/coco/val
bigdet benchmark evaluate configs/r50_direct.yaml --images 80000 --classes 365
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import add_count, add_overrides, command_parser, positive


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="name of the phase; default: the first of the config")
    add_count(parser, "--images", 300, "images per measurement")
    parser.add_argument(
        "--workers", type=int, help="loader processes or threads; default data.workers"
    )
    add_count(parser, "--rounds", 5, "measurements of each, in turn; the median counts")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--phase", help="phase that gives batch, size and norm mode; default: the first"
    )
    add_count(parser, "--objects", 20, "objects per image")
    add_count(parser, "--rounds", 5, "steps to measure of each")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--engines", help="compare with DDP instead: all, or a list of zero0,zero1,zero2,zero3,fsdp"
    )
    instead.add_argument(
        "--operators",
        action="store_true",
        help="measure instead, on the CPU, the share of convolutions and matrix products",
    )
    add_count(parser, "--ranks", 2, "processes for --engines")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="phase that gives model and test size; default: the last")
    add_count(parser, "--rounds", 5, "passes to measure of each")
    add_count(parser, "--images", 1, "images per pass")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--images", 5000, "number of images")
    add_count(parser, "--detections", 100, "detections per image")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the synthetic detections; default 0"
    )
    add_count(parser, "--rounds", 3, "measurements of each program, in turn; the median counts")
    parser.add_argument(
        "--peers",
        help="list of hotcoco,faster_coco_eval,pycocotools; default: all that are installed",
    )
    parser.add_argument("--boxes", action="store_true", help="score boxes only, no masks")
    parser.add_argument(
        "--classes",
        type=positive,
        help="use this many synthetic classes, boxes only, without other programs",
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=positive,
        help="pretend that the set has this many samples; default: its own number",
    )
    add_count(parser, "--steps", 40, "steps of the first start")
    add_count(parser, "--every", 10, "steps between saves")
    add_count(parser, "--ranks", 1, "processes")


def _add_meetings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="phase that gives batch and norm mode; default: the first")
    parser.add_argument(
        "--ranks",
        type=lambda words: [positive(word) for word in words.split(",")],
        default=[2, 4, 8],
        help="numbers of processes; default 2,4,8",
    )
    add_count(parser, "--size", 64, "height and width of the images, pixels")
    add_count(parser, "--rounds", 20, "measurements of each; the median counts")


PARTS = {
    "stream": _add_stream,
    "step": _add_step,
    "predict": _add_predict,
    "evaluate": _add_evaluate,
    "meetings": _add_meetings,
    "resume": _add_resume,
}
"""The parts that can be measured, each by ``benchmarks/PART.py``, and their options."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("benchmark", __doc__)
    parser.add_argument("part", choices=list(PARTS), help="PART --help shows its options")
    part = parser.parse_args(arguments[:1]).part
    examples = [line for line in str(__doc__).splitlines() if f"benchmark {part} " in line]
    epilog = "\n".join(["examples:", *examples])
    parser = command_parser(f"benchmark {part}", _docstring(part), epilog)
    parser.add_argument("config", type=Path, help="YAML file of an experiment")
    PARTS[part](parser)
    add_overrides(parser)
    parser.set_defaults(part=part)
    return parser.parse_intermixed_args(arguments[1:])


def _docstring(part: str) -> str | None:
    """Return the docstring of a part without importing it, which takes seconds."""
    file = Path(__file__).parents[2] / "benchmarks" / f"{part}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
