"""The batches of a step on the device, each copied there while the one before is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bigdet.structures import Batch


def prefetch(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a device, one by one: all at once could fill it.

    On CUDA the next one is on its way, on a stream of its own and from page-locked memory, when
    one is handed out. On a CPU nothing is copied.

    Args:
        batches: the micro-batches of one step, on the host.
        device: of this rank.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied(batch: Batch) -> Batch:
        with torch.cuda.stream(side):
            return batch.to(device)

    upcoming = copied(batches[0])
    for following in [*batches[1:], None]:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)  # what is handed out is complete on the device
        ready = upcoming
        # The memory was allocated on the side stream: it must not be used again before the work
        # that is queued on this one is done.
        ready.record_stream(current)
        if following is not None:
            upcoming = copied(following)
        yield ready
