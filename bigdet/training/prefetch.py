"""Batches on the device of a rank, copied there while the batch before them is worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from bigdet.structures import Batch

OnDevice = tuple[Batch, Batch]
"""A batch on the host, for what is counted there, and the same on the device."""


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[OnDevice]:
    """Yield each batch with its copy on the device.

    On CUDA the next batch is on its way, on a stream of its own and from page-locked memory, when
    one is handed out: one batch more than asked for is taken. On a CPU nothing is copied or taken
    ahead.

    Args:
        batches: on the host; in page-locked memory, or copies wait for the host.
        device: of this rank.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.to(device)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied(batch: Batch) -> OnDevice:
        with torch.cuda.stream(side):
            return batch, batch.to(device)

    waiting = iter(batches)
    upcoming = copied(next(waiting))
    for batch in waiting:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)  # what is handed out is complete on the device
        ready, upcoming = upcoming, copied(batch)
        # The memory was allocated on the side stream: it must not be used again before the work
        # that is queued on this one is done.
        ready[1].record_stream(current)
        yield ready
    torch.cuda.current_stream(device).wait_stream(side)
    yield upcoming
