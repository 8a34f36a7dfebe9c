"""The energy that this rank's GPU has used, by its own counter (NVML, part of the driver)."""

from __future__ import annotations

from typing import Any

import pynvml
import torch


class EnergyCounter:
    """Reads the counter of one GPU, which includes the work of other processes on that GPU."""

    def __init__(self, device: torch.device) -> None:
        """Find the counter; a CPU, a GPU older than Volta and a MIG slice have none."""
        self._handle: Any = None
        if device.type != "cuda":
            return
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:
            pass

    def joules(self) -> float:
        """Return the energy since the driver was loaded; NaN if there is no counter."""
        if self._handle is None:
            return float("nan")
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError:
            return float("nan")
