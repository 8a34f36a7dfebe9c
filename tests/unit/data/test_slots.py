"""Groups through shared memory: what is taken is what was stored, and stays so."""

from __future__ import annotations

import os
import time
from itertools import count, islice

import pytest
import torch

from bigdet.data.examples.collate import Allocate, PackedGroup, fresh_memory
from bigdet.data.streams.loader import Loader
from bigdet.data.streams.slots import Slots, Stored


def group(number: int, allocate: Allocate = fresh_memory, num_values: int = 5) -> PackedGroup:
    images = allocate(2 * 4 * 6 * 3).view(2, 4, 6, 3).fill_(number).permute(0, 3, 1, 2)
    floats = allocate(4 * num_values).view(torch.float32).fill_(number)
    integers = allocate(8 * 3).view(torch.int64).fill_(2**40 + number)
    return PackedGroup(images, floats, integers, allocate(0), [number])


def store(slots: Slots, number: int, worker: int, num_values: int = 5) -> Stored | PackedGroup:
    slots.begin(worker)
    return slots.store(group(number, slots.allocate, num_values))


def assert_is(found: PackedGroup, number: int, num_values: int = 5):
    for one, other in zip(found[:4], group(number, num_values=num_values)[:4], strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    assert found.notes == [number]


def test_a_group_is_taken_as_it_was_stored_and_outlives_its_slot():
    slots = Slots(workers=2, per_worker=2, group_bytes=1000)
    stored = [store(slots, number, worker=1) for number in range(2)]
    assert all(isinstance(one, Stored) for one in stored)
    taken = [slots.take(one) for one in stored]
    for number in (8, 9):
        store(slots, number, worker=1)
    for number in range(2):
        assert_is(taken[number], number)


def test_a_slot_that_was_written_again_is_noticed():
    slots = Slots(workers=1, per_worker=2, group_bytes=1000)
    first = store(slots, 0, worker=0)
    for number in (1, 2):
        store(slots, number, worker=0)
    with pytest.raises(AssertionError, match="too early"):
        slots.take(first)


def test_a_group_that_is_too_large_is_handed_over_as_it_is():
    slots = Slots(workers=1, per_worker=2, group_bytes=1000)
    for number in range(3):
        large = store(slots, number, worker=0, num_values=2000)
        assert isinstance(large, PackedGroup)
        store(slots, 3, worker=0)
        store(slots, 4, worker=0)  # into the slot in which the large group started
        assert_is(large, number, num_values=2000)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_slow_consumer_of_fast_processes_gets_every_group_in_order(workers):
    # Every fifth group is too large for a slot.
    def read(key: int, allocate: Allocate) -> PackedGroup:
        return group(key, allocate, 5000 if key % 5 == 0 else 5)

    loader = Loader(read, count(1), workers=workers, group_bytes=1000)
    for number, found in zip(range(1, 41), islice(loader, 40), strict=True):
        time.sleep(0.005 if number % 3 == 0 else 0)
        assert_is(found, number, 5000 if number % 5 == 0 else 5)
    loader.close()
    loader.close()  # once more does no harm


def test_keys_that_end_end_the_loader():
    for workers in (0, 1):
        loader = Loader(group, range(3), workers=workers, group_bytes=1000)
        assert [found.notes[0] for found in loader] == [0, 1, 2]
        loader.close()


def test_more_processes_than_cores_bring_no_warning_of_torch(recwarn):
    loader = Loader(group, range(9), workers=len(os.sched_getaffinity(0)) + 1, group_bytes=1000)
    assert [found.notes[0] for found in loader] == list(range(9))
    loader.close()
    assert not recwarn.list
