"""How every command ends: a user's mistake is one message and exit code 1, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from bigdet import distributed
from bigdet.errors import explain, explain_killed

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as error:
    # Commands import this module first, so that a broken pair is told before it is used.
    sys.exit(
        f"error: this torchvision does not work with this torch: {error}. Install both from the "
        f"same place: pip install --force-reinstall --constraint launch/constraints.txt torch "
        f"torchvision"
    )

STOPPED = 75
"""Exit code of a run that stopped on request, with a checkpoint written."""


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def positive(text: str) -> int:
    """Read a whole number above 0: a ``type`` of argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number above 0")
    return value


def run_command(main: Callable[[Sequence[str]], int], interrupted: str = "stopped") -> None:
    """Run a command's ``main`` and end the process with its exit code.

    ``ValueError`` and ``OSError`` are what a user can cause, and another rank may be gone: they end
    in one message and exit code 1. ``BIGDET_TRACEBACK=1`` shows the traceback. An error that all
    ranks share is told once. Ctrl-C ends with one line too.

    Args:
        main: takes the arguments and returns the exit code.
        interrupted: what Ctrl-C says.
    """
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # argparse: it has told what is wrong, and its own code for it is 2
        code = 1 if end.code else 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        code = INTERRUPTED
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        lost = distributed.lost_peer(error) or explain_killed(error)
        is_bug = isinstance(error, RuntimeError) and not (lost or isinstance(error, ValueError))
        if is_bug or os.environ.get("BIGDET_TRACEBACK") == "1":
            raise
        if distributed.must_tell(error):
            where = "" if distributed.is_main() else f" (rank {distributed.rank()})"
            sys.stderr.write(f"error{where}: {lost or explain(error)}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # The group is not torn down after a failure: that is a collective and would hang.
    os._exit(code)
