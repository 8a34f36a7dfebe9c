"""How often samples come in a pass: whole numbers exactly, fractions in the mean."""

from __future__ import annotations

import numpy as np
import pytest

from bigdet.data.ordering.groups import Order
from bigdet.data.ordering.repeats import Repeats, repeat_factors
from bigdet.data.ordering.windows import Windows


def counts_of(repeats: Repeats, number: int) -> np.ndarray:
    return np.diff(repeats.draw(0, "train", number), prepend=0)


def test_whole_numbers_are_exact():
    repeats = Repeats(np.array([1.0, 2.0, 0.0, 1.0]))
    assert repeats.num_entries == 4
    for number in range(3):
        assert counts_of(repeats, number).tolist() == [1, 2, 0, 1]


def test_every_pass_has_equally_many_entries_and_fractions_come_in_the_mean():
    means = np.array([1.0, 1.25, 0.5, 2.5, 1.0, 0.75, 1.9, 1.1])  # 10 in all
    repeats = Repeats(means)
    assert repeats.num_entries == 10
    counts = np.array([counts_of(repeats, number) for number in range(4000)])
    assert (counts.sum(axis=1) == 10).all()
    assert (counts >= np.floor(means)).all()
    assert (counts <= np.ceil(means)).all()
    # Deviation of a mean of 4000 draws of 0 or 1: at most 0.008.
    np.testing.assert_allclose(counts.mean(axis=0), means, atol=0.03)


def test_neighbors_do_not_exclude_each_other():
    repeats = Repeats(np.full(100, 0.5))
    counts = np.array([counts_of(repeats, number) for number in range(400)])
    both = (counts[:, 0] * counts[:, 1]).mean()
    assert both == pytest.approx(0.25, abs=0.08)  # equal distances alone would make it 0


def test_what_rounds_to_nothing_is_left_out():
    assert Repeats(np.full(3, 0.3)).num_entries == 0
    assert Repeats(np.ones(0)).num_entries == 0


def test_repeat_factors_are_those_of_lvis():
    # 16 images: class 0 on all, class 1 on 1 of 16, class 2 on 4 of 16; image 15 has none... of
    # the rare ones. Threshold 1/4: sqrt((1/4) / (1/16)) = 2 for class 1, 1 for class 2.
    per_image = [[0]] * 11 + [[0, 2]] * 3 + [[0, 1, 2]] + [[0]]
    offsets = np.cumsum([0, *map(len, per_image)])
    classes = np.array([label for labels in per_image for label in labels])
    factors = repeat_factors(classes, offsets, 4, 0.25)
    np.testing.assert_array_equal(factors, [1] * 14 + [2, 1])


def test_images_without_objects_come_once():
    factors = repeat_factors(np.array([1]), np.array([0, 0, 1, 1]), 2, 1.0)
    np.testing.assert_allclose(factors, [1, 3**0.5, 1])
    assert len(repeat_factors(np.array([], np.int64), np.array([0]), 2, 1.0)) == 0


@pytest.mark.parametrize("with_windows", [False, True])
def test_an_order_shows_each_sample_as_often_as_it_repeats_and_numbers_the_copies(with_windows):
    means = np.tile([1.0, 2.0, 1.5, 0.0, 3.0], 20)  # 150 entries
    windows = Windows(np.arange(100, dtype=np.uint32) // 30, 256) if with_windows else None
    order = Order(
        np.linspace(0.5, 2, 100),
        seed=0,
        phase="train",
        images_per_gpu=4,
        num_lanes=3,
        repeats=Repeats(means),
        windows=windows,
    )
    assert order.num_entries == 150
    assert order.steps_per_pass == 13
    for first in (1, 14):
        groups = [order.group(step, lane) for step in range(first, first + 13) for lane in range(3)]
        samples = np.concatenate([group.samples[group.weights == 1] for group in groups])
        copies = np.concatenate([group.copies[group.weights == 1] for group in groups])
        counts = np.bincount(samples, minlength=100)
        assert (counts[means != 1.5] == means[means != 1.5]).all()
        assert set(counts[means == 1.5]) == {1, 2}
        pairs = set(zip(samples.tolist(), copies.tolist(), strict=True))
        assert pairs == {(i, copy) for i, count in enumerate(counts) for copy in range(count)}
