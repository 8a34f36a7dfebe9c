"""Numbers of the device that the host reads without waiting for all that is queued."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A number of the device, copied to the host while the device goes on."""

    def __init__(self, value: Tensor) -> None:
        """Begin to copy a scalar."""
        self._value = value.to("cpu", non_blocking=True)
        self._is_copied = torch.cuda.Event() if value.is_cuda else None  # type: ignore[no-untyped-call]
        if self._is_copied is not None:
            self._is_copied.record()

    def read(self) -> float:
        """Wait for the copy."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return float(self._value)
