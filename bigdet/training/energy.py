"""The energy that this rank's GPU has used, by its own counter (NVML, part of the driver)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


class EnergyCounter:
    """Reads the counter of one GPU; it counts all that the GPU does, for whomever."""

    def __init__(self, device: torch.device, library: Any = None) -> None:
        """Look for the counter; a CPU has none, nor has a GPU before Volta or a slice of one.

        Args:
            device: of this rank.
            library: NVML, opened; None opens it.
        """
        self._library, self._handle = library, ctypes.c_void_p()
        self._exists = False
        if device.type != "cuda":
            return
        try:
            self._library = library or ctypes.CDLL(LIBRARY)
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            self._exists = self._library.nvmlInit_v2() == 0 and (
                self._library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == 0
            )
        except (OSError, AttributeError):  # no such library, or one without these functions
            self._exists = False

    def joules(self) -> float:
        """Return the energy since the driver was loaded; not a number where no one tells."""
        if not self._exists:
            return float("nan")
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(millijoules)
        )
        return float("nan") if failed else millijoules.value / 1000
