"""Random words: fixed for ever by their key, and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bigdet.ops.random import Words, permutation, seed_of, words


def test_words_are_raw_philox_keyed_by_a_hash():
    digest = hashlib.blake2b(b'["order", 3, "train", 0]', digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    expected = np.random.Philox(key=key).random_raw(5)
    np.testing.assert_array_equal(words("order", 3, "train", 0, count=5), expected)


def test_words_never_change():
    # Written down once: checkpoints of other versions rely on them.
    assert words("order", 0, "train", 0, count=2).tolist() == [
        18072390791351838638,
        5542185746693905940,
    ]
    assert permutation("order", 0, "train", 0, count=8).tolist() == [1, 3, 2, 7, 4, 6, 5, 0]


def test_a_longer_row_begins_with_the_shorter_one():
    np.testing.assert_array_equal(words("a", count=10)[:4], words("a", count=4))


@pytest.mark.parametrize("other", [("a", 1, 2), ("a", 12), ("a", "1"), ("b", 1), (1, "a")])
def test_other_keys_give_other_words(other):
    assert words("a", 1, count=1)[0] != words(*other, count=1)[0]


def test_numpy_integers_are_as_good_as_python_integers():
    assert words("a", np.int64(7), count=1)[0] == words("a", 7, count=1)[0]


def test_permutation_holds_every_number_once():
    found = permutation("a", count=1000)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(np.sort(found), np.arange(1000))
    assert (found != np.arange(1000)).any()


def test_permutation_of_nothing_is_empty():
    assert permutation("a", count=0).shape == (0,)


def test_permutation_is_fair():
    # 4 numbers, 2000 keys: each comes first 500 times, with noise of sqrt(2000 * 3/16) = 19.
    first = [int(permutation("fair", key, count=4)[0]) for key in range(2000)]
    assert all(abs(first.count(number) - 500) < 5 * 19 for number in range(4))


def test_draws_go_through_the_words_of_the_key_in_order():
    raw = [int(word) for word in words("sample", 5, count=3)]
    draws = Words("sample", 5)
    assert draws.uniform(0.0, 1.0) == (raw[0] >> 11) / 2**53
    assert draws.integer(10) == raw[1] % 10
    assert draws.uniform(2.0, 4.0) == 2.0 + 2.0 * ((raw[2] >> 11) / 2**53)


def test_uniform_stays_in_its_range_and_fills_it():
    draws = Words("uniform")
    values = np.array([draws.uniform(0.8, 1.2) for _ in range(2000)])
    assert values.min() >= 0.8
    assert values.max() < 1.2
    # The mean of 2000 has a deviation of 0.4 / sqrt(12) / sqrt(2000) = 0.0026.
    assert abs(values.mean() - 1.0) < 5 * 0.0026


def test_seeds_fit_what_torch_takes():
    seeds = [seed_of("model", 0, "train", step, 0) for step in range(100)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 100
