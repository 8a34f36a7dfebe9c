"""Measure one part of bigdet and an alternative in the same process; print one JSON object.

bigdet benchmark stream configs/swin_t_direct.yaml --workers 2
bigdet benchmark step configs/quickstart.yaml
bigdet benchmark predict configs/r50_direct.yaml --phase finetune
bigdet benchmark step configs/quickstart.yaml --engines all --ranks 2
bigdet benchmark resume configs/quickstart.yaml --samples 118000
bigdet benchmark evaluate configs/r50_direct.yaml data.val.shards=data/coco/val
bigdet benchmark evaluate configs/r50_direct.yaml --images 80000 --classes 365
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.running import positive


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="name of the phase; default: the first of the config")
    parser.add_argument(
        "--images", type=positive, default=300, help="images per measurement; default 300"
    )
    parser.add_argument("--workers", type=int, help="loader processes; default data.workers")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        help="measurements of each, in turn; the median counts; default 5",
    )


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--phase", help="phase that gives batch, size and norm mode; default: the first"
    )
    parser.add_argument(
        "--objects", type=positive, default=20, help="objects per image; default 20"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="steps to measure of each; default 5"
    )
    parser.add_argument(
        "--engines", help="compare with DDP instead: all, or a list of zero0,zero1,zero2,zero3,fsdp"
    )
    parser.add_argument(
        "--ranks", type=positive, default=2, help="processes for --engines; default 2"
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="phase that gives model and test size; default: the last")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="passes to measure of each; default 5"
    )
    parser.add_argument("--images", type=positive, default=1, help="images per pass; default 1")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=positive, default=5000, help="number of images; default 5000"
    )
    parser.add_argument(
        "--detections", type=positive, default=100, help="detections per image; default 100"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the synthetic detections; default 0"
    )
    parser.add_argument(
        "--classes",
        type=positive,
        help="use this many synthetic classes, boxes only, without pycocotools",
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=positive,
        help="pretend that the set has this many samples; default: its own number",
    )
    parser.add_argument(
        "--steps", type=positive, default=40, help="steps of the first start; default 40"
    )
    parser.add_argument(
        "--every", type=positive, default=10, help="steps between saves; default 10"
    )
    parser.add_argument("--ranks", type=positive, default=1, help="processes; default 1")


PARTS = {
    "stream": _add_stream,
    "step": _add_step,
    "predict": _add_predict,
    "evaluate": _add_evaluate,
    "resume": _add_resume,
}
"""The parts that can be measured, each by ``benchmarks/PART.py``, and their options."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bigdet benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=list(PARTS), help="PART --help shows its options")
    part = parser.parse_args(arguments[:1]).part
    examples = [line for line in str(__doc__).splitlines() if f"benchmark {part} " in line]
    parser = argparse.ArgumentParser(
        prog=f"bigdet benchmark {part}",
        description=_docstring(part),
        epilog="\n".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file of an experiment")
    PARTS[part](parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options to change"
    )
    parser.set_defaults(part=part)
    return parser.parse_intermixed_args(arguments[1:])


def _docstring(part: str) -> str | None:
    """Return the docstring of a part without importing it, which takes seconds."""
    file = Path(__file__).parents[2] / "benchmarks" / f"{part}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
