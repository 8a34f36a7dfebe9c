import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigdet import distributed
from bigdet.models.norms import (
    BatchNorm2d,
    batch_norms,
    count_lane,
    set_norm_mode,
    update_running_statistics,
    valid_rows,
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
        model(lane)
        count_lane(model)
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


SPLITS = {"even": [3, 3], "uneven": [5, 1], "none": [6, 0]}
"""Images of the joint batch on each of two ranks."""


def joint_model():
    torch.manual_seed(0)
    layers = [BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), BatchNorm2d(5)]
    model = nn.Sequential(*layers)
    for norm in batch_norms(model):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    set_norm_mode(model, "sync")
    return model


def sync_step(split, case):
    """Two lanes of one step; outputs, gradients of weights and statistics, as plain lists.

    Args:
        split: images of each rank; one entry is one process with the whole batch.
        case: ``plain``, ``checkpointed``, or ``rows``: in each lane every third image fills a slot.
    """
    rank = distributed.rank() if len(split) > 1 else 0
    start = sum(split[:rank])
    model = joint_model()
    data = torch.randn(2, 6, 3, 4, 5) * 3 + 1
    data[:, ::2] += 2  # so that the ranks' own statistics are far from the joint ones
    target = torch.randn(6, 5, 4, 5)
    outputs, inputs = [], []
    for lane in data:
        x = lane[start : start + split[rank]].clone().requires_grad_()
        rows = (torch.arange(6) % 3 > 0)[start : start + split[rank]]
        with valid_rows(model, rows if case == "rows" else None):
            y = checkpoint(model, x, use_reentrant=False) if case == "checkpointed" else model(x)
        count_lane(model)
        losses = (y - target[start : start + split[rank]]).square().mean(dim=(1, 2, 3))
        (losses * rows if case == "rows" else losses).sum().backward()
        outputs.append(y.detach())
        inputs.append(x.grad)
    update_running_statistics(model)
    gradients = [distributed.sum_over_ranks(p.grad) for p in model.parameters()]
    if len(split) == 1:
        gradients = [p.grad for p in model.parameters()]
    buffers = [b for norm in batch_norms(model) for b in (norm.running_mean, norm.running_var)]
    return {
        "by_image": [tensor.numpy() for tensor in [*outputs, *inputs]],
        "joint": [tensor.numpy() for tensor in [*gradients, *buffers]],
    }


def sync_steps():
    return {(name, case): sync_step(SPLITS[name], case) for name, case in CASES}


CASES = [
    *((name, "plain") for name in SPLITS),
    ("uneven", "checkpointed"),
    *((name, "rows") for name in SPLITS),
]


def test_sync_gives_statistics_and_gradients_of_one_process_with_the_whole_batch(tmp_path):
    ranks = run_ranks(sync_steps, 2, tmp_path)
    for name, case in CASES:
        # One process: by torch's own layers where all rows count.
        alone = sync_step([6], "rows" if case == "rows" else "plain")
        first, second = (rank[name, case] for rank in ranks)
        for mine, other, expected in zip(
            first["joint"], second["joint"], alone["joint"], strict=True
        ):
            np.testing.assert_array_equal(mine, other)
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
        for mine, other, expected in zip(
            first["by_image"], second["by_image"], alone["by_image"], strict=True
        ):
            both = np.concatenate([mine, other])
            np.testing.assert_allclose(both, expected, rtol=1e-5, atol=1e-5)
