"""List the configs that come with bigdet.

    bigdet configs
    bigdet configs --show quickstart

Each can be given by its name, from any folder: ``bigdet train quickstart``, ``bigdet sweep
sweeps/small``; a file of that name in the current folder comes first. Those of ``data/``,
``model/`` and ``engine/`` are fragments, for ``include`` of a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import command_parser
from bigdet.cli.running import run_command
from bigdet.config.layers import read_yaml
from bigdet.config.shipped import SHIPPED, find_config, list_shipped


def main(argv: Sequence[str]) -> int:
    """List them, or show one."""
    parser = command_parser("configs", __doc__)
    parser.add_argument("--show", type=Path, metavar="NAME", help="print this config")
    arguments = parser.parse_args(argv)
    if arguments.show is not None:
        file = find_config(arguments.show)
        read_yaml(file)  # says what is wrong with it, or with its name
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    shipped = list(list_shipped())
    width = max(len(name) for name, _ in shipped)
    print(f"In {SHIPPED}, each found by its name from any folder:")
    for name, first in shipped:
        print(f"  {name:{width}}  {first}")
    return 0


if __name__ == "__main__":
    run_command(main)
