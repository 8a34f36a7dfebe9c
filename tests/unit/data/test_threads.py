"""Loader threads: order, errors, ends, and what they leave alone in the process."""

import signal
import threading
from itertools import count

import pytest
import torch

from bigdet.data.examples.collate import PackedGroup
from bigdet.data.format.manifest import ShardError
from bigdet.data.streams.loader import Loader
from bigdet.data.streams.reading import PREFETCHED_GROUPS, STOP_SIGNALS
from tests.unit.data.test_slots import group


class Reader:
    """Keeps every group but that of key 0 waiting until the next one has been begun."""

    def __init__(self, begun):
        self.begun = begun
        self.keys = []

    def read(self, key, allocate) -> PackedGroup:
        self.keys.append(key)
        self.begun[key].set()
        if key % 2 == 0:
            assert self.begun[key + 1].wait(60)  # by another thread
        return group(key, allocate)


def open_loader(make_read, keys, workers=2):
    def never(key, allocate):
        raise AssertionError

    return Loader(never, keys, workers=workers, group_bytes=0, thread_read=make_read)


def loader_threads():
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_groups_come_in_order_whichever_thread_ends_first():
    begun = [threading.Event() for _ in range(10)]
    readers = []

    def make_read():
        readers.append(Reader(begun))
        return readers[-1].read

    found = list(open_loader(make_read, range(10)))
    assert [packed.notes for packed in found] == [group(key).notes for key in range(10)]
    for key, packed in enumerate(found):
        expected = group(key)
        assert all(torch.equal(*pair) for pair in zip(packed[:4], expected[:4], strict=True))
    assert len(readers) == 2  # each thread has its own
    assert sorted(key for reader in readers for key in reader.keys) == list(range(10))


def test_no_more_is_read_than_ahead_of_what_was_taken():
    keys = []

    def read(key, allocate):
        keys.append(key)
        return group(key, allocate)

    loader = open_loader(lambda: read, count(0), workers=3)
    for _ in range(5):
        next(loader)
    loader.close()
    assert 5 <= len(keys) <= 5 + 3 * PREFETCHED_GROUPS
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ShardError("a damaged one"), ShardError, "^a damaged one$"),
        (MemoryError(), ShardError, "^a group of images .*memory"),
        (IndexError("a bug"), IndexError, "^a bug$"),
    ],
)
def test_an_error_comes_after_the_groups_before_it_as_it_was(error, raised, message):
    def read(key, allocate):
        if key == 3:
            raise error
        return group(key, allocate)

    loader = open_loader(lambda: read, count(0))
    assert [next(loader).notes for _ in range(3)] == [group(key).notes for key in range(3)]
    with pytest.raises(raised, match=message):
        next(loader)
    loader.close()
    assert loader_threads() == []


def test_threads_compute_with_one_thread_and_leave_signals_to_the_main_one():
    found = []

    def read(key, allocate):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        found.append((torch.get_num_threads(), blocked >= STOP_SIGNALS))
        return group(key, allocate)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert len(list(open_loader(lambda: read, range(4)))) == 4
        assert found == [(1, True)] * 4
        assert torch.get_num_threads() == 2
        new = []
        thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new == [2]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    finally:
        torch.set_num_threads(before)


def test_a_loader_that_nobody_holds_ends_its_threads():
    loader = open_loader(lambda: group, count(0))
    next(loader)
    assert len(loader_threads()) == 2
    del loader
    assert loader_threads() == []


def test_threads_of_which_one_cannot_start_end_and_the_error_names_the_option(monkeypatch):
    start = threading.Thread.start
    started = []

    def start_third_without_memory(thread):
        if len(started) == 2:
            threading.stack_size(1 << 46)  # more than an address has bits for
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", start_third_without_memory)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ShardError, match=r"data\.workers: 4 loader threads cannot be started"):
            open_loader(lambda: group, count(0), workers=4)
        assert len(started) == 2
        assert loader_threads() == []
        assert torch.get_num_threads() == 2
    finally:
        threading.stack_size(0)
        torch.set_num_threads(before)


def test_another_thread_may_close_while_groups_are_taken():
    for _ in range(20):
        loader = open_loader(lambda: group, count(0), workers=1)
        next(loader)
        found = []
        reader = threading.Thread(target=found.extend, args=(loader,), daemon=True)
        reader.start()
        loader.close()
        reader.join(60)
        assert not reader.is_alive()
        assert [packed.notes for packed in found] == [
            group(key).notes for key in range(1, 1 + len(found))
        ]
