"""What rank and loader processes hold in memory, on small and on huge sets. Linux only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdet.config.resize import ResizeConfig
from bigdet.data.examples.collate import Allocate, PackedGroup, pack
from bigdet.data.examples.objects import no_objects
from bigdet.data.examples.transforms import Example
from bigdet.data.format.manifest import MANIFEST_NAME
from bigdet.data.format.shard_set import INDEX_DTYPE, INDEX_NAME, ShardSet
from bigdet.data.streams.loader import Loader
from tests.unit.data.streams import open_stream

DIRECT = ResizeConfig(kind="direct", size=448)


def memory(process: int | str, kind: str) -> float:
    """MB of a process by smaps; of ``Pss``, pages are divided among those that share them."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 10**6


def small_group(allocate: Allocate) -> PackedGroup:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return pack(
        [Example(image, (8, 8), 1, 1.0, no_objects())], canvas=None, seed=0, allocate=allocate
    )


def in_own_process(function: str, *arguments: object) -> dict[str, Any]:
    """Call a function of this file where nothing that others left behind counts."""
    words = ", ".join(repr(argument) for argument in arguments)
    code = (
        f"import json; from tests.unit.data.test_stream_memory import {function}; "
        f"print(json.dumps({function}({words})))"
    )
    root = Path(__file__).parents[3]
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=root
    )
    found: dict[str, Any] = json.loads(output.stdout)
    return found


def memory_over_passes(folder: str, order: str) -> dict[str, Any]:
    """MB of a bare loader process, and of a stream's after four, eight and twelve passes.

    Memory is private and resident, in this order.
    """
    bare = Loader(
        lambda _, allocate: small_group(allocate), range(100), workers=1, group_bytes=1000
    )
    next(bare)
    (process,) = active_children()
    bare_mb = memory(process.pid, "Private_"), memory(process.pid, "Rss:")
    bare.close()

    stream = open_stream(
        ShardSet(folder), order=order, resize=DIRECT, with_masks=True, images_per_gpu=4, workers=1
    )
    batches, after = iter(stream), []
    for _ in range(3):
        for _ in islice(batches, 4 * stream.steps_per_pass):  # four passes at a time
            pass
        (process,) = active_children()
        after.append((memory(process.pid, "Private_"), memory(process.pid, "Rss:")))
    stream.close()
    return {"bare": bare_mb, "after": after}


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_loader_processes_stay_small_over_three_passes(shapes_shards, order):
    found = in_own_process("memory_over_passes", str(shapes_shards / "train"), order)
    bare, after = found["bare"], found["after"]
    for kind in range(2):
        assert after[-1][kind] - bare[kind] < 100
        assert after[-1][kind] - after[0][kind] < 5


def make_huge_set(folder: Path, count: int, num_shards: int) -> None:
    """An index as of a real set, and tars that are all holes."""
    index = np.zeros(count, INDEX_DTYPE)
    numbers = np.arange(count)
    index["image_id"] = numbers
    index["shard"] = numbers * num_shards // count
    index["width"] = 400 + numbers * 7919 % 300
    index["height"] = 400 + numbers * 104_729 % 300
    index["num_boxes"] = 1
    folder.mkdir()
    np.save(folder / INDEX_NAME, index)
    shards = []
    for number, samples in enumerate(np.bincount(index["shard"], minlength=num_shards).tolist()):
        name = f"{number:06d}.tar"
        with open(folder / name, "wb") as file:
            file.truncate(256 * 10**6)
        shards.append({"file": name, "bytes": 256 * 10**6, "samples": samples, "sha256": "0" * 64})
    manifest = {
        "version": 1, "name": "huge", "source": "coco", "images": count, "instances": count,
        "crowd": 0, "pixels": 0, "skipped": {}, "changed": {},
        "categories": [{"id": 1, "name": "thing"}], "shards": shards, "options": {},
    }  # fmt: skip
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def open_and_measure(folder: str, order: str, workers: int) -> dict[str, float]:
    """Open a set, start a stream's order in loader processes; seconds, and MB of all together."""
    start = time.perf_counter()
    shards = ShardSet(folder)
    stream = open_stream(
        shards,
        keep_empty=False,
        order=order,
        resize=DIRECT,
        with_masks=True,
        images_per_step=16,
        workers=workers,
    )

    def read(key: tuple[int, int], allocate: Allocate) -> PackedGroup:
        stream.group_ids(*key)
        return small_group(allocate)

    stream._groups.read = read  # the tars hold nothing to decode: all but that
    batches = iter(stream)
    next(batches)
    seconds = time.perf_counter() - start
    for _ in range(400):
        next(batches)
    processes = [os.getpid(), *(process.pid for process in active_children())]
    # Not all of Pss: libraries are shared with whatever else runs on this machine. The index is
    # mapped by all processes and counts once, as a whole.
    mb = sum(memory(process, "Pss_Anon:") + memory(process, "Pss_Shmem:") for process in processes)
    mb += (Path(folder) / INDEX_NAME).stat().st_size / 10**6
    stream.close()
    return {"seconds": seconds, "mb": mb}


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_a_set_of_1_75_million_opens_in_150_mb(tmp_path, order):
    make_huge_set(tmp_path / "huge", 1_750_000, 1200)
    make_huge_set(tmp_path / "tiny", 1000, 2)
    found = {}
    for name in ("tiny", "huge"):
        found[name] = in_own_process("open_and_measure", str(tmp_path / name), order, 2)
    assert found["huge"]["mb"] - found["tiny"]["mb"] < 150
