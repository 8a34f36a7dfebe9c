"""A small module, its data, plain PyTorch in one process as the oracle, and engines around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.phase import PhaseConfig
from bigdet.engine import writing
from bigdet.engine.precision import autocast
from bigdet.models import norms
from bigdet.pieces.building import parameters_on_meta
from bigdet.pieces.reading import Stored, open_stored
from bigdet.pieces.tensor_file import NAMES, Spec
from bigdet.training.optim import build_optimizer

if TYPE_CHECKING:
    from bigdet.engine.base import Engine

LANES = 4
STEPS = 5
ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "fsdp": {"kind": "fsdp", "zero_stage": None},
}
REPLICATED = ("zero0", "zero1", "zero2")
"""Engines that have all weights on every rank."""
OFFLOADS = {
    "zero1": ("optimizer",),
    "zero2": ("optimizer",),
    "zero3": ("optimizer", "all"),
    "fsdp": ("all",),
}
# Means over 2 to 4 lanes are summed in another order than in one process: each sum of n fp32
# numbers is off by up to n x 6e-8 of its terms, times cancellation; 5 steps add up.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
OPTIMIZERS = {
    "sgd": PhaseConfig(steps=100, images_per_gpu=2, lr=0.1, optimizer="sgd", weight_decay=0.05),
    "adamw": PhaseConfig(
        steps=100, images_per_gpu=2, lr=0.01, optimizer="adamw", weight_decay=0.05
    ),
}


class Toy(nn.Module):
    """Convolution, normalization, two linear layers, one of them frozen, a buffer; two losses.

    Args:
        norm: ``gn``, or a mode of batch normalization.
    """

    def __init__(self, norm: str = "gn") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.GroupNorm(1, 5) if norm == "gn" else norms.BatchNorm2d(5)
        self.frozen = nn.Linear(5, 5)
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]))
        if norm != "gn":
            self.norm.running_mean.copy_(torch.linspace(-0.3, 0.3, 5))
            self.norm.running_var.copy_(torch.linspace(0.5, 1.5, 5))
            norms.set_norm_mode(self, norm)
        self.frozen.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    @property
    def units(self) -> list[list[nn.Module]]:
        """What FSDP2 shards together; ``linear`` is left to the whole module."""
        return [[self.convolution, self.norm], [self.frozen]]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        shifted = batch["images"] - self.mean.view(1, 3, 1, 1)
        features = self.norm(self.convolution(shifted)).relu().mean((2, 3))
        if self.training:
            norms.count_lane(self)
        outputs = self.linear(self.frozen(features)).float()
        square = (outputs - batch["targets"]).square().mean()
        size = 0.1 * outputs.abs().mean()
        trouble = batch.get("trouble")
        if trouble == "nan loss":
            square = square * torch.nan
        elif trouble == "infinite loss without a gradient":
            size = size + torch.tensor(torch.inf)
        elif trouble == "nan gradient of a finite loss":
            size = size + (outputs * 0).square().sum().sqrt()  # d sqrt(0) is inf, times 0
        return {"square": square, "size": size}


def make_batch(step: int, lanes: Iterable[int]) -> dict[str, Any]:
    """The images of some lanes of a step."""
    images, targets = [], []
    for lane in lanes:
        generator = torch.Generator().manual_seed(1000 * step + lane)
        images.append(torch.randn(2, 3, 8, 8, generator=generator))
        targets.append(torch.randn(2, 3, generator=generator))
    stacked = torch.cat(images).contiguous(memory_format=torch.channels_last)
    return {"images": stacked, "targets": torch.cat(targets)}


def lanes_of_rank(step: int, **changed: str) -> list[dict[str, Any]]:
    """This rank's lanes; ``changed`` goes into the very last lane, which is the last rank's."""
    share, device = LANES // distributed.world_size(), distributed.device()
    lanes = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    return [
        {name: tensor.to(device) for name, tensor in make_batch(step, [lane]).items()}
        | (changed if lane == LANES - 1 else {})
        for lane in lanes
    ]


def lr_at(step: int, base: float) -> float:
    return base * (1 + step % 3) / 3


def ema_decay_at(step: int) -> float:
    return (1 + step) / (4 + step)


def train_plainly(
    optimizer: str,
    clip_norm: float | None = None,
    norm: str = "gn",
    precision: str = "fp32",
    num_ranks: int = 1,
    after_step: Callable[[nn.Module, int], None] = lambda module, step: None,
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train with plain PyTorch in this process: losses, gradient norms and final weights.

    Synchronized normalization is live normalization of the lanes that run at the same time, which
    are as many as there are ranks; in all other modes lanes do not meet.
    """
    is_sync = norm == "sync"
    module = Toy("live" if is_sync else norm)
    share = LANES // num_ranks
    groups = [[k + share * rank for rank in range(num_ranks)] for k in range(share)]
    if not is_sync:
        groups = [[lane] for lane in range(LANES)]
    phase = OPTIMIZERS[optimizer]
    torch_optimizer = build_optimizer(module, phase)
    losses, grad_norms = [], []
    for step in range(1, STEPS + 1):
        for group in torch_optimizer.param_groups:
            group["lr"] = lr_at(step, phase.lr)
        with autocast(torch.device("cpu"), precision):
            totals = [sum(module(make_batch(step, lanes)).values()) for lanes in groups]
        total = torch.stack(totals).mean()
        total.backward()
        limit = float("inf") if clip_norm is None else clip_norm
        grad_norms.append(nn.utils.clip_grad_norm_(module.parameters(), limit).item())
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        norms.update_running_statistics(module)
        losses.append(total.item())
        after_step(module, step)
    return losses, grad_norms, copy_of(module.state_dict())


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def make_engine(
    name: str,
    optimizer: str,
    clip_norm: float | None = None,
    precision: str = "fp32",
    norm: str = "gn",
    offload: str = "none",
    with_ema: bool = False,
    on_meta: bool = False,
    has_unused: bool = False,
    **options: Any,
) -> Engine:
    """An engine of `ENGINES` around a new module, the same on all ranks.

    With ``on_meta`` its parameters have no memory at first, and their values come afterwards. With
    ``has_unused`` there is one more weight, ``(3, 2)`` of 2.0, that no loss depends on. ``options``
    are more of ``EngineConfig``.
    """
    from bigdet.engine import deepspeed_engine  # takes seconds: in the ranks only
    from bigdet.engine.build import build_engine

    deepspeed_engine.WHOLE_ELEMENTS = 10  # else stage 3 would leave all of the module whole
    config = EngineConfig(
        **ENGINES[name], precision=precision, clip_norm=clip_norm, offload=offload, **options
    )
    make_optimizer = partial(build_optimizer, phase=OPTIMIZERS[optimizer])
    num_micro_batches = LANES // distributed.world_size()
    with parameters_on_meta() if on_meta else contextlib.nullcontext():
        module = Toy(norm)
    assert on_meta == all(parameter.is_meta for parameter in module.parameters())
    if has_unused:
        module.unused = nn.Linear(2, 3, bias=False)
        nn.init.constant_(module.unused.weight, 2.0)
    device = distributed.device()
    engine = build_engine(
        module, make_optimizer, config, num_micro_batches, device, module.units, with_ema=with_ema
    )
    if on_meta:
        engine.begin(weights_of(Toy(norm)))
    return engine


def run_steps(
    engine: Engine, optimizer: str, steps: Iterable[int]
) -> tuple[list[float], list[float]]:
    """Take steps as the training loop does; give mean losses over all lanes and gradient norms."""
    losses, grad_norms = [], []
    for step in steps:
        engine.set_lr(lr_at(step, OPTIMIZERS[optimizer].lr))
        result = engine.train_step(lanes_of_rank(step))
        assert result.is_finite
        norms.update_running_statistics(engine.module)
        engine.update_ema(ema_decay_at(step))
        losses.append(distributed.mean_over_ranks(result.losses["total"]).item())
        grad_norms.append(result.grad_norm)
    return losses, grad_norms


@dataclass(frozen=True)
class Whole:
    """The state of an engine whole on every rank, which an engine can go on from (a ``Source``)."""

    catalog: dict[str, dict[str, Any]]
    loss_scale: dict[str, float]
    tensors: dict[tuple[str, str], Tensor]

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights that are trained, whether or not there is an average of them too."""
        return self.of_kind("model") | self.of_kind("newest")

    @property
    def ema(self) -> dict[str, Tensor]:
        averages = self.of_kind("model")
        return {name: averages[name] for name in self.of_kind("newest")}

    def of_kind(self, kind: str) -> dict[str, Tensor]:
        return {name: value for (own, name), value in self.tensors.items() if own == kind}

    def read(self, kind: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        flat = self.tensors[kind, name].flatten()
        return flat[first:] if count is None else flat[first : first + count]

    def lacking(self, ranges: Any) -> set[str]:
        return set()


def weights_of(module: nn.Module) -> Whole:
    """The weights of a module as something that an engine can begin with."""
    tensors = {("model", name): value for name, value in module.state_dict().items()}
    catalog = {
        name: Spec(NAMES[value.dtype], tuple(value.shape)) for (_, name), value in tensors.items()
    }
    return Whole({"model": catalog}, {}, tensors)


def whole_of(stored: Stored) -> Whole:
    """Read a checkpoint whole."""
    tensors = {
        (kind, name): stored.read(kind, name).view(spec.shape)
        for kind, specs in stored.catalog.items()
        for name, spec in specs.items()
    }
    return Whole(stored.catalog, stored.loss_scale, tensors)


def save_together(engine: Engine, path: Path, **run: Any) -> Whole:
    """Write a checkpoint of an engine as all ranks do; give what it has to hold."""
    disks = writing.find_disks(path.parent)
    assert list(disks.owners) == [0] * distributed.world_size()
    share = engine.share(distributed.rank(), distributed.world_size())
    writing.write(writing.Save(path, 1, disks, {"format": "test"}, run), share)
    expected = whole_state(engine)
    distributed.barrier()  # rank 0 returns last, when the checkpoint is complete
    assert_same_state(whole_of(open_stored(path)), expected)
    return expected


def assert_same_state(found: Whole, expected: Whole) -> None:
    assert found.catalog == expected.catalog
    assert found.loss_scale == expected.loss_scale
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0)


def whole_state(engine: Engine) -> Whole:
    """Put the shares of all ranks together: every number of every tensor is in one of them."""
    rank, size = distributed.rank(), distributed.world_size()
    shares = distributed.all_gather_objects(engine.share(rank, size))
    catalog = shares[0].catalog
    assert all(share.catalog == catalog for share in shares)
    tensors, times = {}, {}
    for kind, specs in catalog.items():
        for name, spec in specs.items():
            tensors[kind, name] = torch.empty(spec.count, dtype=spec.torch_dtype)
            times[kind, name] = torch.zeros(spec.count)
    for piece in (piece for share in shares for piece in share.pieces):
        held = slice(piece.first, piece.first + len(piece.values))
        tensors[piece.kind, piece.name][held] = piece.values
        times[piece.kind, piece.name][held] += 1
    assert all((count == 1).all() for count in times.values())
    shaped = {key: flat.view(catalog[key[0]][key[1]].shape) for key, flat in tensors.items()}
    return Whole(catalog, shares[0].loss_scale, shaped)


def weights(name: str, engine: Engine) -> dict[str, Tensor] | None:
    """All weights: of rank 0 as saved, of the others as they have them (None where sharded)."""
    saved = whole_state(engine).model
    if distributed.is_main():
        return saved
    return copy_of(engine.module.state_dict()) if name in REPLICATED else None
