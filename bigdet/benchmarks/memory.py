"""The peak memory of a part of a program: of a GPU, or of the process."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch


def start_memory(device: torch.device) -> int:
    """Reset the peak and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        # What was left in the allocator would hide what comes next.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
        refs.write_text("5")  # Linux: forget the largest resident size so far
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes since ``start_memory`` (since the start where not on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
