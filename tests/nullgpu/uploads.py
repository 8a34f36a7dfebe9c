"""The batches of a phase on the null GPU: which copies are made, when, and what a thread leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bigdet.config.resize import ResizeConfig
from bigdet.data.examples.collate import PackedGroup
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.shapes import make_shapes
from bigdet.data.streams.stream import TrainStream
from bigdet.training.prefetch import StepBatches
from tests.nullgpu import null_gpu
from tests.unit.data.streams import open_stream

GPU = torch.device("cuda", 0)
STEPS, LANES = 4, 3


def stream_of(shards: ShardSet, workers: int) -> TrainStream:
    resize = ResizeConfig(kind="jitter", size=64, jitter_range=(3.0, 4.0))  # crops leave boxes out
    return open_stream(
        shards, workers=workers, with_masks=True, resize=resize, images_per_step=2 * LANES
    )


def num_threads() -> int:
    return sum(thread.name == "next batches" for thread in threading.enumerate())


def steps(shards: ShardSet, workers: int) -> dict[str, Any]:
    """Four steps: copies of each, and whether batches and counts are those of a CPU."""
    plain = stream_of(shards, workers)
    expected = iter(plain)
    stream = stream_of(shards, workers)
    batches = StepBatches(stream, GPU)
    copies, are_same, most_threads = [], True, 0
    for _ in range(STEPS):
        null_gpu.reset()
        micro_batches = next(batches)
        most_threads = max(most_threads, num_threads())
        on_device = list(batches.on_device(micro_batches))
        batches._thread.join()  # what it does is counted in this step
        copies.append(null_gpu.counts())
        assert all(batch.images.is_cuda and batch.targets.boxes.is_cuda for batch in on_device)
        for own, other in zip(micro_batches, islice(expected, LANES), strict=True):
            are_same &= torch.equal(own.images, other.images) and own.images.is_pinned()
            are_same &= torch.equal(own.image_ids, other.image_ids)
        are_same &= stream.dropped_boxes == plain.dropped_boxes
    batches.close()
    plain.close()
    return {
        "copies": copies, "are same": are_same, "dropped": stream.dropped_boxes,
        "most threads": most_threads, "threads left": num_threads(),
    }  # fmt: skip


class Failing(TrainStream):
    """Its first step has all groups, the second one fails."""

    def groups(self) -> Iterator[PackedGroup]:
        yield from islice(super().groups(), LANES + 1)
        raise ShardError("000000.tar: cut off")


def failure(shards: ShardSet) -> dict[str, Any]:
    """An error in the thread."""
    stream = stream_of(shards, workers=0)
    stream.__class__ = Failing
    batches = StepBatches(stream, GPU)
    num_first = len(next(batches))
    try:
        next(batches)
        message = ""
    except ShardError as error:
        message = str(error)
    batches.close()
    return {"first": num_first, "message": message, "threads left": num_threads()}


def main() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        make_shapes(Path(folder) / "train", split="train", images=16)
        shards = ShardSet(Path(folder) / "train")
        found = {f"{workers} workers": steps(shards, workers) for workers in (0, 1)}
        return {**found, "failure": failure(shards)}
