"""The batches of a phase step by step, and those of a step on the device.

On CUDA, while the device computes a step, a thread takes the next one's micro-batches from the
loader processes into page-locked memory, and starts to copy the first one to the device; each of
the others is copied while the one before it is used, since all at once could fill the device. All
copies are on one CUDA stream. On a CPU there is neither thread nor copy.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from bigdet.data.examples.collate import PackedGroup, pinned, unpack
from bigdet.data.streams.stream import TrainStream
from bigdet.structures import Batch

END_SECONDS = 10.0
"""For the thread to finish the micro-batch that it waits for, before its loader is ended."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies: each stream has its own pool of memory, which is never given back.

    Torch hands out 32 streams in turn; a new one for each step had 32 pools after 32 steps.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Copy:
    """A batch on its way to the device."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        side = _side_stream(device)
        with torch.cuda.stream(side):
            self._batch = batch.to(device)
        self._is_done = side.record_event()

    def arrived(self) -> Batch:
        """Return the batch; what is queued on the current stream from now on comes after it."""
        current = torch.cuda.current_stream(self._batch.images.device)
        current.wait_event(self._is_done)
        # The memory was allocated on the side stream: it must not be reused before the work that
        # is queued on the current stream is done.
        self._batch.record_stream(current)
        return self._batch


def prefetch(
    batches: Sequence[Batch], device: torch.device, first: _Copy | None = None
) -> Iterator[Batch]:
    """Yield the batches of a step on a device, one by one: all at once could fill it.

    On CUDA, while one batch is used, the next is copied on another CUDA stream from page-locked
    memory. On a CPU nothing is copied.

    Args:
        batches: one or more.
        device: where they go.
        first: the copy of the first one, if it has begun.
    """
    if device.type != "cuda":
        yield from batches
        return
    upcoming = first or _Copy(batches[0], device)
    for following in [*batches[1:], None]:
        ready = upcoming.arrived()
        if following is not None:
            upcoming = _Copy(following, device)
        yield ready


@dataclass
class _Taken:
    """What the thread has of a step: its groups, the first one's copy, or why there is none."""

    groups: list[PackedGroup]
    first: _Copy | None = None
    error: BaseException | None = None


class StepBatches:
    """An iterator over the micro-batches of this rank, a list for each step.

    What the stream counts, and with it what a checkpoint says, is of the steps that were asked for,
    not of those that were taken ahead.

    Args:
        stream: of the phase; `close` closes it.
        device: where the micro-batches are used.
    """

    def __init__(self, stream: TrainStream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._groups = stream.groups()
        self._thread: threading.Thread | None = None
        self._taken = _Taken([])
        self._first: _Copy | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._device.type != "cuda":
            return [self._stream.use(group) for group in self._next_groups()]
        if self._thread is None:  # the first step: loader processes are forked by this thread
            self._take()
        else:
            self._thread.join()
        taken, self._first = self._taken, self._taken.first
        if taken.error is not None:
            raise taken.error
        batches = [self._stream.use(group) for group in taken.groups]
        self._thread = threading.Thread(target=self._take, name="next batches", daemon=True)
        self._thread.start()
        return batches

    def _next_groups(self) -> Iterator[PackedGroup]:
        return islice(self._groups, len(self._stream.lanes))

    def _take(self) -> None:
        """Take the micro-batches of the next step (in the thread, after the first step)."""
        taken = self._taken = _Taken([])
        try:
            for group in self._next_groups():
                if self._is_closed:
                    return
                taken.groups.append(pinned(group))
                taken.first = taken.first or _Copy(unpack(taken.groups[0]), self._device)
        except BaseException as error:  # for the step that asks for them
            taken.error = error

    def on_device(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches that were given last on the device, as `prefetch` does."""
        first, self._first = self._first, None
        return prefetch(batches, self._device, first)

    def close(self) -> None:
        """End the thread and the stream."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        self._stream.close()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
        self._taken, self._first = _Taken([]), None
