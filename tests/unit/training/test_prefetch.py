"""The batches of a step reach the device in order."""

from __future__ import annotations

import threading
from itertools import islice

import torch

from bigdet.data.format.shard_set import ShardSet
from bigdet.structures import Batch, Targets
from bigdet.training.prefetch import StepBatches, prefetch
from tests.unit.data.streams import open_stream


def batch(number):
    targets = Targets(
        boxes=torch.full((2, 4), float(number)),
        labels=torch.zeros(2, dtype=torch.int64),
        is_crowd=torch.zeros(2, dtype=torch.bool),
        offsets=torch.tensor([0, 2]),
    )
    size = torch.tensor([[64, 64]])
    return Batch(
        images=torch.full((1, 3, 64, 64), number, dtype=torch.uint8),
        image_sizes=size,
        original_sizes=size,
        image_ids=torch.tensor([number]),
        weights=torch.ones(1),
        targets=targets,
        seed=number,
    )


def test_on_a_cpu_batches_stay_as_they_are():
    batches = [batch(number) for number in range(3)]
    found = list(prefetch(batches, torch.device("cpu")))
    assert all(one is other for one, other in zip(found, batches, strict=True))


def test_on_a_cpu_steps_are_those_of_the_stream_and_there_is_no_thread(shapes_shards):
    shards = ShardSet(shapes_shards / "train")
    stream, other = (open_stream(shards, images_per_step=6) for _ in range(2))
    steps = StepBatches(stream, torch.device("cpu"))
    threads = threading.active_count()
    for expected in batched(islice(other, 9), 3):
        found = next(steps)
        assert threading.active_count() == threads
        assert [batch.image_ids.tolist() for batch in found] == expected
        assert list(steps.on_device(found)) == found
    steps.close()


def batched(batches, count):
    """The image ids of lists of so many batches."""
    while part := list(islice(batches, count)):
        yield [batch.image_ids.tolist() for batch in part]
