"""Settings of CUDA for the whole process, each with an option that undoes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bigdet.config.device import DeviceConfig
from bigdet.config.resize import ResizeConfig, has_few_shapes

_MEMORY_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The first is understood by all versions of torch."""


def apply(config: DeviceConfig) -> None:
    """Set TF32 and how memory is taken; before the first use of CUDA, which reads the variable."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    is_wanted = config.expandable_segments and torch.cuda.is_available()
    if is_wanted and not any(map(os.environ.get, _MEMORY_VARIABLES)):
        os.environ[_MEMORY_VARIABLES[0]] = "expandable_segments:True"


@contextmanager
def chosen_convolutions(config: DeviceConfig, resize: ResizeConfig) -> Iterator[None]:
    """Let cuDNN try its convolutions inside a block that trains on images of this size.

    cuDNN keeps what it has found for a shape, so evaluations between two blocks do not undo it.
    """
    before = torch.backends.cudnn.benchmark
    wanted = config.cudnn_benchmark
    torch.backends.cudnn.benchmark = has_few_shapes(resize) if wanted is None else wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def in_words() -> dict[str, str]:
    """Return the settings of this process by name; nothing without CUDA."""
    if not torch.cuda.is_available():
        return {}
    memory = next(filter(None, map(os.environ.get, _MEMORY_VARIABLES)), "torch's own")
    is_on = torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    return {"TF32": "on" if is_on else "off", "allocator": memory}
