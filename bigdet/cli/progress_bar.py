"""The progress of a long command."""

from __future__ import annotations

import sys
import time

BAR_WIDTH = 24


class ProgressBar:
    """Prints the progress: once a second on a terminal, twice a minute to a file."""

    def __init__(self, *, shows_end: bool = True) -> None:
        """Begin.

        Args:
            shows_end: print a last line, however soon after the one before.
        """
        self._shows_end = shows_end
        self._start = self._last = time.monotonic()
        self._before: int | None = None
        self._is_complete = False
        self._is_terminal = sys.stdout.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Print a line if it is time for one, after ``done`` of ``total`` images."""
        if self._is_complete:
            return
        self._is_complete, now = done >= total, time.monotonic()
        if self._before is None:  # images of shards finished before take no time
            self._before, self._start = done, now
        seconds = 1.0 if self._is_terminal else 30.0
        if now - self._last < seconds and (done < total or not self._shows_end):
            return
        self._last = now
        rate = (done - self._before) / max(now - self._start, 1e-9)
        left = f", {(total - done) / rate / 60:.1f} min left" if rate else ""
        bar = "#" * (BAR_WIDTH * done // max(total, 1))
        line = f"[{bar:{BAR_WIDTH}}] {done} / {total} images, {rate:.0f} a second{left}"
        end = "\r" if self._is_terminal and done < total else "\n"
        print(f"{line:78}", end=end, flush=True)
