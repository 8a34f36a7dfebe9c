"""CUDA graphs on a CPU: what a recording launches is launched again, at the same addresses.

A replay calls each operation of the recording with the same tensors as arguments and writes to the
memory that it wrote to then. So what changes elsewhere is seen where it is in that memory alone, as
on a GPU; only that memory is never used for two things.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``; records inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for function, args, kwargs, outputs in self.calls:
            kinds = [each.alias_info for each in function._schema.returns]
            if any(kind is not None and not kind.is_write for kind in kinds):
                continue  # a view, which sees what is in its memory now
            again = function(*args, **kwargs)
            for place, value in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place is not value:
                    place.detach().copy_(value)


class Stream:
    """In place of ``torch.cuda.Stream``: on a CPU all is done at once."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@contextlib.contextmanager
def recording(graph: Graph, **options: Any) -> Iterator[None]:
    assert options.keys() == {"stream", "pool", "capture_error_mode"}
    with graph:
        yield


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let `bigdet.models.graphs` record and replay on a CPU."""
    fork = torch.random.fork_rng
    patch.setattr(torch.random, "fork_rng", lambda devices: fork([]))
    for name, other in {
        "CUDAGraph": Graph,
        "graph": recording,
        "graph_pool_handle": object,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
    }.items():
        patch.setattr(torch.cuda, name, other)
