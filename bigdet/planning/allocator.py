"""The rules of torch's caching allocator for CUDA, to know what it reserves on a GPU.

Of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.15, default settings, one stream): sizes are
rounded to 512 bytes; up to 1 MiB comes from segments of 2 MiB, the rest from segments of 20 MiB or,
from 10 MiB on, of its own size rounded to 2 MiB; the smallest free block that is large enough is
taken and split if enough is left; neighbors that are free are joined. Segments are kept until
memory is short.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 1 << 20
_UNIT = 512
_SMALL = MIB
_SMALL_SEGMENT, _LARGE_SEGMENT, _OWN_SEGMENT = 2 * MIB, 20 * MIB, 10 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment.

    Attributes:
        size: bytes.
        place: number of its segment and offset there, for an order by address.
        is_small: of the pool of small blocks.
        before: the block to the left in its segment.
        after: the block to the right.
    """

    size: int
    place: tuple[int, int]
    is_small: bool
    is_free: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def key(self) -> tuple[int, tuple[int, int]]:
        """By size, then by address, as blocks are chosen."""
        return self.size, self.place


class CachingAllocator:
    """Gives and takes back blocks of memory that does not exist.

    Attributes:
        allocated: bytes of the blocks in use.
        reserved: bytes of all segments.
        peak: largest ``allocated`` since the last `take_peak`.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = 0
        self._num_segments = 0
        self._free: dict[bool, list[tuple[tuple[int, tuple[int, int]], Block]]] = {
            True: [],
            False: [],
        }

    def allocate(self, num_bytes: int) -> Block:
        """Take a block for a tensor of so many bytes, above 0."""
        size = max(-(-num_bytes // _UNIT) * _UNIT, _UNIT)
        is_small = size <= _SMALL
        free = self._free[is_small]
        found = bisect_left(free, size, key=lambda entry: entry[0][0])
        block = free.pop(found)[1] if found < len(free) else self._segment(size, is_small)
        block.is_free = False
        left = block.size - size
        if left >= _UNIT if is_small else left > _SMALL:
            rest = Block(left, (block.place[0], block.place[1] + size), is_small, True, block)
            rest.after, block.after, block.size = block.after, rest, size
            if rest.after is not None:
                rest.after.before = rest
            insort(free, (rest.key, rest), key=lambda entry: entry[0])
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def _segment(self, size: int, is_small: bool) -> Block:
        """Reserve a segment."""
        if is_small:
            size = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            size = _LARGE_SEGMENT
        else:
            size = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
        self.reserved += size
        self._num_segments += 1
        return Block(size, (self._num_segments, 0), is_small)

    def free(self, block: Block) -> None:
        """Take a block back."""
        self.allocated -= block.size
        free = self._free[block.is_small]
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                del free[bisect_left(free, other.key, key=lambda entry: entry[0])]
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if first.after is not None:
                    first.after.before = first
                block = first
        block.is_free = True
        insort(free, (block.key, block), key=lambda entry: entry[0])

    def take_peak(self) -> int:
        """Return the largest ``allocated`` since the last call."""
        peak, self.peak = self.peak, self.allocated
        return peak
