"""Requests to stop: SIGTERM or SIGUSR1 to any rank, a file ``stop`` in the run folder, or an end.

The end of the launcher: SIGTERM to ``deepspeed`` ends that process alone, and its ranks would run
on unseen.
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from types import FrameType

from bigdet import distributed

_requested = False
_launcher: list[int] = []  # the processes above this one that belong to a launcher, nearest first


def listen() -> None:
    """Note SIGTERM and SIGUSR1 from now on; the loop asks for them after every step."""
    _launcher[:] = _find_launcher()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def stop_requested(file: Path) -> bool:
    """Tell on every rank whether any rank was asked to stop (a collective, one integer).

    Args:
        file: ``OUTPUT/stop``; rank 0 looks for it and removes it, so that the next start goes on.
    """
    found = distributed.is_main() and file.exists()
    if found:
        file.unlink(missing_ok=True)
    return distributed.any_rank(_requested or found or _launcher_is_gone())


def _find_launcher() -> list[int]:
    """Return the process that started this rank, and the one that started that, if launchers."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return []  # no Linux, or it ended already
    if b"deepspeed.launcher.launch" in words:  # which the deepspeed command, or ssh, started
        return [parent, _parent_of(parent)]
    return [parent] if b"torch.distributed.run" in words or b"torchrun" in words else []


def _launcher_is_gone() -> bool:
    """Tell whether a process that was to end with this one has ended before it."""
    if not _launcher:
        return False
    chain = itertools.pairwise([os.getpid(), *_launcher])
    return any(_parent_of(process) != above for process, above in chain)


def _parent_of(process: int) -> int:
    """Return the number of the process that started another one, or took it over; 0 if gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])  # after the name: state, parent


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
