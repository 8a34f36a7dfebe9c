"""Steps whose verdict the host reads later: the device decides whether the optimizer steps.

Where the host had to know first whether a gradient is finite, the device would have nothing to do
until the host has read the norm and sent the next work.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bigdet.engine.base import Launched, StepResult
from bigdet.engine.precision import LossScale
from bigdet.ops.later import Later


def launched(norm: Tensor, losses: dict[str, Tensor], loss_scale: LossScale) -> Launched:
    """Give a step whose result is read later; under fp16 now, as the next scale depends on it.

    Args:
        norm: of the gradient, a scalar on the device, the same on all ranks; not finite for a
            step that was skipped.
        losses: of each lane of this rank, by name.
        loss_scale: that the step was computed with.
    """
    later, scale = Later(norm), loss_scale.value

    @functools.cache
    def read() -> StepResult:
        value = later.read()
        is_finite = math.isfinite(value)
        is_overflow = loss_scale.update(is_finite, losses)
        return StepResult(losses, is_finite, value if is_finite else math.inf, is_overflow, scale)

    if loss_scale.is_used:
        read()
    return Launched(norm.isfinite(), read)


@torch.no_grad()
def step_where(counts: Tensor, optimizer: Optimizer) -> None:
    """Step SGD or AdamW if a flag on the device is true; else change nothing. Never waits.

    torch's fused kernels read the flag. They are given this rank's parts of sharded tensors, as
    the one of SGD does not take DTensors.

    Args:
        counts: bool, a scalar on the device of the parameters.
        optimizer: has its state already.
    """
    is_bad = (~counts).float()
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        weights = [local(parameter) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        state = [optimizer.state[parameter] for parameter in parameters]
        shared = {
            "foreach": False,
            "fused": True,
            "found_inf": is_bad,
            **{name: group[name] for name in ("lr", "weight_decay", "maximize")},
        }
        if isinstance(optimizer, AdamW):
            averages, squares = (
                [local(of[key]) for of in state] for key in ("exp_avg", "exp_avg_sq")
            )
            for weight, of in zip(weights, state, strict=True):
                of["step"] = of["step"].to(weight.device)  # other kernels want it on the CPU
            steps, (beta1, beta2) = [of["step"] for of in state], group["betas"]
            adamw(
                weights, gradients, averages, squares, [], steps,
                amsgrad=False, beta1=beta1, beta2=beta2, eps=group["eps"], **shared,
            )  # fmt: skip
        else:
            buffers = [local(of["momentum_buffer"]) if of else None for of in state]
            names = ("momentum", "dampening", "nesterov")
            sgd(weights, gradients, buffers, **{name: group[name] for name in names}, **shared)


def local(value: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
