"""Traces of some steps, for Perfetto, and snapshots of a GPU's memory (``log.profile``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bigdet import distributed
from bigdet.config.log import ProfileConfig
from bigdet.run_dir import RunDir

logger = logging.getLogger(__name__)

MEMORY_EVENTS = 1_000_000
"""How many allocations a snapshot remembers."""


class Profile:
    """Records the steps of a phase that ``log.profile`` names, on every rank."""

    def __init__(
        self, config: ProfileConfig | None, run_dir: RunDir, phase: str, device: torch.device
    ) -> None:
        """Prepare; without a config nothing is recorded."""
        self._config, self._run_dir, self._phase, self._device = config, run_dir, phase, device
        self._profiler: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record a block as a step of the phase if it is one of those to record."""
        if self._config is None or not self._config.steps[0] <= number <= self._config.steps[1]:
            yield
            return
        if self._profiler is None:
            self._begin()
        with record_function(f"{self._phase} step {number}"):
            yield
        if number == self._config.steps[1]:
            self.close()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def close(self) -> None:
        """Write what has been recorded, if anything."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self._write(profiler)
        except OSError as error:  # a full disk
            logger.warning("the profile of %s cannot be written: %s", self._phase, error)
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: profile) -> None:
        rank = distributed.rank()
        file = self._run_dir.trace(self._phase, rank)
        file.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(file))
        logger.info("profile of %s: %s (open it in https://ui.perfetto.dev)", self._phase, file)
        if self._device.type == "cuda":
            write_memory(self._run_dir.memory_snapshot(self._phase, rank))


def write_memory(file: Path) -> None:
    """Write what is in a GPU's memory, for https://docs.pytorch.org/memory_viz.

    With the calls that allocated it, if that is being recorded.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
    logger.info("GPU memory: %s (open it in https://docs.pytorch.org/memory_viz)", file)
