"""Measure one part of bigdet beside something else in the same process; print one JSON object.

python tools/benchmark.py stream configs/swin_t_direct.yaml --workers 2
python tools/benchmark.py step configs/quickstart.yaml
python tools/benchmark.py predict configs/r50_direct.yaml --phase finetune
python tools/benchmark.py step configs/quickstart.yaml --engines all --ranks 2
python tools/benchmark.py resume configs/quickstart.yaml --samples 118000
python tools/benchmark.py evaluate configs/r50_direct.yaml data.val.shards=data/coco/val
python tools/benchmark.py evaluate configs/r50_direct.yaml --images 80000 --classes 365
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from bigdet.commands import run_command
from bigdet.config.check import check_config
from bigdet.config.load import load_config

PARTS = ("stream", "step", "predict", "evaluate", "resume")
"""What can be measured, by ``benchmarks/PART.py``: ``add_arguments(parser)`` says
what it wants to know beside the config, ``run(config, arguments)`` returns the numbers."""


def main(argv: Sequence[str]) -> int:
    """Measure the part that the arguments name and print what came out."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=PARTS, help="PART --help tells more")
    part = parser.parse_args(argv[:1]).part
    module = importlib.import_module(
        f"bigdet.benchmarks.{part}"
    )  # each has heavy imports of its own
    examples = [line for line in str(__doc__).splitlines() if f"benchmark.py {part} " in line]
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {part}",
        description=module.__doc__,
        epilog="\n".join(["examples:", *examples]),
        formatter_class=raw,
    )
    parser.add_argument("config", type=Path, help="YAML file of an experiment")
    module.add_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options to change"
    )
    arguments = parser.parse_intermixed_args(argv[1:])
    config = load_config(arguments.config, arguments.overrides)
    check_config(config)
    print(json.dumps(module.run(config, arguments)))
    return 0


if __name__ == "__main__":
    run_command(main)
