"""Measure one part of bigdet and an alternative in the same process; print one JSON object.

Its command line is in ``cli/arguments/benchmark.py``, each part in ``benchmarks/PART.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.benchmark import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import importlib
from collections.abc import Sequence

from bigdet.cli.running import run_command
from bigdet.config.load import load_config
from bigdet.host.strict_json import to_json


def main(argv: Sequence[str]) -> int:
    """Measure the named part and print the result."""
    arguments = parse_arguments(argv)
    module = importlib.import_module(f"bigdet.benchmarks.{arguments.part}")
    config = load_config(arguments.config, arguments.overrides)
    print(to_json(module.run(config, arguments)))
    return 0


if __name__ == "__main__":
    run_command(main)
