"""Random damage anywhere in a shard set: the same data, or a clear error; never a silent change."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import Sample, ShardSet
from tests.unit.data.small_shards import forget_hashes, write_set

NUM_MUTATIONS = 250


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path, num_shards=2, per_shard=3).folder


def mutated(data: bytes, words: random.Random) -> bytes:
    """Change, cut, repeat or zero some bytes."""
    changed = bytearray(data)
    kind = words.choice(["flip", "flip", "flip", "digit", "zero", "cut", "insert"])
    place = words.randrange(len(changed))
    if kind == "flip":
        for _ in range(words.choice([1, 1, 1, 4])):
            changed[words.randrange(len(changed))] ^= words.randrange(1, 256)
    elif kind == "digit":
        changed[place] = ord(words.choice('0123456789abcdef"{}[],:. '))
    elif kind == "zero":
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    elif kind == "cut":
        del changed[place:]
    else:
        changed[place:place] = changed[place : place + words.randrange(1, 64)]
    return bytes(changed)


def read_all(folder: Path) -> tuple[object, list[Sample | None]]:
    """What a set says of itself and its samples, None for those refused."""
    shards = ShardSet(folder)
    samples: list[Sample | None] = []
    for row in range(len(shards)):
        try:
            samples.append(shards.read(row))
        except ShardError:
            samples.append(None)
    shards.close()
    return (shards.manifest, shards.index.tobytes()), samples


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "000000.tar"])
def test_damage_anywhere_gives_the_same_data_or_a_clear_error(folder, name):
    words = random.Random(name)
    original = (folder / name).read_bytes()
    about, samples = read_all(folder)
    outcomes = {"refused": 0, "lost samples": 0, "the same": 0}
    for _ in range(NUM_MUTATIONS):
        (folder / name).write_bytes(mutated(original, words))
        try:
            found_about, found = read_all(folder)
        except ShardError:
            outcomes["refused"] += 1
            continue
        assert found_about == about
        assert all(one in (None, other) for one, other in zip(found, samples, strict=True))
        outcomes["lost samples" if None in found else "the same"] += 1
    if name == "000000.tar":  # bytes of headers and padding are never read
        assert min(outcomes.values()) > 20, outcomes
    else:
        assert outcomes["lost samples"] == 0
        assert outcomes["refused"] > 0.9 * NUM_MUTATIONS, outcomes


@pytest.mark.parametrize("name", ["manifest.json", "index.npy"])
def test_damage_in_a_set_without_hashes_never_crashes_and_samples_are_right(folder, name):
    forget_hashes(folder)
    words = random.Random(name)
    original = (folder / name).read_bytes()
    _, samples = read_all(folder)
    num_read = 0
    for _ in range(NUM_MUTATIONS):
        (folder / name).write_bytes(mutated(original, words))
        try:
            _, found = read_all(folder)
        except ShardError:
            continue
        num_read += 1
        assert all(one is None or one in samples for one in found)
    assert num_read > 20
