"""The training command, in which one rank or all die at a certain disk call of a save.

DYING_RANK says which rank counts, DYING_CALL its number of the call (1 is the first of its second
save), DYING_ALL whether the other ranks and the launcher die with it. Calls are openings of files
to write, syncs, renames, deletions and notes to other ranks. ``kill_often.py`` starts it.
"""

import os
import signal
from pathlib import Path

from bigdet import messages
from bigdet.cli.running import run_command
from bigdet.engine import keeping, writing
from bigdet.train import main

SAVE = 2
counts = {"saves": 0, "calls": 0}


def die() -> None:
    if os.environ["DYING_ALL"] == "1":
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(original):
    def call(*args, **kwargs):
        is_read = original is opened and (kwargs.get("mode") or "".join(args[1:2]) or "r")[0] == "r"
        if counts["saves"] == SAVE and not is_read:
            counts["calls"] += 1
            if counts["calls"] == int(os.environ["DYING_CALL"]):
                die()
        return original(*args, **kwargs)

    return call


def counting(original):
    def call(*args, **kwargs):
        counts["saves"] += 1
        return original(*args, **kwargs)

    return call


opened = Path.open
if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["DYING_RANK"]:
        writing.write = counting(writing.write)
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        Path.open, keeping.delete = deadly(Path.open), deadly(keeping.delete)
        messages.Notes.leave = deadly(messages.Notes.leave)
    run_command(main)
