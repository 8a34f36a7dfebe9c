"""The batches of a step reach the device in order."""

from __future__ import annotations

import torch

from bigdet.structures import Batch, Targets
from bigdet.training.prefetch import prefetch


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
