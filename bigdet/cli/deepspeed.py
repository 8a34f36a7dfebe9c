"""The ``deepspeed`` command: DeepSpeed's own, which here takes ``-m`` as ``--module`` too.

    deepspeed --num_gpus 8 -m bigdet.train CONFIG

``ds``, which DeepSpeed installs as well, is its own command without that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepspeed.launcher import runner


def main() -> None:
    """Run DeepSpeed's own runner."""
    runner.main(with_module(sys.argv[1:]))


def with_module(words: Sequence[str]) -> list[str]:
    """Return the command line with ``--module`` for an ``-m`` of the launcher's own.

    What comes after the user's script is the script's. DeepSpeed's parser says where that begins;
    it is not given an ``-m`` to know, for it would take ``--launcher_args "-mca ..."`` for one.
    """
    words = list(words)
    if "-m" in words:
        place = words.index("-m")
        changed = [*words[:place], "--module", *words[place + 1 :]]
        script = len(words) - len(runner.parse_args(changed).user_args) - 1
        if place < script:
            return changed
    return words
