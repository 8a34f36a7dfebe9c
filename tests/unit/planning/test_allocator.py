import itertools
import random

from bigdet.planning.allocator import MIB, CachingAllocator


def test_sizes_and_segments_are_those_of_torch():
    memory = CachingAllocator()
    memory.allocate(1)  # 512 bytes of a segment of 2 MiB for small blocks
    assert (memory.allocated, memory.reserved) == (512, 2 * MIB)
    memory.allocate(3 * MIB)  # of a segment of 20 MiB
    assert (memory.allocated, memory.reserved) == (512 + 3 * MIB, 22 * MIB)
    memory.allocate(17 * MIB)  # the rest of it
    assert memory.reserved == 22 * MIB
    # From 10 MiB on a segment of its own: 25 MiB become 26, and what is left, 1 MiB, is not split.
    memory.allocate(25 * MIB)
    assert (memory.allocated, memory.reserved) == (512 + 46 * MIB, 48 * MIB)
    assert memory.take_peak() == memory.allocated


def test_what_is_free_is_taken_again_the_smallest_first_and_joined_with_its_neighbors():
    memory = CachingAllocator()
    left, middle, right = (memory.allocate(size * MIB) for size in (4, 6, 10))
    large = memory.allocate(40 * MIB)
    memory.free(middle)
    memory.free(large)
    assert memory.allocate(5 * MIB).place == middle.place  # of 6 and 40 the smaller; 1 MiB stays
    memory.take_peak()
    assert memory.allocated == 4 * MIB + 6 * MIB + 10 * MIB
    memory.free(left)
    memory.free(middle)
    memory.free(right)
    assert memory.allocate(20 * MIB).place == left.place  # all three are one again
    assert memory.reserved == 60 * MIB
    assert memory.take_peak() == 20 * MIB


def test_blocks_never_overlap_and_all_are_joined_in_the_end():
    draw, memory = random.Random(0), CachingAllocator()
    held = []
    for _ in range(500):
        if held and draw.random() < 0.5:
            memory.free(held.pop(draw.randrange(len(held))))
        else:
            held.append(memory.allocate(int(2 ** draw.uniform(0, 26))))
        places = sorted((*block.place, block.size) for block in held)
        for one, other in itertools.pairwise(places):
            assert one[0] < other[0] or one[1] + one[2] <= other[1]
        assert memory.allocated == sum(block.size for block in held) <= memory.reserved
    for block in held:
        memory.free(block)
    free = [block for of_pool in memory._free.values() for _, block in of_pool]
    assert sum(block.size for block in free) == memory.reserved
    assert all(block.before is block.after is None for block in free)
