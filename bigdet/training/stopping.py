"""Requests to stop: SIGTERM or SIGUSR1 to any rank, a file ``stop``, or the launcher's end.

SIGTERM to ``deepspeed`` ends only that process, and its ranks would continue unnoticed.
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from types import FrameType

from bigdet import distributed

_requested = False
_launcher: list[int] = []  # parent, and its parent, if they are a launcher's


def listen() -> None:
    """Handle SIGTERM and SIGUSR1 from now on; the loop asks for them in every step."""
    _launcher[:] = _find_launcher()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def stop_requested(file: Path) -> bool:
    """Return on all ranks whether any was asked to stop (a collective of one integer).

    Args:
        file: ``OUTPUT/stop``.
    """
    return distributed.any_rank(is_asked(file))


def is_asked(file: Path) -> bool:
    """Return whether this rank was asked to stop.

    Args:
        file: ``OUTPUT/stop``; rank 0 removes it, so that the next start continues.
    """
    found = distributed.is_main() and file.exists()
    if found:
        file.unlink(missing_ok=True)
    return _requested or found or _launcher_is_gone()


def _find_launcher() -> list[int]:
    """Return the parent, and its parent, if they belong to a launcher; nearest first."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return []  # not Linux, or the parent has ended
    if b"deepspeed.launcher.launch" in words:  # started by the deepspeed command or ssh
        return [parent, _parent_of(parent)]
    return [parent] if b"torch.distributed.run" in words or b"torchrun" in words else []


def _launcher_is_gone() -> bool:
    """Return whether a process of the launcher has ended before this one."""
    if not _launcher:
        return False
    chain = itertools.pairwise([os.getpid(), *_launcher])
    return any(_parent_of(process) != above for process, above in chain)


def _parent_of(process: int) -> int:
    """Return the id of a process's parent, at first the one that started it; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])  # after the name: state, parent


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
