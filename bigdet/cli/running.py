"""How every command ends: a user's mistake is one message and exit code 1, never a traceback."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from bigdet.host.errors import explain, explain_full, explain_killed

Options = TypeVar("Options")

STOPPED = 75
"""Exit code of a run that stopped on request, with a checkpoint written."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
CLOSED_PIPE = 141
"""Exit code when the reader of the output, such as ``head``, has ended, as shells have SIGPIPE."""


def parse_early(parse: Callable[[Sequence[str]], Options]) -> Options | None:
    """Answer --help and mistakes in the command line before torch is imported, which takes seconds.

    Args:
        parse: reads the command line. ``run_command`` reports the errors that it raises.

    Returns:
        What ``parse`` returns; None if it raises an error.
    """
    try:
        with contextlib.suppress(ValueError):
            return parse(sys.argv[1:])
    except SystemExit as end:  # as in run_command
        sys.exit(1 if end.code else 0)
    return None


def answer_early(parse: Callable[[Sequence[str]], object]) -> None:
    """Do as ``parse_early``; then check that torch and torchvision fit together.

    From here until ``run_command`` nothing is collected: imports make a million objects and free
    few, and searching them for garbage takes a fifth of the time of all imports.
    """
    parse_early(parse)
    gc.disable()
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        sys.exit(
            f"error: this torchvision does not work with this torch: {error}. Install both from "
            f"the same place: pip install --force-reinstall torch torchvision"
        )


def run_command(main: Callable[[Sequence[str]], int], interrupted: str = "stopped") -> None:
    """Run a command's ``main`` and end the process with its exit code.

    Errors that a user can cause (``ValueError``, ``OSError``), and the loss of another rank, end in
    one message and exit code 1. ``BIGDET_TRACEBACK=1`` shows the traceback. An error that all ranks
    share is reported once. Ctrl-C also ends with one line.

    Args:
        main: takes the arguments and returns the exit code.
        interrupted: message after Ctrl-C.
    """
    gc.freeze()  # what was imported stays; later collections, and forked processes, skip it
    gc.enable()
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # argparse has printed its message; its own exit code is 2
        code = 1 if end.code else 0
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        code = INTERRUPTED
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            os._exit(CLOSED_PIPE)
        ranks = sys.modules.get("bigdet.distributed")  # making shards needs neither it nor torch
        lost = (ranks and ranks.lost_peer(error)) or explain_killed(error) or explain_full(error)
        is_bug = isinstance(error, RuntimeError) and not (lost or isinstance(error, ValueError))
        if is_bug or os.environ.get("BIGDET_TRACEBACK") == "1":
            raise
        if ranks is None or ranks.must_report(error):
            where = "" if ranks is None or ranks.is_main() else f" (rank {ranks.rank()})"
            sys.stderr.write(f"error{where}: {lost or explain(error)}\n")
        else:
            ranks.wait_for_report()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # The group is not torn down after a failure: that is a collective and would hang.
    os._exit(code)


def _reader_has_gone() -> bool:
    """Return whether the closed pipe is standard output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a closed end is reported even so
    return bool(poll.poll(0))
