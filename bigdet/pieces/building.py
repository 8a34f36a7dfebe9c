"""Modules that are built without memory for their parameters, or with parameters in a file.

So one rank can draw the random weights of a model that does not fit in its memory, in the order in
which they are always drawn, and the other ranks can build the model for nothing.
"""

from __future__ import annotations

import math
import mmap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

RESIDENT_BYTES = 256 << 20
"""So much of the parameters in a file is worked on before it leaves the memory again."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give parameters that are made in the block a shape and a type, but no memory.

    Buffers are real, also where a network makes them on the device of its parameters. Setting the
    parameters does nothing, and draws no random numbers.
    """

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    with _each_parameter(on_meta), _RealTensors():
        yield


class _RealTensors(TorchFunctionMode):
    """Makes new tensors on the CPU that are asked for on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def module_at(error: BaseException) -> str:
    """Name the type of the innermost module that an error came through, or else of the error."""
    found: type = type(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = type(owner)
    return f"{found.__module__}.{found.__qualname__}"


@contextmanager
def parameters_in_file(file: Path) -> Iterator[None]:
    """Keep parameters that are made in the block in a file that is mapped into memory.

    They can be set and read as any others, and what was worked on leaves the memory soon. The file
    has no use by itself.
    """
    maps: list[mmap.mmap] = []
    places: set[int] = set()

    def in_file(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or not parameter.numel():
            return None
        if parameter.data_ptr() in places:
            return None
        kept = _map(file, parameter.detach(), maps)
        places.add(kept.data_ptr())
        return nn.Parameter(kept, parameter.requires_grad)

    file.touch()
    with _each_parameter(in_file), _Release(maps):
        yield


@contextmanager
def _each_parameter(replace: Callable[..., Any]) -> Iterator[None]:
    """Pass each parameter that a module is given in the block through a function."""
    hook = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _map(file: Path, values: Tensor, maps: list[mmap.mmap]) -> Tensor:
    """Append a tensor to a file, and give it as it is there."""
    begin = -(-file.stat().st_size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    with file.open("r+b") as opened:
        opened.truncate(begin + values.nbytes)
        mapped = mmap.mmap(opened.fileno(), values.nbytes, offset=begin)
    maps.append(mapped)
    flat = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8)).view(values.dtype)
    return flat.view(values.shape).copy_(values)


class _Release(TorchFunctionMode):
    """Lets go of the memory of maps each time that much was worked on; the file keeps all."""

    def __init__(self, maps: list[mmap.mmap]) -> None:
        super().__init__()
        self._maps, self._touched = maps, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and not args[0].is_meta:
            self._touched += math.prod(args[0].shape) * args[0].itemsize
            if self._touched > RESIDENT_BYTES:
                self._touched = 0
                for mapped in self._maps:
                    mapped.madvise(mmap.MADV_DONTNEED)
        return result


def place(module: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Give each parameter and buffer of a module the memory that a function returns for it."""
    module._apply(move)  # type: ignore[no-untyped-call]


def materialize(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Give the parameters of a module that have no memory some, one after the other.

    Args:
        module: its meta parameters are replaced; those that layers share stay shared.
        make: gives the memory for one, of its shape and type.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False):
            if old.is_meta:
                if old not in made:
                    made[old] = nn.Parameter(make(old), old.requires_grad)
                    made[old].__dict__.update(old.__dict__)
                part._parameters[name] = made[old]
