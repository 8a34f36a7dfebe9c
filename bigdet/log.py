"""Where a run says what it does: logging for people, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigdet.run_dir import write_text

logger = logging.getLogger(__name__)


def setup_logging(rank: int, file: Path | None = None) -> None:
    """Set the handlers, once: rank 0 to the console, every rank to its own file.

    Args:
        rank: stands in the lines of the file.
        file: the log file of this rank; None for commands without a run folder.
    """
    root = logging.getLogger("bigdet")
    root.handlers.clear()
    root.setLevel(logging.INFO)
    root.propagate = False
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file)
        layout = f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(layout))
        root.addHandler(handler)


class MetricsWriter:
    """Appends objects to ``metrics.jsonl`` and scalars to TensorBoard; exists on rank 0 alone."""

    def __init__(self, file: Path, tensorboard: Path | None, first_step: int) -> None:
        """Open both for appending.

        Args:
            file: ``metrics.jsonl``.
            tensorboard: folder of the event files; None for none.
            first_step: TensorBoard forgets what an earlier process wrote from this step on.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard is not None:
            # Imported here: it takes a second and only rank 0 of a training run needs it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=first_step)

    def write(self, values: Mapping[str, Any], total_step: int) -> None:
        """Add one line.

        Args:
            values: the object; numbers also go to TensorBoard.
            total_step: optimizer steps over all phases, TensorBoard's axis.
        """
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for key, value in values.items():
            if isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(f"{key}", value, total_step)
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def cut_metrics(file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Cut ``metrics.jsonl`` back to the objects to keep; half-written lines go too.

    Args:
        file: may be absent.
        keep: tells whether an object was written before the checkpoint.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and keep(values):
            kept.append(line + "\n")
    write_text(file, "".join(kept))
