"""Matrices that are never trained, divided over the ranks: a layer has them whole while it runs.

They are buffers in no state, so this works with any engine. A layer computes the same, bit for bit,
as with all of them on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bigdet import distributed


@dataclass(frozen=True)
class _Matrix:
    """A buffer in a layer, of which this rank has a share.

    Attributes:
        module: that has it, by its name in the layer.
        name: in the module.
        like: on the meta device, with its shape and strides.
        share: ``(ceil(count / ranks),)`` numbers in the order of memory, zeros behind the last.
    """

    module: str
    name: str
    like: Tensor
    share: Tensor


class DividedLayers:
    """Layers whose matrices are gathered when they are called, and freed afterwards.

    While a layer runs, the matrices of the next one are gathered, so communication overlaps with
    computation, and no more than two layers are whole. Calling a layer is a collective.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Take layers in the order in which they are called; none is inside another one."""
        self._matrices: list[list[_Matrix]] = [[] for _ in layers]
        self._coming: dict[int, list[tuple[Tensor, Callable[[], Any]]]] = {}
        # Weak: hooks of the layers refer to this object, and memory is freed with the layers.
        self._places: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()
        for number, layer in enumerate(layers):
            self._places.update({inner: (number, at) for at, inner in layer.named_modules()})
            layer.register_forward_pre_hook(partial(self._gather, number))
            layer.register_forward_hook(partial(self._free, number))

    def has(self, module: nn.Module) -> bool:
        """Tell whether a module belongs to one of the layers."""
        return module in self._places

    def divide(self, module: nn.Module, name: str, whole: Tensor, device: torch.device) -> None:
        """Keep this rank's share of a matrix, as the buffer of a module.

        Args:
            module: of one of the layers.
            name: of the buffer.
            whole: the same on all ranks, without gaps in memory.
            device: where the share is kept.
        """
        number, place = self._places[module]
        flat = whole.as_strided((whole.numel(),), (1,))
        count = -(-len(flat) // distributed.world_size())
        own = flat[count * distributed.rank() :][:count]
        share = torch.zeros(count, dtype=whole.dtype, device=device)
        share[: len(own)] = own
        self._matrices[number].append(_Matrix(place, name, whole.to("meta"), share))
        module._buffers[name] = share[:0]

    @property
    def shares(self) -> list[Tensor]:
        """What this rank keeps."""
        return [matrix.share for matrices in self._matrices for matrix in matrices]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gather(self, number: int, layer: nn.Module, _inputs: Any) -> None:
        for each in range(number, min(number + 2, len(self._matrices))):
            if each not in self._coming:
                shares = [matrix.share for matrix in self._matrices[each]]
                self._coming[each] = [distributed.begin_gather(share) for share in shares]
        gathered = zip(self._matrices[number], self._coming.pop(number), strict=True)
        for matrix, (flat, wait) in gathered:
            wait()
            whole = flat.as_strided(matrix.like.shape, matrix.like.stride())
            layer.get_submodule(matrix.module)._buffers[matrix.name] = whole

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _free(self, number: int, layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for matrix in self._matrices[number]:
            layer.get_submodule(matrix.module)._buffers[matrix.name] = matrix.share[:0]
