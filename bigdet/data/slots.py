"""Memory that loader processes and the training process share, used over and over.

Torch hands over each tensor in a shared file of its own: made, mapped by both, thrown away. The
faults of new pages and the passing of file descriptors take 0.8 ms per image of 448x448 where
reading, decoding and resizing it take 3 (measured on 2 virtual cores). Here the memory is mapped
once, before the fork, and the processes pass numbers.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdet.data.collate import PackedGroup

_ALIGNMENT = 64  # bytes; also the room for the stamp
_TENSORS = ("images", "floats", "integers", "bytes")


@dataclass(frozen=True)
class Stored:
    """Where a group lies.

    Attributes:
        slot: number of the slot.
        stamp: number of the group among those of its process, which the slot carries too.
        layouts: dtype, size and strides of each tensor, one behind the other.
        notes: of the group.
    """

    slot: int
    stamp: int
    layouts: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]
    notes: list[Any]


class Slots:
    """A ring of slots for each loader process; made before the processes are forked.

    A slot is written again after ``per_worker`` groups. The caller sees to it that the group has
    been taken by then; its stamp tells.

    Args:
        workers: number of processes.
        per_worker: slots of each.
        group_bytes: room for the tensors of a group.
    """

    def __init__(self, workers: int, per_worker: int, group_bytes: int) -> None:
        self._per_worker = per_worker
        self._slot_bytes = _aligned(group_bytes) + (1 + len(_TENSORS)) * _ALIGNMENT
        # Anonymous and shared: no file, no limit of /dev/shm; pages exist once they are written.
        self._memory = torch.frombuffer(
            mmap.mmap(-1, workers * per_worker * self._slot_bytes), dtype=torch.uint8
        )
        self._num_stored = 0  # in this process

    def store(self, group: PackedGroup, worker: int) -> Stored | PackedGroup:
        """Copy a group into the next slot of a process; a group that is too large stays as is."""
        tensors = [getattr(group, name) for name in _TENSORS]
        if sum(_aligned(tensor.nbytes) for tensor in tensors) + _ALIGNMENT > self._slot_bytes:
            return group
        slot = worker * self._per_worker + self._num_stored % self._per_worker
        self._num_stored += 1
        layouts = [(tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in tensors]
        self._stamp(slot).fill_(self._num_stored)
        for tensor, place in zip(tensors, self._places(slot, layouts), strict=True):
            place.copy_(tensor)
        return Stored(slot, self._num_stored, layouts, group.notes)

    def take(self, stored: Stored) -> PackedGroup:
        """Copy a group out of its slot, into page-locked memory where there is CUDA."""
        is_pinned = torch.cuda.is_available()
        tensors = [
            torch.empty_strided(
                place.shape, place.stride(), dtype=place.dtype, pin_memory=is_pinned
            ).copy_(place)
            for place in self._places(stored.slot, stored.layouts)
        ]
        assert self._stamp(stored.slot).item() == stored.stamp, "a slot was written too early"
        images, floats, integers, byte_tensor = tensors
        return PackedGroup(images, floats, integers, byte_tensor, stored.notes)

    def _stamp(self, slot: int) -> Tensor:
        start = slot * self._slot_bytes
        return self._memory[start : start + 8].view(torch.int64)

    def _places(self, slot: int, layouts: list[Any]) -> list[Tensor]:
        """Return the tensors of these layouts in a slot."""
        places = []
        start = slot * self._slot_bytes + _ALIGNMENT
        for dtype, shape, stride in layouts:
            end = start + math.prod(shape) * dtype.itemsize
            places.append(self._memory[start:end].view(dtype).as_strided(shape, stride))
            start = _aligned(end)
        return places


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
