"""The order windowed: the guarantees of shuffled, and few shards at a time."""

from __future__ import annotations

import numpy as np
import pytest

from bigdet.data.ordering.groups import Order
from bigdet.data.ordering.windows import RUN_SAMPLES, Windows, windowed
from bigdet.ops.random import permutation, words

SHARDS = np.repeat(np.arange(12, dtype=np.uint32), [500, 300, 200, 400, 1, 99] * 2)  # 3,000


def make(count: int, images_per_gpu: int, num_lanes: int, size: int = 256, **options) -> Order:
    settings = {"seed": 0, "phase": "train", **options}
    return Order(
        np.linspace(0.5, 2, count),
        images_per_gpu=images_per_gpu,
        num_lanes=num_lanes,
        windows=Windows(SHARDS[:count], size),
        **settings,
    )


def pass_of(order: Order, pass_number: int = 0):
    """Samples and weights of a whole pass, both (steps, L, m)."""
    first = order.steps_per_pass * pass_number + 1
    groups = [
        [order.group(step, lane) for lane in range(order.num_lanes)]
        for step in range(first, first + order.steps_per_pass)
    ]
    return (
        np.array([[group.samples for group in row] for row in groups]),
        np.array([[group.weights for group in row] for row in groups]),
    )


@pytest.mark.parametrize("count", [24, 25, 100, 1001, 3000])
@pytest.mark.parametrize("pass_number", [0, 3])
def test_every_sample_comes_exactly_once_per_pass(count, pass_number):
    samples, weights = pass_of(make(count, 4, 6), pass_number)
    assert len(samples) == -(-count // 24)  # as many steps as the order shuffled
    np.testing.assert_array_equal(np.sort(samples[weights == 1]), np.arange(count))


def test_masked_slots_stand_at_the_ends_of_lanes_in_the_last_step_and_carry_real_samples():
    samples, weights = pass_of(make(1001, 4, 6))  # lanes of 167 (5) and 166 (1), 42 steps of 4
    assert (weights[:-1] == 1).all()
    np.testing.assert_array_equal(weights[-1], [[1, 1, 1, 0]] * 5 + [[1, 1, 0, 0]])
    assert ((samples >= 0) & (samples < 1001)).all()


def test_images_of_a_lane_are_its_slots_that_are_not_masked():
    order = make(1001, images_per_gpu=4, num_lanes=6)
    for number in (0, 2):
        _, weights = pass_of(order, number)
        steps = range(order.steps_per_pass * number + 1, order.steps_per_pass * (number + 1) + 1)
        images = [order.lane_images(step) for step in steps]
        np.testing.assert_array_equal(images, weights.sum(axis=-1))


def test_a_lane_may_end_with_a_group_of_masked_slots():
    _, weights = pass_of(make(25, 4, 6))  # lanes of 5, 4, 4, 4, 4, 4, two steps
    np.testing.assert_array_equal(weights[-1], [[1, 0, 0, 0]] + [[0] * 4] * 5)


def test_the_entries_are_those_of_the_definition():
    # Worked out with lists, as the docstring of windows.py says it.
    entries, starts = windowed(SHARDS, 256, 7, 3, "train", 1)
    shard_words = words("shard", 3, "train", 1, count=12)
    runs = [
        rows[first : first + RUN_SAMPLES].tolist()
        for rows in (np.flatnonzero(shard == SHARDS) for shard in range(12))
        for first in range(0, len(rows), RUN_SAMPLES)
    ]
    run_ranks = permutation("run", 3, "train", 1, count=len(runs))
    numbers = sorted(
        range(len(runs)), key=lambda run: (shard_words[SHARDS[runs[run][0]]], run_ranks[run])
    )
    sequence = [entry for run in numbers for entry in runs[run]]
    bits = words("window", 3, "train", 1, count=3000) >> np.uint64(24)
    expected = []
    for lane, length in enumerate([429] * 4 + [428] * 3):
        first = len(expected)
        assert starts[lane] == first
        for start in range(first, first + length, 256):
            places = range(start, min(start + 256, first + length))
            expected += [sequence[place] for place in sorted(places, key=lambda i: bits[i])]
    assert entries.tolist() == expected
    assert starts[-1] == 3000


def test_shards_come_one_behind_the_other_in_runs_of_64():
    entries, _ = windowed(SHARDS, 1, 1, 0, "train", 0)  # windows of one: nothing is shuffled
    shards = SHARDS[entries]
    assert (np.diff(shards.astype(int)) != 0).sum() == 11  # twelve shards, each in one piece
    assert len(np.unique(shards[np.flatnonzero(np.diff(shards.astype(int)))])) == 11
    broken = np.flatnonzero(np.diff(entries) != 1)
    # ceil(size / 64) runs each: 8 + 5 + 4 + 7 + 1 + 2, twice, so at most 53 breaks between them.
    assert 40 < len(broken) <= 53


def test_a_lane_reads_few_shards_at_a_time():
    count, num_lanes = 40_000, 4
    shards = np.repeat(np.arange(40, dtype=np.uint32), 1000)
    order = Order(
        np.ones(count),
        seed=0,
        phase="train",
        images_per_gpu=4,
        num_lanes=num_lanes,
        windows=Windows(shards, 256),
    )
    samples, _ = pass_of(order)
    for lane in range(num_lanes):
        for first in range(0, len(samples) - 64, 64):  # 256 samples, a bit more with their pools
            assert len(np.unique(shards[samples[first : first + 64, lane]])) <= 3
        assert len(np.unique(shards[samples[:, lane]])) <= 12  # of its tenth shards, 10,000 long


def test_the_order_is_final():
    # Written down once: a checkpoint of any version continues with this order.
    shards = np.array([0] * 9 + [1] * 9 + [2] * 5, np.uint32)
    order = Order(
        np.linspace(0.5, 2, 23),
        seed=7,
        phase="pretrain",
        images_per_gpu=2,
        num_lanes=2,
        windows=Windows(shards, 256),
    )
    samples, weights = pass_of(order, pass_number=1)
    assert samples.reshape(6, 4).tolist() == [
        [15, 17, 3, 4],
        [13, 14, 21, 22],
        [2, 9, 7, 8],
        [0, 1, 18, 19],
        [10, 12, 5, 6],
        [16, 11, 20, 4],
    ]
    assert weights[-1].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("other", [{"seed": 1}, {"phase": "finetune"}, {"size": 512}])
def test_seed_phase_and_window_change_the_order(other):
    assert (pass_of(make(3000, 4, 2))[0] != pass_of(make(3000, 4, 2, **other))[0]).any()


def test_passes_differ_and_any_group_is_found_without_those_before_it():
    order = make(1000, 4, 2)
    samples = pass_of(order, 2)[0]
    assert (pass_of(order, 0)[0] != samples).any()
    fresh = make(1000, 4, 2)
    np.testing.assert_array_equal(
        fresh.group(2 * order.steps_per_pass + 6, 1).samples, samples[5, 1]
    )


def test_shards_need_not_be_in_the_order_of_the_rows():
    mixed = permutation("mixed", count=3000)
    entries, _ = windowed(SHARDS[mixed], 1, 1, 0, "train", 0)
    np.testing.assert_array_equal(np.sort(entries), np.arange(3000))
    assert (np.diff(SHARDS[mixed][entries].astype(int)) != 0).sum() == 11


@pytest.mark.parametrize("lane", [0, 5])
def test_what_is_upcoming_is_reported_once_per_pool_and_covers_a_window_from_there(lane):
    order = make(3000, 4, 6, size=128)  # lanes of 500: 125 steps, the last pool of 12
    told = {step: order.upcoming(step, lane) for step in range(1, 251)}
    assert [step for step, samples in told.items() if samples is not None] == [
        first + 16 * pool for first in (1, 126) for pool in range(8)
    ]
    for step in (1, 49, 126):
        # 16 groups of the pool and the 32 of a window of 128; pools in other orders.
        found = [order.group(step + i, lane).samples for i in range(48)]
        np.testing.assert_array_equal(np.sort(told[step]), np.sort(np.concatenate(found)))


def test_the_order_shuffled_has_nothing_upcoming():
    order = Order(np.ones(100), seed=0, phase="train", images_per_gpu=2, num_lanes=1)
    assert order.upcoming(1, 0) is None
