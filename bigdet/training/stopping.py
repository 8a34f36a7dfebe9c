"""Requests to stop: SIGTERM or SIGUSR1 to any rank, or a file ``stop`` in the run folder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from bigdet import distributed

_requested = False


def listen() -> None:
    """Note SIGTERM and SIGUSR1 from now on; the loop asks for them after every step."""
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
    return distributed.any_rank(_requested or found)


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
