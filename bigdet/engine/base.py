"""The protocol of an engine: what the training loop may ask of whatever updates the weights.

An engine knows nothing of detection. It runs a module whose ``forward(batch)`` gives a dict of
scalar losses, and keeps its state by parameter name, so that any engine on any number of ranks
reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

MakeOptimizer = Callable[[nn.Module], Optimizer]
"""Called by an engine once the parameters are where and how it wants them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        losses: every loss by name and their sum as ``total``: mean over this rank's micro-batches,
            scalars on the device of the module.
        is_finite: the same on every rank. False: a loss or the gradient norm was not finite on
            some rank, and neither weights nor optimizer state were touched on any.
        grad_norm: L2 norm of the gradient of the mean loss of all lanes, before clipping; ``inf``
            for a skipped step.
    """

    losses: dict[str, Tensor]
    is_finite: bool
    grad_norm: float


@dataclass(frozen=True)
class EngineState:
    """Weights and optimizer state by parameter name, on the CPU; empty on ranks but 0.

    Attributes:
        model: parameters and persistent buffers; what is floating point is fp32.
        optimizer: per trained parameter ``momentum_buffer`` (SGD) or ``exp_avg``, ``exp_avg_sq``
            and the scalar ``step`` (AdamW), fp32. Empty before the first step of a phase.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Engine(Protocol):
    """Updates the weights of one module during one phase.

    Attributes:
        module: the bare module, for evaluation and for its running statistics.
    """

    module: nn.Module

    def train_step(self, micro_batches: Iterable[Any]) -> StepResult:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks.

        Micro-batches are drawn one after the other, each when the one before was computed.
        """
        ...

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
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


def misfits(state: EngineState, module: nn.Module, keys: Sequence[str]) -> str:
    """Say how a state differs from what a module and its optimizer need; empty if it fits."""
    problems = _differences(
        "weights",
        {name: tuple(value.shape) for name, value in state.model.items()},
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
    )
    if state.optimizer and not problems:
        problems = _differences(
            "optimizer state",
            {
                f"{name}/{key}": tuple(value.shape)
                for name, values in state.optimizer.items()
                for key, value in values.items()
            },
            {
                f"{name}/{key}": () if key == "step" else tuple(parameter.shape)
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
                for key in keys
            },
        )
    return problems


def _differences(
    what: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
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
