"""Matrices that are never trained, divided over the ranks: a layer has them whole while it runs.

They are buffers in no state, so this works with any engine. A layer computes the same, bit for bit,
as with all of them on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdet import distributed


@dataclass(frozen=True)
class _Matrix:
    """A buffer of a module, of which this rank has a share.

    Attributes:
        module: that has it.
        name: in the module.
        like: on the meta device, with its shape and strides.
        share: ``(ceil(count / ranks),)`` numbers in the order of memory, zeros behind the last.
    """

    module: nn.Module
    name: str
    like: Tensor
    share: Tensor


class DividedLayers:
    """Layers whose matrices are gathered when they are called, and freed afterwards.

    While a layer runs, the matrices of the next one are gathered, so communication overlaps with
    computation, and no more than two layers are whole. Calling a layer is a collective.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Take layers, of which none is inside another one."""
        self._layer_of = {inner: layer for layer in layers for inner in layer.modules()}
        self._matrices: dict[nn.Module, list[_Matrix]] = {}
        self._next: dict[nn.Module, nn.Module] = {}
        self._coming: dict[nn.Module, list[tuple[Tensor, Callable[[], Any]]]] = {}

    def has(self, module: nn.Module) -> bool:
        """Tell whether a module belongs to one of the layers."""
        return module in self._layer_of

    def divide(self, module: nn.Module, name: str, whole: Tensor, device: torch.device) -> None:
        """Keep this rank's share of a matrix, as the buffer of a module.

        Args:
            module: of one of the layers.
            name: of the buffer.
            whole: the same on all ranks; those of a layer in the order in which layers are called.
            device: where the share is kept.
        """
        layer = self._layer_of[module]
        if layer not in self._matrices:
            if self._matrices:
                self._next[next(reversed(self._matrices))] = layer
            self._matrices[layer] = []
            layer.register_forward_pre_hook(self._gather)
            layer.register_forward_hook(self._free)
        flat = whole.as_strided((whole.numel(),), (1,))
        count = -(-len(flat) // distributed.world_size())
        own = flat[count * distributed.rank() :][:count]
        share = torch.zeros(count, dtype=whole.dtype, device=device)
        share[: len(own)] = own
        self._matrices[layer].append(_Matrix(module, name, whole.to("meta"), share))
        module._buffers[name] = share[:0]

    @property
    def shares(self) -> list[Tensor]:
        """What this rank keeps."""
        return [matrix.share for matrices in self._matrices.values() for matrix in matrices]

    def _begin(self, layer: nn.Module) -> None:
        if layer not in self._coming:
            self._coming[layer] = [
                distributed.begin_gather(matrix.share) for matrix in self._matrices[layer]
            ]

    @torch.compiler.disable
    def _gather(self, layer: nn.Module, _inputs: Any) -> None:
        self._begin(layer)
        if layer in self._next:
            self._begin(self._next[layer])
        gathered = zip(self._matrices[layer], self._coming.pop(layer), strict=True)
        for matrix, (flat, wait) in gathered:
            wait()
            whole = flat.as_strided(matrix.like.shape, matrix.like.stride())
            matrix.module._buffers[matrix.name] = whole

    @torch.compiler.disable
    def _free(self, layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for matrix in self._matrices[layer]:
            matrix.module._buffers[matrix.name] = matrix.share[:0]
