"""Gradients of stage 0 are averaged during the last backward pass of a step, bucket by bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigdet import distributed
from bigdet.engine import averaging
from tests.spawn import run_ranks


class Net(nn.Module):
    """Layers in the order of the forward pass; rank 0 does not use the last one."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)  # 108 numbers
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.first, self.second = nn.Linear(4, 10, bias=False), nn.Linear(10, 6, bias=False)
        self.last = nn.Linear(6, 5, bias=False)
        self.always = always

    def loss(self, rank: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * rank + number)
        images = torch.randn(2, 3, 8, 8, generator=generator)
        x = self.second(self.first(self.conv(images).mean(dim=(2, 3))).tanh())
        return (self.last(x) if self.always or rank else x).square().sum()


Seen = dict[str, Any]


def take_steps(always: bool) -> list[Seen]:
    """Take two steps of two micro-batches; return gradients, and what was sent when."""
    averaging.SENT_ELEMENTS = 50
    net, rank = Net(always=always), distributed.rank()
    named = dict(net.named_parameters())
    average = averaging.GradientAverage(named)
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def note(numbers: Tensor, **options: Any) -> Any:
        sent.append(numbers.numel())
        return all_reduce(numbers, **options)

    dist.all_reduce = note
    steps = []
    for _ in range(2):
        net.loss(rank, 0).backward()
        assert not sent
        average.expect()
        net.loss(rank, 1).backward()
        in_pass = len(sent)
        average.finish()
        gradients = {name: parameter.grad for name, parameter in named.items()}
        steps.append({"sent": sent.copy(), "in pass": in_pass, "gradients": gradients})
        net.zero_grad(set_to_none=True)
        sent.clear()
    dist.all_reduce = all_reduce
    return steps


def local_gradients(rank: int, *, always: bool) -> dict[str, Tensor]:
    net = Net(always=always)
    for number in (0, 1):
        net.loss(rank, number).backward()
    named = net.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


@pytest.mark.parametrize("always", [True, False])
def test_every_rank_gets_the_mean(tmp_path: Path, always: bool) -> None:
    found = run_ranks(take_steps, 2, tmp_path, always)
    own = [local_gradients(rank, always=always) for rank in (0, 1)]
    for rank, steps in enumerate(found):
        for step in steps:
            for name, gradient in step["gradients"].items():
                assert torch.equal(gradient, (own[0][name] + own[1][name]) / 2), name
            weight = step["gradients"]["conv.weight"]
            assert weight.is_contiguous(memory_format=torch.channels_last)
            # From the last layer on: 30 and 60 numbers, 40 and 108. What is missing on rank 0
            # comes first, so that there all wait for the end.
            assert step["sent"] == [90, 148]
            assert step["in pass"] == (2 if always or rank else 0)


def meet_in_the_pass() -> list[Tensor]:
    """Rank 0 lacks a gradient that rank 1 sends before a collective of the backward pass."""
    averaging.SENT_ELEMENTS = 1
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False)
    rank = distributed.rank()
    named = {"first": first.weight, "last": last.weight}
    average = averaging.GradientAverage(named, dist.new_group())
    average.expect()
    x = distributed.sum_with_gradient(first(torch.full((1, 3), 1.0 + rank)))
    (last(x) if rank else x).sum().backward()
    average.finish()
    return [first.weight.grad, last.weight.grad]


def test_what_one_rank_lacks_does_not_cross_collectives_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False)
    x = first(torch.full((1, 3), 1.0)) + first(torch.full((1, 3), 2.0))
    ((x.sum() + last(x).sum()) / 2).backward()
    for found in run_ranks(meet_in_the_pass, 2, tmp_path):
        torch.testing.assert_close(found, [first.weight.grad, last.weight.grad])


def close_early() -> tuple[float, float]:
    """Return a gradient after a closed average, and that of this rank alone."""
    layer = nn.Linear(1, 1, bias=False)
    average = averaging.GradientAverage({"weight": layer.weight})
    average.expect()
    average.close()
    layer(torch.full((1, 1), 1.0 + distributed.rank())).sum().backward()
    return layer.weight.grad.item(), 1.0 + distributed.rank()


def test_closed_it_leaves_gradients_alone(tmp_path: Path) -> None:
    for gradient, own in run_ranks(close_early, 2, tmp_path):
        assert gradient == own


def come_twice() -> str:
    net = nn.Linear(2, 2)
    average = averaging.GradientAverage(dict(net.named_parameters()))
    average.expect()
    x = torch.ones(1, 2, requires_grad=True)
    for _ in range(2):
        x = checkpoint(net, x, use_reentrant=True)
    try:
        x.sum().backward()
    except ValueError as error:
        return str(error)
    return ""


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(come_twice, 2, tmp_path):
        assert "came twice in one backward pass" in message
        assert "use_reentrant=False" in message
