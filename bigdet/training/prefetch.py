"""The batches of a step on the device, each copied while the one before it is used."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from bigdet.structures import Batch


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies: each stream has its own pool of memory, which is never given back.

    Torch hands out 32 streams in turn; a new one for each step had 32 pools after 32 steps.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def prefetch(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches of a step on a device, one by one: all at once could fill it.

    On CUDA, while one batch is used, the next is copied on another CUDA stream from page-locked
    memory. On a CPU nothing is copied.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = _side_stream(device)

    def copied(batch: Batch) -> Batch:
        with torch.cuda.stream(side):
            return batch.to(device)

    upcoming = copied(batches[0])
    for following in [*batches[1:], None]:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)  # the copy is complete before its use
        ready = upcoming
        # The memory was allocated on the side stream: it must not be reused before the work that
        # is queued on the current stream is done.
        ready.record_stream(current)
        if following is not None:
            upcoming = copied(following)
        yield ready
