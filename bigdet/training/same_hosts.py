"""What must be the same on all ranks: versions, code, config and data.

A run whose hosts differ trains something that nobody specified, or hangs hours later in a
collective that one of them skips. So they are compared before the first step; ``--doctor`` also
shows the values.
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
from bigdet.engine import cuda_settings

SHOWN_HASH = 12
"""Digits of a hash that messages show."""


def software() -> dict[str, str]:
    """Return the versions of this process, and the hash of bigdet's own code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    return {"python": platform.python_version(), **versions, "bigdet code": code_hash()}


def environment() -> dict[str, str]:
    """Return host, device and versions of this process, for the report."""
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "timm")}
    device = {"device": _device_name(), **cuda_settings.in_words()}
    return {"host": socket.gethostname(), **device, **software(), **versions}


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
    """Return hashes of the user's own modules, under ``code of MODULE``.

    Args:
        names: backbones and detectors, bigdet's or ``package.module:attribute``, then imported.
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
    """Compare all ranks with rank 0.

    Args:
        everywhere: host and values of every rank, in order of rank.

    Returns:
        For each name that differs, one line with the value of each host that has another one than
        rank 0, and of the first such rank of that host.
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
    """Check that versions, code and the given values are the same on all ranks (collective).

    Raises:
        SharedError: with the first name that differs, and its values by host.
    """
    own = (socket.gethostname(), {**software(), **values})
    differing = differences(distributed.all_gather_objects(own))
    for name, text in differing.items():
        raise distributed.SharedError(
            f"hosts differ: {name}: {text}. Install the same code and packages, and copy the same "
            f"config and shards, on every host of the run."
        )
