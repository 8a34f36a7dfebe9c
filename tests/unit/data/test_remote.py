"""Shard sets at an address: whatever the network does, bytes are right, or a message says why."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bigdet.config.data import CacheConfig, TrainSplitConfig
from bigdet.config.rules import ConfigError
from bigdet.data.format import remote, tars
from bigdet.data.format.cache import locked
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import open_train_set
from bigdet.data.format.remote import file_address, shown
from bigdet.data.format.shard_set import ShardSet, UnavailableShardError
from bigdet.data.making.shard_check import check_shards
from bigdet.data.streams.stream import EvalStream, TrainStream
from tests.unit.data.shard_server import FAULTS, ShardServer
from tests.unit.data.small_shards import write_set
from tests.unit.data.streams import open_stream

NUM_SHARDS, PER_SHARD = 20, 4
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds; no proxy between this process and its own server."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,) * 6)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("remote") / "set"
    return write_set(folder, num_shards=NUM_SHARDS, per_shard=PER_SHARD)


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), gib=1.0)


def room_for(shards: ShardSet, count: float) -> float:
    """The GiB that the largest shard takes ``count`` times."""
    return count * max(shard.bytes for shard in shards.manifest.shards) / 2**30


def cached(cache: CacheConfig) -> list[Path]:
    """The shards and runs in a cache."""
    files = (Path(cache.folder) / "shards").iterdir()
    return sorted(path for path in files if not path.suffix and path.name != "lock")


def assert_same(shards: ShardSet, local: ShardSet, rows: list[int] | None = None) -> None:
    for row in range(len(local)) if rows is None else rows:
        assert shards.read(row) == local.read(row)


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_whole_pass_arrives_from_a_server_that_fails_at_random(local, cache, mode, monkeypatch):
    monkeypatch.setattr(tars, "RUN_BYTES", 4096)
    config = CacheConfig(folder=cache.folder, gib=cache.gib, mode=mode)
    with ShardServer(local.folder, fault_rate=0.3, seed=1) as server:
        shards = ShardSet(server.address, cache=config)
        assert shards.manifest == local.manifest
        assert shards.index_hash() == local.index_hash()
        assert np.array_equal(shards.index, local.index)
        assert_same(shards, local)
        shards.close()
    assert all(server.faults[fault] for fault in FAULTS), server.faults
    sizes = sum(path.stat().st_size for path in cached(config))
    assert sizes <= sum(shard.bytes for shard in local.manifest.shards)
    assert not list(Path(cache.folder).rglob("*.part"))


def test_the_stream_of_a_remote_set_is_that_of_the_local_one(local, cache):
    options = {"size_cap": (32, 64), "images_per_gpu": 4, "rank": 0, "world_size": 1}
    expected = list(EvalStream(local, workers=0, **options))
    with ShardServer(local.folder, fault_rate=0.1, seed=2) as server:
        found = list(EvalStream(ShardSet(server.address, cache=cache), workers=2, **options))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.image_ids.tolist() == other.image_ids.tolist()
        assert one.images.equal(other.images)


def train_stream(shards: ShardSet, workers: int, **options) -> TrainStream:
    return open_stream(shards, max_damaged=1000, workers=workers, **options)


@pytest.mark.parametrize(("workers", "room"), [(0, 3.0), (2, 5.0)])
def test_windows_over_twenty_shards_fetch_each_once_into_a_cache_of_a_few(
    cache, workers, room, tmp_path
):
    local = write_set(tmp_path / "set", num_shards=NUM_SHARDS, per_shard=32)
    config = CacheConfig(folder=cache.folder, gib=room_for(local, room))
    num_groups = NUM_SHARDS * 32 // 2
    options = {"order": "windowed", "window": 16}  # a window, or an aspect pool: 1 or 2 shards
    batches = iter(train_stream(local, 0, **options))
    expected = list(islice(batches, num_groups))
    # What the next pass begins with, a pool and a window: loaders may fetch it early.
    begun = {image_id for batch in islice(batches, 24) for image_id in batch.image_ids.tolist()}
    with ShardServer(local.folder, fault_rate=0.1, seed=3) as server:
        stream = train_stream(ShardSet(server.address, cache=config), workers, **options)
        found = list(islice(stream, num_groups))
        stream.close()
    for one, other in zip(found, expected, strict=True):
        assert one.image_ids.tolist() == other.image_ids.tolist()
        assert one.images.equal(other.images)
    ids = {image_id for batch in found for image_id in batch.image_ids.tolist()}
    assert ids == set(range(1, len(local) + 1))
    begun_shards = {f"{(image_id - 1) // 32:06d}.tar" for image_id in begun}
    assert len(begun_shards) <= 2
    for name, count in server.answers.items():
        assert count == 1 or (count == 2 and name in begun_shards), name
    assert sum(path.stat().st_size for path in cached(config)) <= config.gib * 2**30


@pytest.mark.parametrize("workers", [0, 2])
def test_without_its_server_a_run_stops_with_one_message_that_names_the_shard(
    local, cache, workers, caplog
):
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=cache)
        shards.read(0)
        server.stop()
        stream = train_stream(shards, workers)
        with pytest.raises(UnavailableShardError) as error:
            list(islice(stream, 100))
        stream.close()
    message = str(error.value)
    assert message.startswith(f"{server.address}/0000")
    assert ".tar: the shard cannot be fetched: 7 attempts failed, the last one: " in message
    assert "\n" not in message
    assert stream.damaged == {}  # no other sample in its place: that would be as far away
    assert shards.read(1) == local.read(1)  # of the shard that is there


def test_a_set_that_is_not_there_is_reported_at_once(local, cache, tmp_path):
    with ShardServer(local.folder) as server:
        with pytest.raises(ShardError, match=r"/nowhere: manifest and .* the server answers 404"):
            ShardSet(f"{server.address}/nowhere", cache=cache)
        assert server.requests == {"nowhere/manifest.json": 1}
    with pytest.raises(ShardError, match=r"Protocol not known: ftpq"):
        ShardSet("ftpq://host/set", cache=cache)
    with pytest.raises(ShardError, match=r"^memory://absent: .* FileNotFoundError"):
        ShardSet("memory://absent", cache=cache)


def test_a_cache_of_two_shards_serves_twenty(local, cache):
    limit = room_for(local, 2.0)
    config = CacheConfig(folder=cache.folder, gib=limit)
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=config)
        for _ in range(2):
            for row in range(len(local)):
                assert shards.read(row) == local.read(row)
                used = sum(path.stat().st_size for path in cached(config))
                assert used <= limit * 2**30
        assert {server.requests[s.file] for s in local.manifest.shards} == {2}
        # The one before the last is still there, the one before that is not.
        assert_same(shards, local, [NUM_SHARDS * PER_SHARD - PER_SHARD - 1])
        assert server.requests["000018.tar"] == 2
        assert_same(shards, local, [NUM_SHARDS * PER_SHARD - 2 * PER_SHARD - 1])
        assert server.requests["000017.tar"] == 3


def test_a_process_forked_meanwhile_does_not_keep_a_lock(tmp_path):
    # A copy of the descriptor is what a fork leaves: both have one open file, and one lock.
    path = tmp_path / "lock"
    with locked(path):
        (number,) = (n for n in os.listdir("/proc/self/fd") if leads_to(n, path))
        inherited = os.dup(int(number))
        with open(path) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(inherited)


def leads_to(descriptor: str, path: Path) -> bool:
    link = Path("/proc/self/fd") / descriptor
    return link.exists() and link.samefile(path)


def test_a_shard_that_a_process_has_open_is_not_deleted(local, cache, caplog):
    config = CacheConfig(folder=cache.folder, gib=room_for(local, 2.0))
    with ShardServer(local.folder) as server:
        first, second = (ShardSet(server.address, cache=config) for _ in range(2))
        first.read(0)
        os.utime(cached(config)[0], (0, 0))  # used longest ago by far
        for shard in range(1, 5):
            second.read(shard * PER_SHARD)
        assert caplog.records == []
        first.read(1)
        assert server.requests["000000.tar"] == 1
        third = ShardSet(server.address, cache=config)
        third.read(10 * PER_SHARD)  # while two others are in use
        assert "in use at once, data.cache.gib allows" in caplog.text
        for shards in (first, second, third):
            shards.close()


def test_what_is_expected_stays_and_what_was_used_since_goes(local, cache):
    config = CacheConfig(folder=cache.folder, gib=room_for(local, 4.0))
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=config)
        for shard in range(3):
            shards.read(shard * PER_SHARD)
        first, second = (shards._tars._piece(shard, 0).name for shard in range(2))
        for time_of_use, name in enumerate((first, second), start=1):
            os.utime(Path(cache.folder) / "shards" / name, (time_of_use, time_of_use))
        shards.expect(np.arange(PER_SHARD))
        for shard in range(3, 6):
            shards.read(shard * PER_SHARD)
        names = {path.name for path in cached(config)}
        assert (first in names, second in names) == (True, False)
        assert_same(shards, local, [1])
        assert server.requests["000000.tar"] == 1


@pytest.mark.parametrize(("room", "num_ahead"), [(6.0, 3), (4.0, 0)])
def test_what_is_expected_is_fetched_ahead_where_there_is_room(local, cache, room, num_ahead):
    config = CacheConfig(folder=cache.folder, gib=room_for(local, room))
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=config)
        shards.expect(np.array([0, 1, 9, 5]))  # of the first, third and second shard
        if num_ahead:
            shards._tars._thread.join(30)
        else:
            assert shards._tars._thread is None
        asked = [name for name in server.ranges if name.endswith(".tar")]
        assert asked == ["000000.tar", "000002.tar", "000001.tar"][:num_ahead]
        assert_same(shards, local, [0, 1, 5, 9])
        assert {server.requests[f"00000{shard}.tar"] for shard in range(3)} == {1}


def test_what_is_expected_while_the_thread_ends_is_fetched_too(local, cache, monkeypatch):
    config = CacheConfig(folder=cache.folder, gib=room_for(local, 6.0))
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=config)
        shards.expect(np.array([0]))
        first = shards._tars._thread
        first.join(30)
        monkeypatch.setattr(first, "is_alive", lambda: True)  # as between its last look and its end
        shards.expect(np.array([5]))
        shards._tars._thread.join(30)
        asked = [name for name in server.ranges if name.endswith(".tar")]
        assert asked == ["000000.tar", "000001.tar"]


def test_a_fetch_ahead_that_fails_is_left_to_the_read_that_needs_it(local, cache):
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=cache)
        server.stop()
        shards.expect(np.arange(PER_SHARD))
        shards._tars._thread.join(30)
        with pytest.raises(
            UnavailableShardError, match=r"000000\.tar: the shard cannot be fetched"
        ):
            shards.read(0)


def test_a_cache_that_holds_no_two_pieces_is_refused(local, cache):
    with ShardServer(local.folder) as server:
        config = CacheConfig(folder=cache.folder, gib=room_for(local, 1.9))
        with pytest.raises(ConfigError, match=r"data\.cache\.gib: found .* two must fit"):
            ShardSet(server.address, cache=config)
        small = CacheConfig(folder=cache.folder, gib=room_for(local, 19.0))
        with pytest.raises(ConfigError, match=r"data\.cache\.gib: .* in random order"):
            ShardSet(server.address, cache=small).check_random_reads()
        ShardSet(server.address, cache=cache).check_random_reads()


def test_sets_that_fit_only_one_by_one_are_refused_together(local, cache, tmp_path):
    for name in "ab":
        shutil.copytree(local.folder, tmp_path / "both" / name)
    config = CacheConfig(folder=cache.folder, gib=room_for(local, 1.5 * NUM_SHARDS))
    with ShardServer(tmp_path / "both") as server:
        a, b = (f"{server.address}/{name}" for name in "ab")
        sets = [ShardSet(address, cache=config) for address in (a, b)]
        sets[0].check_random_reads(ShardSet(f"{a}", cache=config))  # the same files
        message = r"gib: .*/a and .*/b are read in random order"
        with pytest.raises(ConfigError, match=message):
            sets[0].check_random_reads(sets[1])
        split = TrainSplitConfig(shards=a, more_shards=[b])
        with pytest.raises(ConfigError, match=message):
            open_train_set(split, config).check_random_reads()
        split = TrainSplitConfig(shards=a, more_shards=[a, str(local.folder)])
        open_train_set(split, config).check_random_reads()


def read_in_order(address: str, config: CacheConfig, seed: int, results: Path) -> None:
    """A process of its own: reads all of a set and leaves what it found."""
    shards = ShardSet(address, cache=config)
    rows = np.random.default_rng(seed).permutation(len(shards)).tolist()
    found = {row: shards.read(row) for row in rows}
    results.write_bytes(pickle.dumps(found))
    os._exit(0)


def test_two_processes_fetch_each_shard_once(local, cache, tmp_path):
    with ShardServer(local.folder) as server:
        files = [tmp_path / "one", tmp_path / "two"]
        processes = [
            FORK.Process(target=read_in_order, args=(server.address, cache, seed, file))
            for seed, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        expected = {shard.file: 1 for shard in local.manifest.shards}
        assert server.requests == {**expected, "manifest.json": 2, "index.npy": 1}
    for file in files:
        found = pickle.loads(file.read_bytes())
        assert all(found[row] == local.read(row) for row in range(len(local)))


def test_what_a_killed_process_has_fetched_in_part_is_never_used(local, cache, tmp_path):
    with ShardServer(local.folder) as server:
        server.planned = [None, None, "stall"]  # manifest and index arrive, the shard in half
        target = FORK.Process(
            target=read_in_order, args=(server.address, cache, 0, tmp_path / "never")
        )
        remote.STALL_SECONDS = 60.0  # of the process; the fixture sets it back
        target.start()
        parts = Path(cache.folder) / "shards"
        deadline = time.monotonic() + 30
        while not list(parts.glob("*.part")) or len(server.ranges) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(target.pid, signal.SIGKILL)
        target.join()
        (part,) = parts.glob("*.part")
        assert cached(cache) == []
        part.write_bytes(bytes(part.stat().st_size))
        shards = ShardSet(server.address, cache=cache)
        assert_same(shards, local)
        assert list(parts.glob("*.part")) == []


def test_a_leftover_of_another_shard_takes_no_room_for_long(local, cache):
    config = CacheConfig(folder=cache.folder, gib=room_for(local, 2.0))
    parts = Path(cache.folder) / "shards"
    parts.mkdir(parents=True)
    (parts / "0123.part").write_bytes(bytes(100_000))
    with ShardServer(local.folder) as server:
        ShardSet(server.address, cache=config).read(0)
    assert list(parts.glob("*.part")) == []


def test_a_fetch_continues_where_the_connection_broke(local, cache):
    shard = local.manifest.shards[0]
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=cache)
        server.planned = ["cut", "500"]
        assert_same(shards, local, [0])
        assert server.ranges[shard.file] == [None] + [f"bytes={shard.bytes // 2}-"] * 2
        server.has_ranges = False
        server.planned = ["cut"]
        assert_same(shards, local, [PER_SHARD])  # from the start, as the server knows no parts
        assert server.requests["000001.tar"] == 2


def test_ranges_fetch_the_runs_that_are_read_and_each_once(local, cache, monkeypatch):
    monkeypatch.setattr(tars, "RUN_BYTES", 4096)
    config = CacheConfig(folder=cache.folder, gib=cache.gib, mode="ranges")
    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=config)
        assert_same(shards, local, [1, 1])
        entry = local.index[1]
        start = int(entry["image_offset"])
        stop = int(entry["annotation_offset"]) + int(entry["annotation_size"])
        runs = range(start // 4096, -(-stop // 4096))
        expected = [f"bytes={run * 4096}-{run * 4096 + 4095}" for run in runs]
        assert server.ranges["000000.tar"] == expected
        server.has_ranges = False
        with pytest.raises(UnavailableShardError, match="the server does not send parts of files"):
            shards.read(PER_SHARD)


def test_any_span_of_a_tar_can_be_read_in_runs(local, cache, monkeypatch):
    monkeypatch.setattr(tars, "RUN_BYTES", 4096)
    config = CacheConfig(folder=cache.folder, gib=cache.gib, mode="ranges")
    shard = local.manifest.shards[0]
    data = local.path(0).read_bytes()
    with ShardServer(local.folder) as server:
        reader = tars.open_tars(server.address, local.manifest.shards, config)
        spans = [(0, 1), (4095, 2), (4096, 4096), (100, 9000), (shard.bytes - 5, 5), (0, 10**6)]
        for start, size in [*spans, (shard.bytes, 3)]:
            assert reader.read(0, start, size) == data[start : start + size]
        assert len(server.ranges[shard.file]) == -(-shard.bytes // 4096)
        reader.close()


def test_a_shard_that_is_not_that_of_the_manifest_is_never_used(local, cache, tmp_path):
    other = write_set(tmp_path / "other", num_shards=1, per_shard=PER_SHARD, seed=900)
    folder = tmp_path / "copy"
    shutil.copytree(local.folder, folder)
    size = local.manifest.shards[0].bytes
    data = other.path(0).read_bytes()
    with ShardServer(folder) as server:
        shards = ShardSet(server.address, cache=cache)
        for content, message in (
            (data.ljust(size, b"\0")[:size], r"its SHA-256 is .*, expected "),
            (data[: size // 2], rf"it ends (before byte|after) {size // 2}"),
            (data + bytes(size), rf"it has \d+ bytes, expected {size}"),
        ):
            (folder / "000000.tar").write_bytes(content)
            with pytest.raises(UnavailableShardError, match=rf"000000\.tar: .*{message}"):
                shards.read(0)
            assert cached(cache) == []
        # A set made anew at the same address is another one, cached or not.
        shutil.rmtree(folder)
        anew = write_set(folder, num_shards=1, per_shard=PER_SHARD, seed=900)
        assert_same(ShardSet(server.address, cache=cache), anew)


def test_a_cached_shard_that_was_cut_is_fetched_again(local, cache):
    with ShardServer(local.folder) as server:
        ShardSet(server.address, cache=cache).read(0)
        os.truncate(cached(cache)[0], 100)
        assert_same(ShardSet(server.address, cache=cache), local, [0, 1])
        assert server.requests["000000.tar"] == 2


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)  # the same file, which readers have open


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_damaged_file_of_the_cache_is_fetched_again(local, cache, mode, caplog):
    config = CacheConfig(folder=cache.folder, gib=cache.gib, mode=mode)
    with ShardServer(local.folder) as server:
        readers = [ShardSet(server.address, cache=config) for _ in range(3)]
        readers.append(readers[2].for_thread())
        for reader in readers:
            assert_same(reader, local, [1])
        (file,) = cached(config)
        damage(file, int(local.index["image_offset"][0]) + 50)
        damage(file, int(local.index["annotation_offset"][2]) + 5)
        assert readers[0].record(2) == local.record(2)
        for reader in readers:  # they see that another one has replaced it
            assert_same(reader, local, [0, 2])
        assert server.requests["000000.tar"] == 2
        assert cached(config) == [file]
        assert "sample 000000000001: CRC-32 is" in caplog.text
        # Found once more by the same reader, it is reported.
        damage(file, int(local.index["image_offset"][0]) + 50)
        with pytest.raises(ShardError, match=r"CRC-32 is .* check-shards http://"):
            readers[0].read(0)
        assert server.requests["000000.tar"] == 2


@pytest.mark.parametrize("name", ["index.npy", "manifest.json"])
def test_a_damaged_copy_of_the_index_or_manifest_is_fetched_again(local, cache, name):
    with ShardServer(local.folder) as server:
        copy = ShardSet(server.address, cache=cache).folder / name
        damage(copy, 200)
        assert_same(ShardSet(server.address, cache=cache), local, [0, 1])
        assert copy.read_bytes() == (local.folder / name).read_bytes()
        assert server.requests["index.npy"] == 2


def test_a_remote_shard_that_is_damaged_itself_is_fetched_once_more_and_reported(
    local, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(tars, "RUN_BYTES", 4096)
    folder = shutil.copytree(local.folder, tmp_path / "set")
    damage(folder / "000000.tar", int(local.index["image_offset"][0]) + 50)
    config = CacheConfig(folder=cache.folder, gib=cache.gib, mode="ranges")
    with ShardServer(folder) as server:
        shards = ShardSet(server.address, cache=config)
        for _ in range(2):
            with pytest.raises(ShardError, match="The shard is damaged"):
                shards.read(0)
            assert set(Counter(server.ranges["000000.tar"]).values()) == {2}


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(local, cache, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ShardServer(local.folder) as server:
        shards = ShardSet(server.address, cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UnavailableShardError, match=r"cannot be written: .* No space"):
                shards.read(0)
        assert server.requests["000000.tar"] == 1
        assert cached(cache) == list(Path(cache.folder).rglob("*.part")) == []
        assert_same(shards, local, [0])


def test_pipes_and_other_protocols_give_the_same(local, cache, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(local.folder), "/a set", recursive=True)
    for address in ("memory://a set", f"pipe:cat {local.folder}/{{}}"):
        assert_same(ShardSet(address, cache=cache), local)
    config = CacheConfig(folder=str(tmp_path / "other"), gib=1.0, mode="ranges")
    assert_same(ShardSet("memory://a set", cache=config), local, [3, 50])


def test_a_command_that_fails_or_hangs_is_an_error_with_its_exit_code(local, cache):
    with pytest.raises(UnavailableShardError, match=r"7 attempts .* ended with exit code 3"):
        ShardSet(f"pipe:cat {local.folder}/{{}}; exit 3", cache=cache)
    with pytest.raises(UnavailableShardError, match=r"7 attempts .* no byte in 0 s"):
        ShardSet("pipe:sleep 5; echo {}", cache=cache)


def test_addresses_of_files_keep_queries_and_quote_names():
    assert file_address("https://host/a/?key=1", "x y.tar") == "https://host/a/x%20y.tar?key=1"
    assert file_address("s3://bucket/a/", "x.tar") == "s3://bucket/a/x.tar"
    assert file_address("pipe:cat /a/{} | cat", "$(rm x)") == "pipe:cat /a/'$(rm x)' | cat"
    with pytest.raises(ValueError, match=r"expected a command with \{\}"):
        file_address("pipe:cat /a", "x.tar")
    assert shown("https://host/a/x.tar?key=1") == "https://host/a/x.tar"


def test_retries_are_reported_and_the_pauses_double(local, cache, monkeypatch, caplog):
    monkeypatch.undo()
    pauses: list[float] = []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", pauses.append)
    with ShardServer(local.folder) as server, caplog.at_level(logging.WARNING):
        server.planned = ["500"] * 5
        ShardSet(server.address, cache=cache)
        assert server.requests["manifest.json"] == 6
    assert pauses[:5] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert "manifest.json: HTTP Error 500: Internal Server Error; again in 0.5 s" in caplog.text


def test_a_remote_set_is_checked_whole_and_nothing_of_it_is_kept(local, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = shutil.copytree(local.folder, tmp_path / "set")
    with ShardServer(folder, fault_rate=0.1, seed=5) as server:
        assert list(check_shards(server.address)) == []
        tar = folder / "000003.tar"
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
        (problem,) = check_shards(server.address)
    assert problem.place == "000003.tar"
    assert "its SHA-256 is" in problem.what
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
