"""How much memory this process has used at most: private pages, and those of files (Linux)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

SECONDS = 0.02
"""Between two looks. Oftener, the thread would take its time from what it watches."""


class Watch:
    """Looks at this process again and again, in a thread, and says the most that it saw.

    The most in all (``resident``) is the kernel's own count, and misses nothing.
    """

    def __init__(self) -> None:
        self._private = self._shared = 0
        self.restart()
        threading.Thread(target=self._look_often, daemon=True).start()

    def restart(self) -> None:
        """Forget what was seen so far."""
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own count
        self._private = self._shared = 0

    def most(self) -> dict[str, int]:
        """Give the most bytes since the last restart: ``resident``, ``private``, ``shared``."""
        self._look()
        lines = Path("/proc/self/status").read_text().splitlines()
        (most,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        return {"resident": most, "private": self._private, "shared": self._shared}

    def _look_often(self) -> None:
        while True:
            self._look()
            time.sleep(SECONDS)

    def _look(self) -> None:
        private, shared = memory_now()
        self._private, self._shared = max(self._private, private), max(self._shared, shared)


def memory_now() -> tuple[int, int]:
    """Give the bytes of private pages that are in memory now, and of pages of files."""
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm") as file:
        _, resident, shared = (int(word) * page for word in file.read().split()[:3])
    return resident - shared, shared
