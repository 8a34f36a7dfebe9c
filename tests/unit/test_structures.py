"""Copies of batches to a device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bigdet import structures
from bigdet.structures import Batch
from tests.unit.models.scenes import make_scene


def packed(batch: Batch, tensors: list[Tensor]) -> Batch:
    """The batch with all tensors of one type in one piece of memory, as loaders give it."""
    flat: dict[torch.dtype, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        flat[dtype] = torch.cat([t.flatten() for t in tensors if t.dtype == dtype])
    starts = dict.fromkeys(flat, 0)

    def view(tensor: Tensor) -> Tensor:
        start = starts[tensor.dtype]
        starts[tensor.dtype] += tensor.numel()
        return flat[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)

    return structures._map_tensors(batch, view)


def test_tensors_that_share_memory_are_copied_together() -> None:
    batch = make_scene([[(5, 8, 60, 70), (50, 30, 99, 99)], []], [(96, 128)] * 2, (96, 128))
    tensors: list[Tensor] = []
    structures._map_tensors(batch, lambda tensor: tensors.append(tensor) or tensor)
    together = packed(batch, tensors)
    images = batch.images.to(memory_format=torch.channels_last)
    whole = torch.cat([torch.zeros(1000), batch.weights])
    together = replace(together, images=images, weights=whole[1000:])  # a small part of something

    copies = structures._Copies(together, torch.device("cpu"))
    originals: list[Tensor] = []
    structures._map_tensors(together, lambda tensor: originals.append(tensor) or tensor)
    found = [copies.of(tensor) for tensor in originals]
    for one, other in zip(found, originals, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
    # Images, numbers, integers, flags; of the memory of the bitmaps most belongs to nothing here.
    assert len(copies._copies) == 4
