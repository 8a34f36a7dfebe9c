"""The engine on torch's FSDP2: weights, gradients and optimizer state sharded by rows.

Each unit (a stage of the backbone, a head) is gathered when its forward or backward pass begins and
freed when it ends; its gradients are reduced to shards after each micro-batch. Both are done in
fp32 unless the config says otherwise, as in the other engine; see `precision.py`. Where each node
has a copy, gradients are averaged over the nodes after the last micro-batch only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bigdet import distributed
from bigdet.config.engine import EngineConfig, gathers_bf16
from bigdet.config.rules import ConfigError
from bigdet.engine.base import (
    Launched,
    MakeOptimizer,
    state_keys,
    weight_shapes,
)
from bigdet.engine.ema import MovingAverage
from bigdet.engine.parts import Part
from bigdet.engine.precision import LossScale, TotalLoss, lane_losses, rounded_parameters
from bigdet.engine.sharding import find_sharding
from bigdet.engine.stateful import StatefulEngine
from bigdet.engine.stepping import launched, local, step_where
from bigdet.pieces.building import place

# Heads return views, and nobody changes their outputs in place (tests/ranks/test_detector.py).
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

CLIP_EPSILON = 1e-6
"""As in torch's own clipping."""


class FsdpEngine(StatefulEngine):
    """``Engine`` on ``fully_shard``.

    Args:
        module: the same on every rank, with ``requires_grad`` set; with its weights, or with
            parameters on the meta device, whose weights `begin` or `load_state` brings.
        make_optimizer: gives SGD or AdamW over what is trained in the module.
        config: precision, clipping and offload.
        num_micro_batches: of this rank per step, the same on every rank.
        device: of this rank.
        units: modules that are sharded and gathered together, each called once or more in a
            forward pass; what is in none of them makes one more unit.
        with_ema: keep a moving average of what is trained.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        config: EngineConfig,
        num_micro_batches: int,
        device: torch.device,
        units: Sequence[Sequence[nn.Module]],
        *,
        with_ema: bool = False,
    ) -> None:
        distributed.start()
        self.module = module
        self._num_micro_batches = num_micro_batches
        self._clip_norm = config.clip_norm
        self._device = device
        # Until then torch would add them up in the type that is sent, on the device.
        self._sums_in_nodes = config.reduce_precision == "fp32" and config.offload == "none"
        self._scale = LossScale(config.precision)
        self._shapes = weight_shapes(module)
        place(module, lambda value: value if value.is_meta else value.to(device))
        for parameter in module.parameters():
            # Shards are rows, so channels_last weights cannot be sharded.
            parameter.data = parameter.data.contiguous()
        self._sharding = find_sharding(config, device)
        mesh = self._sharding.mesh(device)
        offload = OffloadPolicy()
        if config.offload == "all":
            offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        sent = _sent_precision(module, config)
        for unit in units:
            if any(True for part in unit for _ in part.parameters()):
                fully_shard(list(unit), mesh=mesh, mp_policy=sent, offload_policy=offload)
        fully_shard(module, mesh=mesh, mp_policy=sent, offload_policy=offload)
        home = torch.device("cpu") if config.offload == "all" else device
        place(
            module, lambda value: torch.empty_like(value, device=home) if value.is_meta else value
        )
        self._total = TotalLoss(module, config.precision, device)
        self._optimizer = make_optimizer(module)
        self._keys = state_keys(self._optimizer)
        self._trained = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._ema = None
        if with_ema:
            self._ema = MovingAverage(module, self._trained, self._parts, self._use_parts)

    def _parts(self) -> list[Tensor]:
        """This rank's rows of what is trained; the first forward pass may move them."""
        return [local(parameter) for parameter in self._trained.values()]

    def _use_parts(self) -> None:
        """Free what is gathered: after an evaluation the outermost unit still is."""
        for layer in self.module.modules():
            if isinstance(layer, FSDPModule):
                layer.reshard()

    def launch_step(self, micro_batches: Iterable[Any]) -> Launched:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks.

        The host does not wait for the device, but with offload and under fp16.
        """
        scale = self._scale.value
        seen: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches, start=1):
            if self._sums_in_nodes and self._sharding.copies > 1:
                self.module.set_requires_all_reduce(number == self._num_micro_batches)
            total, losses = self._total(batch)
            (total * (scale / self._num_micro_batches)).backward()
            seen.append(losses)
        assert len(seen) == self._num_micro_batches, len(seen)
        losses = lane_losses(seen)
        self._settle_ema()
        self._last = launched(self._step(scale), losses, self._scale)
        return self._last

    def _step(self, scale: float) -> Tensor:
        """Step the optimizer unless a gradient is not finite; return the norm (fp64, not read)."""
        for parameter in self._trained.values():
            if parameter.grad is None:  # no loss depends on it: 0, as DeepSpeed has it
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(p.grad) for p in self._trained.values() if p.grad is not None]
        # In fp64, as in DeepSpeed: a sum of 10 million squares in fp32 is off by 4e-4.
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
        total = distributed.sum_over_ranks(norms.square().sum().to(self._device))
        norm = (total / self._sharding.copies).sqrt() / scale
        home = gradients[0].device  # the CPU, with offload: then the host waits here
        if self._clip_norm is not None:
            factor = (self._clip_norm / (norm + CLIP_EPSILON)).clamp(max=1) / scale
            torch._foreach_mul_(gradients, factor.float().to(home))
        elif scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        if not self._optimizer.state:
            self._make_optimizer_state()
        step_where(norm.isfinite().to(home), self._optimizer)
        self._optimizer.zero_grad()
        return norm

    def _weights(self, kind: str, names: Iterable[str]) -> list[Part]:
        """Give what this rank holds of parameters and buffers, as they are now."""
        own = self.module.state_dict()
        return [_part(kind, name, own[name], self._shapes[name]) for name in names]

    def _optimizer_parts(self) -> list[Part]:
        """Give what this rank holds of the optimizer state, once there is any."""
        return [
            _part(key, name, self._optimizer.state[parameter][key], self._shapes[name])
            for name, parameter in self._trained.items()
            if parameter in self._optimizer.state
            for key in self._keys
        ]

    def _make_optimizer_state(self) -> None:
        """Make room for the optimizer state, as a first step would."""
        for parameter in self._trained.values():
            self._optimizer.state[parameter] = {
                key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter.detach())
                for key in self._keys
            }

    def close(self) -> None:
        """Free all memory but the module's own."""
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        self._trained.clear()
        self._ema = self._last = None


def _sent_precision(module: nn.Module, config: EngineConfig) -> MixedPrecisionPolicy:
    """Say in which types weights are gathered and gradients reduced."""
    reduced = torch.bfloat16 if config.reduce_precision == "bf16" else torch.float32
    is_able = "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__
    if not gathers_bf16(config) or (config.gather_precision is None and not is_able):
        return MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    if not is_able:
        raise ConfigError(
            f"engine.gather_precision: found bf16, which needs a newer torch under fsdp (2.15 has "
            f"it), found {torch.__version__}. Write fp32, or engine.kind: deepspeed."
        )
    rounded = {id(parameter) for parameter in rounded_parameters(module)}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=reduced,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda each: None if id(each) in rounded else each.dtype,
    )


def _part(kind: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Part:
    """Say what this rank holds of a tensor: rows of it, or all."""
    if not isinstance(value, DTensor):
        return Part(kind, name, tuple(value.shape), 0, value, is_whole=True)
    _, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return Part(kind, name, shape, offset[0] * math.prod(shape[1:]), value.to_local())
