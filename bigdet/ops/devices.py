"""Which of two ways to the same result is taken: a GPU's, or a CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_plans_gpu = False


def is_gpu(device: torch.device) -> bool:
    """Return whether code for this device takes the way of a GPU."""
    return _plans_gpu or device.type != "cpu"


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Take the way of a GPU on any device inside a block, to plan for one that is not there."""
    global _plans_gpu
    _plans_gpu = True
    try:
        yield
    finally:
        _plans_gpu = False
