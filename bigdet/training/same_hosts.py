"""What every rank must have alike: versions, the code, the config, the data.

A run whose hosts differ trains on something that nobody wrote down, or hangs hours later in a
collective that one of them skips. So it is compared before the first step; ``--doctor`` also shows
what was found.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.config.own import is_own

SHOWN_HASH = 12
"""Digits of a hash that messages show."""


def software() -> dict[str, str]:
    """Return the versions of this process, and the hash of bigdet's own code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    return {"python": platform.python_version(), **versions, "bigdet code": code_hash()}


def environment() -> dict[str, str]:
    """Return what this process runs on, for people: host, device, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "timm")}
    return {"host": socket.gethostname(), "device": _device_name(), **software(), **versions}


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def code_hash() -> str:
    """Return SHA-256 over the names and contents of bigdet's source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:SHOWN_HASH]


def own_code(names: Iterable[str]) -> dict[str, str]:
    """Return a hash of each module that holds something of a user's own, by what it is.

    Args:
        names: of backbones and detectors, bigdet's too; what is own has been imported.
    """
    files = {name.partition(":")[0] for name in names if is_own(name)}
    return {
        f"code of {module}": text_hash(Path(str(sys.modules[module].__file__)).read_text("utf-8"))
        for module in sorted(files)
    }


def text_hash(text: str) -> str:
    """Return SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN_HASH]


def differences(everywhere: list[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """Compare what the ranks have with rank 0.

    Args:
        everywhere: host and values of every rank, in order of rank.

    Returns:
        For each name that is not the same everywhere, who has what; of several ranks of a host
        the first.
    """
    host_0, values_0 = everywhere[0]
    found: dict[str, dict[str, str]] = {}
    for rank, (host, values) in enumerate(everywhere):
        for name, value in values.items():
            if value != values_0[name]:
                text = f"{value} on {host} (rank {rank})"
                found.setdefault(name, {}).setdefault(host, text)
    return {
        name: f"{values_0[name]} on {host_0} (rank 0), {', '.join(by_host.values())}"
        for name, by_host in found.items()
    }


def check_same(values: Mapping[str, str]) -> None:
    """Check that all ranks have the same versions, code and whatever else is given (collective).

    Args:
        values: of this rank, by what they are.

    Raises:
        SharedError: with the first thing that differs, and who has what.
    """
    own = (socket.gethostname(), {**software(), **values})
    differing = differences(distributed.all_gather_objects(own))
    for name, text in differing.items():
        raise distributed.SharedError(
            f"hosts differ: {name}: {text}. Install the same code and packages, and copy the same "
            f"config and shards, on every host of the run."
        )
