"""How many CPUs and how much memory a process may use: of the host, and of its control groups.

Slurm, Kubernetes and ``docker --memory`` give a job a part of its host. The kernel kills a process
that takes more, so that part counts, not ``/proc/meminfo``. Control groups are nested, and the
limits of all of them apply.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The last one is of version 1.
_MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_MEMORY_USED = ("memory.current", "memory.usage_in_bytes")
_CACHE = re.compile(r"^(?:active_file|inactive_file|slab_reclaimable) (\d+)$", re.MULTILINE)
_CACHE_V1 = re.compile(r"^total_(?:active_file|inactive_file) (\d+)$", re.MULTILINE)
_OUTER_LIMIT = re.compile(r"^hierarchical_memory_limit (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """Memory of this process's part of the host.

    Attributes:
        total: bytes that it has, used or not.
        available: bytes that may still be taken; cached files count as free.
            None where the system does not say.
    """

    total: int
    available: int | None


def num_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may use at a time, at least 1; tests have another root."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for folder in _groups("cpu", root):
        quota, period = _cpu_quota(folder)
        if quota > 0 and period > 0:
            count = min(count, max(1, math.ceil(quota / period)))
    return count


def host_memory(root: Path = Path("/")) -> Memory:
    """Return the memory of this process's part of the host; tests have another root."""
    text = _text(root / "proc/meminfo")
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}
    if "MemTotal" not in kib:  # no Linux
        return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None)
    total = kib["MemTotal"] * 1024
    available = kib.get("MemAvailable", kib["MemFree"]) * 1024
    for folder in _groups("memory", root):
        limit = _memory_limit(folder)
        if limit is not None:
            used = max((_number(_text(folder / name)) or 0 for name in _MEMORY_USED), default=0)
            cache = sum(map(int, _cache(_text(folder / "memory.stat"))))
            total = min(total, limit)
            available = min(available, max(0, limit - max(0, used - cache)))
    return Memory(total, available)


def _memory_limit(folder: Path) -> int | None:
    """Return the bytes that a control group may take; None without a limit."""
    limits = [_number(_text(folder / name)) for name in _MEMORY_LIMITS]
    # Version 1 has the least limit of all groups, also of those that a container does not see.
    limits += map(int, _OUTER_LIMIT.findall(_text(folder / "memory.stat")))
    return min((limit for limit in limits if limit is not None), default=None)


def _cache(stat: str) -> list[str]:
    """Return the bytes of files that the kernel caches and frees when memory is needed."""
    return _CACHE_V1.findall(stat) or _CACHE.findall(
        stat
    )  # version 1 has both: with inner groups, and without


def _cpu_quota(folder: Path) -> tuple[float, float]:
    """Return the CPU time that a group may take in a period, both in the same unit; 0: no limit."""
    words = _text(folder / "cpu.max").split()  # version 2: "150000 100000", "max 100000"
    if not words:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = (_number(word) or 0 for word in words) if len(words) == 2 else (0, 0)
    return quota, period


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from the innermost to the outermost."""
    mounts = _text(root / "proc/self/mountinfo").splitlines()
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        kind = "cgroup2" if number == "0" and not names else "cgroup"
        if kind == "cgroup" and controller not in names.split(","):
            continue
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            _, _, _, top, point, *_ = before.split()
            found, _, options = after.split()[:3]
            if found == kind and (kind == "cgroup2" or controller in options.split(",")):
                yield from _up(root / point.lstrip("/"), path, top)
                break


def _up(mounted: Path, path: str, top: str) -> Iterator[Path]:
    """Yield the folder of a group and those above it, as far as they are mounted.

    ``path`` is from the root of all groups. ``top`` is the group that is mounted: a container may
    see only its own.
    """
    inner = Path(path).parts[1:]
    above = Path(top).parts[1:]
    inner = inner[len(above) :] if inner[: len(above)] == above else ()
    if ".." in inner:  # outside of what is mounted
        inner = ()
    for length in range(len(inner), -1, -1):
        yield mounted.joinpath(*inner[:length])


def _text(file: Path) -> str:
    """Return the text of a file of the kernel; empty if it is absent or not readable."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """Return a whole number; None for other text, such as ``max``."""
    try:
        return int(text)
    except ValueError:
        return None
