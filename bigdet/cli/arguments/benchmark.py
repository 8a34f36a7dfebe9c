"""Measure one part of bigdet beside something else in the same process; print one JSON object.

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
    parser.add_argument("--phase", help="default: the first of the config")
    parser.add_argument("--images", type=positive, default=300, help="per measurement; default 300")
    parser.add_argument("--workers", type=int, help="loader processes; default data.workers")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="of each in turn; the median counts; default 5"
    )


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="whose batch, size and norm mode; default: the first")
    parser.add_argument("--objects", type=positive, default=20, help="per image; default 20")
    parser.add_argument("--rounds", type=positive, default=5, help="measured steps each; default 5")
    parser.add_argument(
        "--engines", help="compare with DDP instead: all, or some of zero0,zero1,zero2,zero3,fsdp"
    )
    parser.add_argument("--ranks", type=positive, default=2, help="of --engines; default 2")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", help="whose model and test size; default: the last")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="measured passes each; default 5"
    )
    parser.add_argument("--images", type=positive, default=1, help="of a pass; default 1")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=positive, default=5000, help="default 5000")
    parser.add_argument("--detections", type=positive, default=100, help="per image; default 100")
    parser.add_argument("--seed", type=int, default=0, help="of the made detections; default 0")
    parser.add_argument(
        "--classes", type=positive, help="so many made-up classes, boxes alone, no pycocotools"
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=positive, help="as if the set had so many; default: its own"
    )
    parser.add_argument("--steps", type=positive, default=40, help="of the first start; default 40")
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
"""What can be measured, by ``benchmarks/PART.py``, and the options of each."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bigdet benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=list(PARTS), help="PART --help tells more")
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
    """Return what a part says of itself, without its imports, which take seconds."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{part}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
