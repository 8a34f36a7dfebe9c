"""The ``deepspeed`` command: DeepSpeed's launcher, which here also accepts ``-m`` for ``--module``.

    deepspeed --num_gpus 8 -m bigdet.train CONFIG

``ds``, which DeepSpeed also installs, is the original command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepspeed.launcher import runner


def main() -> None:
    """Run DeepSpeed's launcher."""
    runner.main(with_module(sys.argv[1:]))


def with_module(words: Sequence[str]) -> list[str]:
    """Return the command line with ``--module`` in place of the launcher's ``-m``.

    Words after the user's script belong to the script. DeepSpeed's parser says where they begin. It
    does not get ``-m`` as an option: it would then take ``--launcher_args "-mca ..."`` for one.
    """
    words = list(words)
    if "-m" in words:
        place = words.index("-m")
        changed = [*words[:place], "--module", *words[place + 1 :]]
        script = len(words) - len(runner.parse_args(changed).user_args) - 1
        if place < script:
            return changed
    return words
