"""The order of numpy.lexsort, in linear time."""

import numpy as np
import pytest

from bigdet.evaluation.sorting import lexsort


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_numpy(seed):
    random = np.random.default_rng(seed)
    count = 2000
    floats = random.choice([random.normal(), -0.0, 0.0, 1e-310, -1e300, 1e300, 0.1, -0.1], count)
    scores = random.random(count).round(2)
    integers = random.choice([-(1 << 40), -1, 0, 1, 65535, 65536, 1 << 40], count)
    for keys in ((floats,), (integers,), (scores, integers), (floats, scores, integers // 3)):
        np.testing.assert_array_equal(lexsort(*keys), np.lexsort(keys))


def test_extremes_and_nothing_can_be_sorted():
    ends = np.array([np.iinfo(np.int64).max, 0, np.iinfo(np.int64).min])
    assert lexsort(ends).tolist() == [2, 1, 0]
    assert lexsort(np.zeros(0), np.zeros(0, np.int64)).tolist() == []
