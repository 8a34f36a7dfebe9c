"""Ranks of a measurement, started on this host."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from bigdet import distributed


def run_ranks(
    measure: Callable[[], dict[str, Any]], num_ranks: int, what: str
) -> list[dict[str, Any]]:
    """Call a function on so many ranks of this host and return what they returned.

    Args:
        measure: can be pickled; gives numbers by name.
        num_ranks: processes, which share the threads of this one.
        what: is measured, for messages.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            words = (num_ranks, _free_port(), folder, measure)
            spawn(_rank, words, num_ranks)  # type: ignore[no-untyped-call]
        except ProcessException as error:
            raise ValueError(f"a rank of {what} failed: {error}") from error
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _free_port() -> int:
    """Find a port below those that the system gives to connections of other programs."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ValueError("no free port between 20000 and 30000 in 100 tries")


def _rank(
    rank: int, num_ranks: int, port: int, folder: Path, measure: Callable[[], dict[str, Any]]
) -> None:
    """Join the group as one rank, measure, and write the numbers."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    distributed.start()
    numbers = measure()
    (folder / f"{rank}.json").write_text(json.dumps(numbers))
    distributed.barrier()  # rank 0 holds the store
    os._exit(0)
