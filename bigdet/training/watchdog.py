"""Ends a run that stands still, and says where each of its ranks stands.

A rank that waits for something that never comes, or loops, keeps the others in their next
collective for good. Each rank watches itself: where the loop notes no progress for
``log.stall_seconds``, it writes the stacks of its threads to the console and to its log, and ends.
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
"""Between the stacks and the end, so that every rank writes its own before a launcher ends it."""


class Watchdog:
    """Used as a context manager around the training of a run.

    Attributes:
        where: what the loop does now, for messages.
    """

    def __init__(self, seconds: float | None, log: Path) -> None:
        """Watch nothing yet: the first call of ``at`` begins.

        Args:
            seconds: without progress until the run ends; None never ends it.
            log: file of this rank, for the stacks.
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
        """Note that the loop has come somewhere."""
        self.where = where
        errors.at(where)
        if self._seconds is None:
            return
        with self._changed:
            begins = self._deadline is None
            self._deadline = time.monotonic() + self._seconds
            if begins:
                self._changed.notify()
        # Where a call into C holds Python's lock, no thread of Python's gets to say anything.
        last = self._seconds + 2 * GRACE_SECONDS
        faulthandler.dump_traceback_later(last, exit=True, file=sys.stderr)

    def alive(self) -> None:
        """Note progress at the same place."""
        self.at(self.where)

    def _watch(self) -> None:
        """Wait until the deadline has passed; runs in a thread."""
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
        """Write what this rank does, and end it."""
        logger.error(
            "%s: no progress for %g s (log.stall_seconds). This rank's stacks follow; the rank "
            "that stands elsewhere than the others is the one that stalls. The same command goes "
            "on from the newest checkpoint.", self.where, self._seconds,
        )  # fmt: skip
        with self._log.open("a") as file:
            faulthandler.dump_traceback(file)
        faulthandler.dump_traceback(sys.stderr)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
