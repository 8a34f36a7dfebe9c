"""The order is the same on any number of ranks and loader processes, for sets of any size."""

from __future__ import annotations

import numpy as np
import pytest

from bigdet.data.ordering.groups import Order, lanes_of_rank
from bigdet.data.ordering.windows import Windows
from bigdet.ops.random import permutation

NUM_LANES = 192  # 1, 2, 3, 4, 6, 8 and 64 ranks divide it
NUM_PASSES = 2
SMALL = [(ranks, workers) for ranks in (1, 2, 3, 4, 6, 8, 64) for workers in (0, 1, 3)]
SETS = {1: (1, SMALL), 7: (1, SMALL), 499: (1, SMALL), 118_287: (16, [(1, 0), (6, 3), (64, 1)])}
"""Images per group, and ranks by workers, for each number of images."""


def make(count: int, images_per_gpu: int, kind: str) -> Order:
    """A new order, as every process makes one of its own."""
    windows = Windows((np.arange(count) // 1500).astype(np.uint32), 1024)
    return Order(
        0.5 + permutation("ratios", count=count) / count,
        seed=0,
        phase="train",
        images_per_gpu=images_per_gpu,
        num_lanes=NUM_LANES,
        windows=windows if kind == "windowed" else None,
    )


def read_all(count: int, images_per_gpu: int, kind: str, num_ranks: int, workers: int):
    """Samples and weights of all passes, (steps, L, m), as so many ranks and processes see them."""
    steps = NUM_PASSES * make(count, images_per_gpu, kind).steps_per_pass
    samples = np.full((steps, NUM_LANES, images_per_gpu), -1)
    weights = np.full(samples.shape, -1.0)
    for rank in range(num_ranks):
        lanes = lanes_of_rank(NUM_LANES, rank, num_ranks)
        keys = [(step, lane) for step in range(1, steps + 1) for lane in lanes]
        for worker in range(max(1, workers)):
            order = make(count, images_per_gpu, kind)
            for step, lane in keys[worker :: max(1, workers)]:
                group = order.group(step, lane)
                assert (samples[step - 1, lane] == -1).all()
                samples[step - 1, lane], weights[step - 1, lane] = group.samples, group.weights
    assert (samples >= 0).all()  # each group came once: ranks have equally many steps
    return samples, weights


@pytest.mark.parametrize("kind", ["shuffled", "windowed"])
@pytest.mark.parametrize("count", SETS)
def test_ids_depend_on_neither_ranks_nor_workers(count, kind):
    images_per_gpu, splits = SETS[count]
    first, *others = splits
    samples, weights = read_all(count, images_per_gpu, kind, *first)
    for number, whole in enumerate(np.split(samples, NUM_PASSES)):
        of_pass = np.split(weights, NUM_PASSES)[number]
        np.testing.assert_array_equal(np.sort(whole[of_pass == 1]), np.arange(count))
        assert (of_pass[:-1] == 1).all()
    if count > NUM_LANES:
        assert (samples[: len(samples) // 2] != samples[len(samples) // 2 :]).any()
    for split in others:
        found, found_weights = read_all(count, images_per_gpu, kind, *split)
        np.testing.assert_array_equal(found, samples)
        np.testing.assert_array_equal(found_weights, weights)
