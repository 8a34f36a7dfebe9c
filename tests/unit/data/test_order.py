"""The order of samples: a pure function, exactly once, the same on any number of ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bigdet.data.ordering.groups import POOL_GROUPS, Order, evaluation_groups, lanes_of_rank
from bigdet.ops.random import permutation


def ratios(count: int) -> np.ndarray:
    return 0.5 + permutation("ratios", count=count) / count


def make(count: int, images_per_gpu: int, num_lanes: int, seed: int = 0, phase: str = "train"):
    return Order(
        ratios(count), seed=seed, phase=phase, images_per_gpu=images_per_gpu, num_lanes=num_lanes
    )


def pass_of(order: Order, pass_number: int = 0):
    """Samples and weights of a whole pass, both (steps, L, m)."""
    steps = range(
        order.steps_per_pass * pass_number + 1, order.steps_per_pass * (pass_number + 1) + 1
    )
    groups = [[order.group(step, lane) for lane in range(order.num_lanes)] for step in steps]
    assert all(group.pass_number == pass_number for row in groups for group in row)
    return (
        np.array([[group.samples for group in row] for row in groups]),
        np.array([[group.weights for group in row] for row in groups]),
    )


@pytest.mark.parametrize("count", [24, 25, 100, 1001, 48 * 6])
@pytest.mark.parametrize("pass_number", [0, 3])
def test_every_sample_comes_exactly_once_per_pass(count, pass_number):
    samples, weights = pass_of(make(count, images_per_gpu=4, num_lanes=6), pass_number)
    assert len(samples) == -(-count // 24)
    np.testing.assert_array_equal(np.sort(samples[weights == 1]), np.arange(count))


def test_masked_slots_stand_at_the_end_of_the_last_step_and_carry_real_samples():
    samples, weights = pass_of(make(1001, images_per_gpu=4, num_lanes=6))  # 42 steps, 1008 slots
    assert (weights[:-1] == 1).all()
    np.testing.assert_array_equal(weights[-1].reshape(-1), [1] * 17 + [0] * 7)
    assert ((samples >= 0) & (samples < 1001)).all()


def test_images_of_a_lane_are_its_slots_that_are_not_masked():
    order = make(1001, images_per_gpu=4, num_lanes=6)  # 42 steps; the last has 17 of 24 images
    for first in (0, 42):  # of both passes
        assert order.lane_images(first + 1).tolist() == [4] * 6
        assert order.lane_images(first + 41).tolist() == [4] * 6
        assert order.lane_images(first + 42).tolist() == [4, 4, 4, 4, 1, 0]
    assert make(48, images_per_gpu=4, num_lanes=6).lane_images(2).tolist() == [4] * 6


def test_the_permutation_fills_steps_before_pooling():
    # In the last step, which no pool touches, the permutation stays as drawn.
    order = make(30, images_per_gpu=2, num_lanes=2, seed=5)  # 8 steps of 4, 2 masked
    drawn = permutation("order", 5, "train", 0, count=30)
    samples, _ = pass_of(order)
    np.testing.assert_array_equal(
        samples[-1].reshape(-1), [drawn[28], drawn[29], drawn[0], drawn[1]]
    )


def test_pools_sort_16_groups_of_a_lane_by_aspect_ratio_and_permute_them():
    order = make(16 * 4 + 4, images_per_gpu=2, num_lanes=2)  # one pool, and the last step
    samples, _ = pass_of(order)
    drawn = permutation("order", 0, "train", 0, count=68)[:64].reshape(POOL_GROUPS, 2, 2)
    for lane in range(2):
        members = drawn[:, lane].reshape(-1)
        groups = members[np.argsort(ratios(68)[members])].reshape(POOL_GROUPS, 2)
        expected = groups[permutation("pool", 0, "train", 0, 0, lane, count=POOL_GROUPS)]
        np.testing.assert_array_equal(samples[:POOL_GROUPS, lane], expected)


def test_pools_make_groups_of_similar_shape():
    samples, _ = pass_of(make(4096 + 32, images_per_gpu=4, num_lanes=8))
    spread = np.ptp(ratios(4128)[samples[:-1]], axis=-1).mean()
    # Of 4 of 64 sorted uniform numbers in [0.5, 1.5): neighbors are 1/65 apart, three gaps.
    assert spread == pytest.approx(3 / 65, rel=0.1)


def test_samples_of_equal_shape_keep_the_order_that_was_drawn():
    order = Order(np.ones(36), seed=0, phase="train", images_per_gpu=1, num_lanes=1)
    samples = np.array([order.group(step, 0).samples[0] for step in range(1, 17)])
    drawn = permutation("order", 0, "train", 0, count=36)[:16]
    np.testing.assert_array_equal(
        samples, drawn[permutation("pool", 0, "train", 0, 0, 0, count=16)]
    )


def test_the_order_is_final():
    # Written down once: a checkpoint of any version continues with this order.
    order = make(23, images_per_gpu=2, num_lanes=2, seed=7, phase="pretrain")
    samples, weights = pass_of(order, pass_number=1)
    assert samples.reshape(6, 4).tolist() == [
        [19, 5, 11, 4],
        [16, 6, 20, 8],
        [2, 18, 15, 14],
        [1, 13, 0, 3],
        [7, 12, 10, 22],
        [21, 9, 17, 16],
    ]
    assert weights[-1].reshape(-1).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("other", [{"seed": 1}, {"phase": "finetune"}])
def test_seed_and_phase_change_the_order(other):
    one, _ = pass_of(make(100, 4, 2))
    two, _ = pass_of(make(100, 4, 2, **other))
    assert (one != two).any()


def test_passes_differ():
    order = make(100, 4, 2)
    assert (pass_of(order, 0)[0] != pass_of(order, 1)[0]).any()


def test_any_group_is_found_without_those_before_it():
    samples, _ = pass_of(make(100, 4, 2), pass_number=2)
    fresh = make(100, 4, 2)
    step = 2 * fresh.steps_per_pass + 6
    np.testing.assert_array_equal(fresh.group(step, 1).samples, samples[5, 1])


def test_one_step_per_pass_is_enough():
    samples, weights = pass_of(make(8, images_per_gpu=4, num_lanes=2))
    np.testing.assert_array_equal(np.sort(samples.reshape(-1)), np.arange(8))
    assert weights.all()


def test_a_large_set_is_ordered_lazily():
    aspect_ratios = ratios(118_287)
    start = time.perf_counter()
    order = Order(aspect_ratios, seed=0, phase="train", images_per_gpu=2, num_lanes=8)
    order.group(100_000, 3)  # in pass 13, none before it is drawn
    assert time.perf_counter() - start < 1.0  # 0.01 s; 14 passes would be 0.2 s, one by one 100 s


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_lanes_in_order(world_size):
    lanes = [lane for rank in range(world_size) for lane in lanes_of_rank(6, rank, world_size)]
    assert lanes == list(range(6))


def test_ranks_that_do_not_divide_the_lanes_are_refused():
    with pytest.raises(ValueError, match=r"6 lanes .* 4 ranks"):
        lanes_of_rank(6, 0, 4)


@pytest.mark.parametrize(("count", "world_size"), [(1, 1), (1, 3), (7, 2), (12, 2), (13, 4)])
def test_evaluation_sees_every_image_once_and_ranks_have_equally_many_batches(count, world_size):
    samples, weights = evaluation_groups(ratios(count), 3, world_size)
    assert samples.shape == weights.shape == (-(-count // (3 * world_size)), world_size, 3)
    np.testing.assert_array_equal(np.sort(samples[weights == 1]), np.arange(count))
    assert ((samples >= 0) & (samples < count)).all()


def test_evaluation_groups_are_the_same_on_any_number_of_ranks():
    one = evaluation_groups(ratios(25), 3, 1)[0].reshape(-1, 3)
    two = evaluation_groups(ratios(25), 3, 2)[0].reshape(-1, 3)
    np.testing.assert_array_equal(one, two[: len(one)])


def test_evaluation_groups_hold_images_of_similar_shape():
    samples, _ = evaluation_groups(np.array([2.0, 0.5, 1.9, 0.6]), 2, 1)
    assert [set(group) for group in samples[:, 0].tolist()] == [{1, 3}, {0, 2}]


def test_evaluation_of_no_images_has_no_batches():
    samples, weights = evaluation_groups(np.zeros(0), 3, 2)
    assert samples.shape == weights.shape == (0, 2, 3)
