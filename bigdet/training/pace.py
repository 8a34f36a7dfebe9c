"""How evenly the ranks work: which one the others wait for.

Ranks meet in every step, inside collectives, so that all of their steps take equally long. What
differs is the wait for data, and the forward pass: it has no collectives, but for gathered weights
(whose wait is left out under FSDP2 and of frozen backbones; not under ZeRO-3 or with
``model.compile``, where only a slow data stream is seen) and synchronized BN.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bigdet.config.engine import shards_frozen
from bigdet.config.run import RunConfig
from bigdet.models.detector import Detector
from bigdet.models.frozen import frozen_layers


class Mark:
    """A moment at which a device has done all that was sent to it before."""

    def __init__(self, device: torch.device) -> None:
        """Make it now; the host goes on."""
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._seconds = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float:
        """Return the time between two moments that have passed on the device."""
        if self._event is not None and earlier._event is not None:
            milliseconds: float = earlier._event.elapsed_time(self._event)
            return milliseconds / 1000
        return self._seconds - earlier._seconds


class ForwardClock:
    """Times the forward passes of this rank, without its waits for gathered weights."""

    def __init__(self, module: nn.Module, gathered: Sequence[nn.Module], device: torch.device):
        """Begin.

        Args:
            module: that is trained, once its engine has it.
            gathered: modules in it whose weights are gathered when their forward pass begins.
            device: of the module.
        """
        self._device, self._seconds = device, 0.0
        self._marks: list[Mark] = []  # begin and end, in turn
        self._waits: list[Mark] = []
        self._before: list[tuple[int, list[Mark]]] = []  # of the step before, with their signs
        self._hooks = [
            module.register_forward_pre_hook(self._note),
            module.register_forward_hook(self._note),
        ]
        for part in gathered:
            self._hooks.append(part.register_forward_pre_hook(self._note_wait, prepend=True))
            self._hooks.append(part.register_forward_pre_hook(self._note_wait))

    def _note(self, *arguments: Any) -> None:
        if torch.is_grad_enabled():  # a training step
            self._marks.append(Mark(self._device))

    def _note_wait(self, *arguments: Any) -> None:
        if len(self._marks) % 2:  # not when a checkpointed part runs again in the backward pass
            self._waits.append(Mark(self._device))

    def end_step(self) -> None:
        """Begin another step; the device has done the one before the last."""
        self._seconds += sum(
            sign * end.seconds_since(begin)
            for sign, marks in self._before
            for begin, end in zip(marks[::2], marks[1::2], strict=True)
        )
        self._before = [(1, self._marks), (-1, self._waits)]
        self._marks, self._waits = [], []

    def take(self) -> float:
        """Return the seconds since the last call; the device has done all steps."""
        self.end_step()
        self.end_step()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()


def clock_for(detector: Detector, config: RunConfig, device: torch.device) -> ForwardClock:
    """Begin to time the forward passes of a detector that an engine has."""
    parts: list[nn.Module] = []
    if not config.model.compile:
        if config.engine.kind == "fsdp":
            parts += [part for unit in detector.units for part in unit]
        if shards_frozen(config.engine):
            parts += frozen_layers(detector)
    return ForwardClock(detector, parts, device)


def find_straggler(
    seconds: float, data_seconds: NDArray[np.float64], forward_seconds: NDArray[np.float64]
) -> tuple[int, float]:
    """Estimate which rank the others wait for, and for which part of the time.

    A rank's own work is its wait for data and, for the rest of its steps, c times its forward
    passes. The same c holds for all ranks, and it is as large as fits: the slowest rank waits for
    none.

    Args:
        seconds: of some steps, all together.
        data_seconds: ``(R,)`` wait for data in these steps, of each of R > 1 ranks.
        forward_seconds: ``(R,)`` time of their forward passes.

    Returns:
        The slowest rank, and the mean over the other ranks of the part of the time that they wait.
    """
    if not forward_seconds.all():
        forward_seconds = np.ones_like(data_seconds)
    left = np.maximum(seconds - data_seconds, 0.0)
    slowest = int(np.argmin(left / forward_seconds))
    waits = left - left[slowest] / forward_seconds[slowest] * forward_seconds
    return slowest, float(waits.sum() / (len(waits) - 1) / seconds)
