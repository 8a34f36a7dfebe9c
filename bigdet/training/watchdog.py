"""Ends a run that makes no progress, and shows what each of its ranks is doing.

If one rank waits forever, or loops, the others wait in their next collective forever. Each rank
watches itself: after ``log.stall_seconds`` without progress of the training loop, it writes the
stacks of its threads to the console and to its log, and exits.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from bigdet.host import errors

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Between stacks and exit: every rank has time to write its own before the launcher kills it."""


class Watchdog:
    """Used as a context manager around the training of a run.

    Attributes:
        where: position and current activity of the loop, for messages.
    """

    def __init__(self, seconds: float | None, log: Path) -> None:
        """Prepare; the first call of ``at`` starts the clock.

        Args:
            seconds: time without progress after which the run ends; None for never.
            log: this rank's log file, to which the stacks are added.
        """
        self.where = "start"
        self._seconds = seconds
        self._log = log
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        if seconds is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._seconds is None:
            return
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def at(self, where: str) -> None:
        """Note progress: what the loop does from now on."""
        self.where = where
        errors.at(where)
        if self._seconds is None:
            return
        with self._changed:
            begins = self._deadline is None
            self._deadline = time.monotonic() + self._seconds
            if begins:
                self._changed.notify()
        # For a call into C that holds the GIL: then the thread below cannot run.
        last = self._seconds + 2 * GRACE_SECONDS
        faulthandler.dump_traceback_later(last, exit=True, file=sys.stderr)

    def alive(self) -> None:
        """Note progress within the same activity."""
        self.at(self.where)

    def _watch(self) -> None:
        """Wait until the deadline has passed (a thread)."""
        with self._changed:
            while not self._is_closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._is_closed:
                return
        self._end()

    def _end(self) -> None:
        """Write the stacks of this rank, and exit."""
        logger.error(
            "%s: no progress for %g s (log.stall_seconds). This rank's stacks follow; the rank "
            "whose stacks differ from the others' is the one that stalls. The same command "
            "continues from the newest checkpoint.",
            self.where,
            self._seconds,
        )
        with self._log.open("a") as file:
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(sys.stderr)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
