"""The protocol of an engine: what the training loop calls to update the weights.

An engine knows nothing of detection. It runs a module whose ``forward(batch)`` gives a dict of
scalar losses, and keeps its state by parameter name, so that any engine on any number of ranks
reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bigdet import distributed
from bigdet.engine.parts import Share, Source
from bigdet.pieces.index import MODEL, NEWEST, Catalog

BUCKET_ELEMENTS = 10_000_000
"""Numbers that ZeRO sends in one call, 40 MB, not much more than torch's DistributedDataParallel:
the first call starts early in the backward pass, and the last one is short. DeepSpeed's own 500
million would be a buffer of 2 GB, whatever the model; overlapped communication has two."""

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
class Launched:
    """A step that a device may still be computing.

    Attributes:
        counts: bool, a scalar on the device of the module: the step changed the weights. The same
            on every rank.
        read: waits until the device has finished the step, but not what was launched after it, and
            gives the result; the same object each time.
    """

    counts: Tensor
    read: Callable[[], StepResult]


class Engine(Protocol):
    """Updates the weights of one module during one phase.

    Attributes:
        module: the bare module, for evaluation and for its running statistics. Where parameters
            are sharded, a forward pass is a collective: every rank runs equally many.
    """

    module: nn.Module

    def train_step(self, micro_batches: Iterable[Any]) -> StepResult:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks.

        Each micro-batch is taken from the iterable when the one before it has been computed.
        """
        ...

    def launch_step(self, micro_batches: Iterable[Any]) -> Launched:
        """Do the same without waiting for the device, where the engine can.

        The next step may be launched before the result is read.
        """
        ...

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps, times each group's own ``lr_factor``."""
        ...

    def update_ema(self, decay: float) -> None:
        """Move the average of the weights towards the newest ones; ``decay`` of the old stays.

        Called after each step; one that was skipped moves nothing. No communication.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Give the module the average of the weights inside a block, to evaluate it. Collective.

        No other method may be called in the block. Without an average nothing happens.
        """
        ...

    def share(self, position: int, size: int) -> Share:
        """Copy to the CPU what this rank saves of weights and optimizer state. Collective.

        Args:
            position: of this rank among those that divide between them what all of them hold.
            size: how many these are.
        """
        ...

    def begin(self, source: Source) -> None:
        """Take the weights to start from; averages begin with them. Collective."""
        ...

    def load_state(self, source: Source) -> None:
        """Go on from what was saved, by any engine on any number of ranks. Collective."""
        ...

    def close(self) -> None:
        """Free all memory but the module's own."""
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


def has_optimizer_state(catalog: Catalog) -> bool:
    """Return whether what was saved has optimizer state; before the first step it has none."""
    return bool(catalog.keys() - {MODEL, NEWEST})


def check_fits(
    catalog: Catalog,
    shapes: Shapes,
    trained: Collection[str],
    keys: Sequence[str],
    averaged: Collection[str] = (),
) -> None:
    """Check that what was saved is of this model and optimizer.

    Args:
        catalog: of what was saved, the same on all ranks.
        shapes: of the module, from `weight_shapes`.
        trained: names of the parameters that the optimizer steps.
        keys: of the optimizer, from `state_keys`.
        averaged: names of what the engine keeps moving averages of.

    Raises:
        SharedError: on every rank, with the names that differ.
    """
    if problems := misfits(catalog, shapes, trained, keys, averaged):
        raise distributed.SharedError(
            f"The checkpoint does not fit the model and optimizer of this phase: {problems}. "
            f"Go on with the config it was made with, or start anew in another output folder."
        )


def misfits(
    catalog: Catalog,
    shapes: Shapes,
    trained: Collection[str],
    keys: Sequence[str],
    averaged: Collection[str] = (),
) -> str:
    """Say how a state differs from what a module and its optimizer need; empty if it fits."""
    found = {name: spec.shape for name, spec in catalog.get(MODEL, {}).items()}
    problems = _differences("weights", found, shapes)
    if not problems:
        found = {name: spec.shape for name, spec in catalog.get(NEWEST, {}).items()}
        expected = {name: shapes[name] for name in averaged}
        problems = _differences("weights besides their average", found, expected)
    if has_optimizer_state(catalog) and not problems:
        problems = _differences(
            "optimizer state",
            {
                f"{name}/{kind}": spec.shape
                for kind, specs in catalog.items()
                if kind not in (MODEL, NEWEST)
                for name, spec in specs.items()
            },
            {
                f"{name}/{key}": () if key == "step" else shapes[name]
                for name in trained
                for key in keys
            },
        )
    return problems


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
