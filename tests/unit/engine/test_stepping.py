"""Steps that a flag decides on, against torch's own optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bigdet.engine.precision import LossScale
from bigdet.engine.stepping import Later, launched, step_where

MAKERS = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "sgd without momentum": lambda groups: SGD(groups, lr=0.1, foreach=True),
    "adamw": lambda groups: AdamW(groups, lr=0.1, betas=(0.8, 0.95), foreach=True),
}
KEYS = {"sgd": ["momentum_buffer"], "sgd without momentum": [],
        "adamw": ["exp_avg", "exp_avg_sq", "step"]}  # fmt: skip


def make(name: str) -> tuple[list[nn.Parameter], Optimizer]:
    """Two groups of one rate and decay each; the last parameter gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (5,), (2, 2)]
    parameters = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.05, "lr": 0.3},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    return parameters, MAKERS[name](groups)


def add_state(name: str, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter.detach())
                for key in KEYS[name]
            }


def give_gradients(parameters: list[nn.Parameter], step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:-1]:
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)


def copy_of(parameters: list[nn.Parameter], optimizer: Optimizer) -> list[Tensor]:
    state = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [value.detach().clone() for value in [*parameters, *state]]


@pytest.mark.parametrize("name", MAKERS)
def test_good_steps_are_torchs_and_bad_ones_change_no_bit(name: str) -> None:
    parameters, optimizer = make(name)
    expected, reference = make(name)
    add_state(name, optimizer)
    for step, counts in enumerate([False, True, True, False, True]):  # the very first one is bad
        before = copy_of(parameters, optimizer)
        give_gradients(parameters, step, 1.0 if counts else math.nan)
        step_where(torch.tensor(counts), optimizer)
        if counts:
            give_gradients(expected, step)
            reference.step()
        else:
            after = copy_of(parameters, optimizer)
            assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        for key, value in reference.state[theirs].items():
            torch.testing.assert_close(optimizer.state[ours][key], value, rtol=1e-6, atol=1e-7)
    if name == "adamw":
        assert optimizer.state[parameters[0]]["step"] == 3


def test_a_number_of_the_device_is_the_one_at_the_time_of_the_copy() -> None:
    later = Later(torch.tensor(2.5, dtype=torch.float64) * 2)
    assert later.read() == later.read() == 5.0


def test_a_result_is_read_once_and_the_scale_of_fp16_at_once() -> None:
    losses = {"total": torch.tensor([1.0, 2.0])}
    step = launched(torch.tensor(3.0), losses, LossScale("fp32"))
    assert step.counts
    assert step.read() is step.read()
    assert (step.read().is_finite, step.read().grad_norm) == (True, 3.0)
    scale = LossScale("fp16")
    step = launched(torch.tensor(math.nan), losses, scale)
    assert scale.value == 2.0**15  # halved before anybody reads the result
    assert not step.counts
    result = step.read()
    assert (result.is_finite, result.is_overflow, result.loss_scale) == (False, True, 2.0**16)
    assert result.grad_norm == math.inf
    assert scale.value == 2.0**15
