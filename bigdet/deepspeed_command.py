"""The ``deepspeed`` command: DeepSpeed's own, which here takes ``-m`` as ``--module`` too.

    deepspeed --num_gpus 8 -m bigdet.train CONFIG

``ds``, which DeepSpeed installs as well, is its own command without that.
"""

from __future__ import annotations

import argparse
from typing import Any

from deepspeed.launcher import runner


class Parser(argparse.ArgumentParser):
    """Reads ``-m`` as ``--module``, where the parser has no ``-m`` of its own."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument."""
        return super().add_argument(
            *(("-m", *names) if names == ("--module",) else names), **settings
        )


def main() -> None:
    """Run DeepSpeed's own runner; only the parser of its command line is another."""
    argparse.ArgumentParser = Parser  # type: ignore[misc]
    runner.main()
