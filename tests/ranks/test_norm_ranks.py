import pytest
import torch
from torch import nn

from bigdet import distributed
from bigdet.models.norms import (
    BatchNorm2d,
    batch_norms,
    collect_statistics,
    update_running_statistics,
)
from tests.spawn import run_ranks

LANES = 4


def run_step(world_size):
    """Run this rank's lanes of one step and return the running statistics of both layers."""
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm2d(3), nn.Conv2d(3, 5, 1), BatchNorm2d(5)).double()
    lanes = torch.randn(LANES, 2, 3, 4, 4, dtype=torch.float64)
    own = lanes.chunk(world_size)[distributed.rank() if world_size > 1 else 0]
    for lane in own:
        with collect_statistics():
            model(lane)
    update_running_statistics(model)
    return [
        buffer.tolist()
        for norm in batch_norms(model)
        for buffer in (norm.running_mean, norm.running_var)
    ]


def test_running_statistics_are_equal_on_all_ranks_and_those_of_one_process(tmp_path):
    alone = run_step(1)
    first, second = run_ranks(run_step, 2, tmp_path, 2)
    assert first == second
    for mine, expected in zip(first, alone, strict=True):
        assert mine == pytest.approx(expected, rel=1e-12)
