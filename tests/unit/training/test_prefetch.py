"""Batches reach the device in order, none ahead of time on the CPU."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from bigdet.structures import Batch, Targets
from bigdet.training.prefetch import prefetch


def batch(number):
    targets = Targets(
        boxes=torch.full((2, 4), float(number)), labels=torch.zeros(2, dtype=torch.int64),
        is_crowd=torch.zeros(2, dtype=torch.bool), offsets=torch.tensor([0, 2]),
    )  # fmt: skip
    size = torch.tensor([[64, 64]])
    return Batch(
        images=torch.full((1, 3, 64, 64), number, dtype=torch.uint8), image_sizes=size,
        original_sizes=size, image_ids=torch.tensor([number]), weights=torch.ones(1),
        targets=targets, seed=number,
    )  # fmt: skip


def batches(taken, count=5):
    for number in range(count):
        taken.append(number)
        yield batch(number)


def test_on_a_cpu_nothing_is_taken_ahead():
    taken = []
    found = list(islice(prefetch(batches(taken), torch.device("cpu")), 2))
    assert taken == [0, 1]
    assert [moved.seed for _, moved in found] == [0, 1]
    assert all(torch.equal(host.images, moved.images) for host, moved in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_one_batch_more_is_on_its_way():
    taken = []
    moved = prefetch(batches(taken), torch.device("cuda"))
    next(moved)
    assert taken == [0, 1]
    for number, (host, device) in enumerate(moved, start=1):
        assert device.images.is_cuda
        assert device.targets.boxes.is_cuda
        assert host.seed == number
        assert (device.images == number).all()
        assert (device.targets.boxes == number).all()
    assert number == 4
