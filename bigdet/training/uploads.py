"""Checkpoints on their way to ``checkpoint.remote``: no step, save or stop waits for them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bigdet import distributed
from bigdet.engine import keeping
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Save
from bigdet.host import errors

logger = logging.getLogger(__name__)


class Uploads:
    """Copies one checkpoint after the other, in a thread of each rank; failures are warnings.

    All ranks start the same copies in the same order, as each waits for all ranks at its end.
    """

    def __init__(self, remote: Remote) -> None:
        """Prepare; nothing is copied yet."""
        self._remote = remote
        self._name = ""
        self._thread: threading.Thread | None = None
        self._deadline = math.inf

    @property
    def address(self) -> str:
        """Where the copies go."""
        return self._remote.address

    @property
    def under_way(self) -> str:
        """The name of the checkpoint that is being copied, whose files have to stay; "" if none."""
        return self._name if self._thread is not None and self._thread.is_alive() else ""

    def start(self, save: Save, is_kept: Callable[[str], bool], needed: Mapping[str, Path]) -> None:
        """Start to copy a checkpoint once the one before is copied; see `Remote.copy`."""
        arguments = (self._thread, save, is_kept, needed)
        self._thread = threading.Thread(target=self._copy, args=arguments, daemon=True)
        self._name = save.folder.name
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the copies, but no longer than so many seconds; what is left then is not copied.

        Args:
            seconds: may be infinite.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._deadline = time.monotonic() + seconds
        thread.join(None if math.isinf(seconds) else seconds + 1)  # it may have to hear of the end
        if thread.is_alive():
            self._warn(f"checkpoint {self._name}", f"its copy takes longer than {seconds:g} s")

    def _copy(
        self,
        before: threading.Thread | None,
        save: Save,
        is_kept: Callable[[str], bool],
        needed: Mapping[str, Path],
    ) -> None:
        """Copy a checkpoint (a thread of each rank)."""
        if before is not None:
            before.join()
        started = time.perf_counter()
        try:
            self._remote.copy(save, is_kept, self._must_end, needed)
        except Exception as error:  # each file system has errors of its own
            if keeping.numbers(save.folder.parent).get(save.folder.name) != save.number:
                logger.info(f"{save.folder} is written again: its earlier state is not copied")
            elif self._must_end():
                self._warn(str(save.folder), "other ranks have not finished their copies")
            else:
                self._warn(str(save.folder), distributed.lost_peer(error) or errors.explain(error))
            return
        if distributed.is_main():
            seconds = time.perf_counter() - started
            logger.info(f"checkpoint copied to {self._remote.address} in {seconds:.2f} s")

    def _warn(self, what: str, reason: str) -> None:
        logger.warning("%s is on this machine only, not at %s: %s", what, self.address, reason)

    def _must_end(self) -> bool:
        """Tell the thread whether to wait for the other ranks no longer."""
        return time.monotonic() > self._deadline
