"""Logging for people or machines, ``metrics.jsonl``, and boards."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.logs.boards import Board

logger = logging.getLogger(__name__)

MOST_WAITING = 1 << 20
"""So many bytes of ``metrics.jsonl`` at most wait in memory while they cannot be written."""


class JsonFormatter(logging.Formatter):
    """Writes a line as a JSON object: ``time``, ``level``, ``logger``, ``message``, ``values``.

    ``values`` has the numbers that ``metrics.jsonl`` gets; only lines with numbers have it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; numbers that are not finite become null."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "values"):
            line["values"] = record.values
        return orjson.dumps(line, default=str).decode()


class LogFile(logging.FileHandler):
    """A log file. On a full disk, lines wait in the buffer of the file as long as they fit."""

    has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, a name of logging
        """Warn once where a line cannot be written, in place of a traceback for each line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_warned:
            self.has_warned = True  # first: the warning is a line of this file too
            logger.warning("%s: lines may be missing here, %s", self.baseFilename, error)


def setup_logging(rank: int, file: Path | None = None, as_json: bool = False) -> None:
    """Set the handlers, once: rank 0 to the console, every rank to its own file.

    Args:
        rank: written in each line of the file.
        file: the log file of this rank; None for commands without a run folder.
        as_json: the console gets JSON objects, one per line.
    """
    root = logging.getLogger("bigdet")
    root.handlers.clear()
    root.setLevel(logging.INFO)
    root.propagate = False
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    console.setFormatter(JsonFormatter() if as_json else plain)
    root.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = LogFile(file)
        layout = f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(layout))
        root.addHandler(handler)


class MetricsWriter:
    """Appends objects to ``metrics.jsonl``, and shows numbers and pictures on boards; on rank 0.

    Attributes:
        boards: get all numbers and pictures.
    """

    def __init__(self, file: Path, boards: Sequence[Board] = ()) -> None:
        """Open the file for appending.

        Args:
            file: ``metrics.jsonl``.
            boards: also get every number; closed with the file.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("ab", buffering=0)
        self._waiting, self._has_warned = bytearray(), False
        self.boards = boards

    def write(
        self, values: Mapping[str, Any], total_step: int, names: Mapping[str, str] | None = None
    ) -> None:
        """Add one line; while the disk is full, it waits for a later one.

        Args:
            values: the object, numbers that are not finite become null; boards get them as they
                are.
            total_step: optimizer steps over all phases, the axis of boards.
            names: what boards call some of the numbers. None: as in the file.
        """
        if len(self._waiting) < MOST_WAITING:
            self._waiting += f"{to_json(values)}\n".encode()
        self._write_waiting()
        scalars = {
            (names or {}).get(key, key): value
            for key, value in values.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        for board in self.boards:
            board.add_scalars(scalars, total_step)

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "%s: cannot be written (%s). The run continues, and keeps its lines in memory "
                    "until they can be, up to %d MiB. Make room.",
                    self._file.name, error, MOST_WAITING >> 20,
                )  # fmt: skip
            self._has_warned = True
        else:
            self._has_warned = False

    def show(self, name: str, picture: NDArray[np.uint8], total_step: int) -> None:
        """Show a picture ``(H, W, 3)`` RGB on all boards."""
        for board in self.boards:
            board.add_picture(name, picture, total_step)

    def close(self) -> None:
        """Close the file and the boards."""
        self._write_waiting()
        self._file.close()
        for board in self.boards:
            board.close()


def cut_metrics(file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Cut ``metrics.jsonl`` back to the objects to keep; half-written lines go too.

    What older runs wrote as NaN, which JSON does not have, becomes null.

    Args:
        file: may be absent.
        keep: returns whether an object was written before the checkpoint.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line, parse_constant=lambda _: None)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and keep(values):
            kept.append(to_json(values) + "\n")
    write_text(file, "".join(kept))
