"""The protocol of an engine: what the training loop may ask of whatever updates the weights.

An engine knows nothing of detection. It runs a module whose ``forward(batch)`` gives a dict of
scalar losses, and keeps its state by parameter name, so that any engine on any number of ranks
reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bigdet import distributed

BUCKET_ELEMENTS = 50_000_000
"""Numbers that ZeRO's stages 0 to 2 send in one call. DeepSpeed's own 500 million would be a buffer
of 2 GB, whatever the model; overlapped communication has two of them."""

EMA = "ema"
"""What checkpoints call the moving average of a parameter or buffer: ``NAME/ema``."""

MakeOptimizer = Callable[[nn.Module], Optimizer]
"""Called by an engine once the parameters are where and how it wants them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        lane_losses: every loss by name and their sum as ``total``: ``(M,)`` of this rank's M
            micro-batches, in their order, in fp32 on the device of the module.
        is_finite: the same on every rank. False: a loss or the gradient norm was not finite on
            some rank, and neither weights nor optimizer state were touched on any.
        grad_norm: L2 norm of the gradient of the mean loss of all lanes, before clipping; ``inf``
            for a skipped step.
        is_overflow: only with fp16, the same on every rank: the step was skipped although all
            losses were finite, because the loss scale was too high, and it is halved now. That is
            how the scale is found; nothing is wrong.
        loss_scale: what the losses of this step were multiplied by; 1 but for fp16.
    """

    lane_losses: dict[str, Tensor]
    is_finite: bool
    grad_norm: float
    is_overflow: bool = False
    loss_scale: float = 1.0

    @property
    def losses(self) -> dict[str, Tensor]:
        """The losses by name, scalars: means over this rank's micro-batches."""
        return {name: values.mean() for name, values in self.lane_losses.items()}


@dataclass(frozen=True)
class EngineState:
    """Weights and optimizer state by parameter name, on the CPU; empty on ranks but 0.

    Attributes:
        model: parameters and persistent buffers; what is floating point is fp32.
        optimizer: per trained parameter ``momentum_buffer`` (SGD) or ``exp_avg``, ``exp_avg_sq``
            and the scalar ``step`` (AdamW), fp32. Empty before the first step of a phase.
        loss_scale: of fp16: ``value`` and ``good_steps`` since it last changed. Empty otherwise.
        ema: the moving averages of trained parameters and floating-point buffers, fp32. Empty for
            an engine that keeps none.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """Updates the weights of one module during one phase.

    Attributes:
        module: the bare module, for evaluation and for its running statistics. Where parameters
            are sharded, a forward pass is a collective: every rank runs equally many.
    """

    module: nn.Module

    def train_step(self, micro_batches: Iterable[Any]) -> StepResult:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks.

        Micro-batches are drawn one after the other, each when the one before was computed.
        """
        ...

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps, times each group's own ``lr_factor``."""
        ...

    def update_ema(self, decay: float) -> None:
        """Move the average of the weights towards the newest ones, ``decay`` of the old stays.

        For an engine that keeps one, after each step that counted. No communication.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Let the module have the average of the weights inside a block, to evaluate. Collective.

        No other method may be called in it. Without an average nothing happens.
        """
        ...

    def state(self) -> EngineState:
        """Give weights and optimizer state, complete on rank 0. Collective."""
        ...

    def load_state(self, state: EngineState) -> None:
        """Go on from the state that rank 0 has; what other ranks pass is not read. Collective."""
        ...

    def close(self) -> None:
        """Let go of all memory but the module's own."""
        ...


def state_keys(optimizer: Optimizer) -> list[str]:
    """Names of the tensors that an optimizer keeps per parameter."""
    if isinstance(optimizer, AdamW):
        return ["exp_avg", "exp_avg_sq", "step"]
    assert isinstance(optimizer, SGD), type(optimizer)
    return ["momentum_buffer"] if any(group["momentum"] for group in optimizer.param_groups) else []


Shapes = dict[str, tuple[int, ...]]


def weight_shapes(module: nn.Module) -> Shapes:
    """Shapes of parameters and persistent buffers by name; read them before they are sharded."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def check_fits(
    state: EngineState,
    shapes: Shapes,
    trained: Collection[str],
    keys: Sequence[str],
    averaged: Collection[str] = (),
) -> None:
    """Check on rank 0 that a state is that of this model and optimizer. Collective.

    Args:
        state: complete on rank 0.
        shapes: of the module, from `weight_shapes`.
        trained: names of the parameters that the optimizer steps.
        keys: of the optimizer, from `state_keys`.
        averaged: names of what the engine keeps moving averages of.

    Raises:
        SharedError: on every rank, with the names that differ.
    """
    problems = misfits(state, shapes, trained, keys, averaged) if distributed.is_main() else ""
    problems = distributed.broadcast_object(problems)
    if problems:
        raise distributed.SharedError(
            f"The checkpoint does not fit the model and optimizer of this phase: {problems}. "
            f"Go on with the config it was made with, or start anew in another output folder."
        )


def misfits(
    state: EngineState,
    shapes: Shapes,
    trained: Collection[str],
    keys: Sequence[str],
    averaged: Collection[str] = (),
) -> str:
    """Say how a state differs from what a module and its optimizer need; empty if it fits."""
    found = {name: tuple(value.shape) for name, value in state.model.items()}
    problems = _differences("weights", found, shapes)
    if not problems:
        found = {name: tuple(value.shape) for name, value in state.ema.items()}
        problems = _differences("moving averages", found, {name: shapes[name] for name in averaged})
    if state.optimizer and not problems:
        problems = _differences(
            "optimizer state",
            {
                f"{name}/{key}": tuple(value.shape)
                for name, values in state.optimizer.items()
                for key, value in values.items()
            },
            {
                f"{name}/{key}": () if key == "step" else shapes[name]
                for name in trained
                for key in keys
            },
        )
    return problems


def to_save(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, as fp32 if it is floating point."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _differences(
    what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """Compare names and shapes; the first few of each kind of difference in one sentence."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])})"
        for kind, names in (("missing", missing), ("unexpected", surplus), ("reshaped", reshaped))
        if names
    ]
    return f"{what}: {', '.join(parts)}" if parts else ""
