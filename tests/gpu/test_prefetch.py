"""The batches of a step reach the GPU whole and in order."""

from __future__ import annotations

import pytest
import torch

from bigdet.training.prefetch import prefetch
from tests.unit.training.test_prefetch import batch

pytestmark = pytest.mark.gpu


def test_on_a_gpu_batches_arrive_whole_and_in_order():
    for count in (1, 5):
        batches = [batch(number) for number in range(count)]
        for number, moved in enumerate(prefetch(batches, torch.device("cuda"))):
            assert moved.seed == number
            assert moved.images.is_cuda
            assert (moved.images == number).all()
            assert (moved.targets.boxes == number).all()
        assert number == count - 1
