"""Where each ZeRO stage keeps weights and optimizer state, and how to read and set one tensor.

Stage 0 has everything whole. Stages 1 and 2 have whole weights, and one flat partition per
parameter group of their fp32 copy and of the optimizer state. Stage 3 has a padded partition of
each parameter; those of a group lie one after the other in flat tensors, which the optimizer steps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from bigdet import distributed


class ZeroState(Protocol):
    """One stage's way to its state. All methods are collectives, parameter by parameter."""

    def prepare(self) -> None:
        """Make the optimizer state readable."""
        ...

    def create(self, keys: Sequence[str]) -> None:
        """Make room for the optimizer state, as a first step would."""
        ...

    def read(self, parameter: Tensor, group: int, key: str) -> Tensor:
        """Give one tensor of a parameter's optimizer state, whole."""
        ...

    def write(self, parameter: Tensor, group: int, key: str, value: Tensor) -> None:
        """Set one tensor of a parameter's optimizer state; every rank has it whole."""
        ...

    def whole(self, weight: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Have a parameter or buffer whole inside a block."""
        ...

    def set_weight(self, weight: Tensor, value: Tensor | None) -> None:
        """Set a parameter or buffer to the value that rank 0 passes."""
        ...

    def weights_are_set(self) -> None:
        """Take over all weights that were set."""
        ...

    def parts(self) -> list[Tensor]:
        """Give the tensors that this rank's optimizer steps, in fp32."""
        ...

    def use_parts(self) -> None:
        """Compute with these tensors as they are now, as after a step."""
        ...


class PlainState:
    """Stage 0: torch's own optimizer over the parameters themselves."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def prepare(self) -> None:
        """Nothing to do."""

    def create(self, keys: Sequence[str]) -> None:
        """Nothing to do: `write` adds what is not there."""

    def read(self, parameter: Tensor, group: int, key: str) -> Tensor:
        """Give one tensor of a parameter's optimizer state."""
        value: Tensor = self._optimizer.state[parameter][key]
        return value

    def write(self, parameter: Tensor, group: int, key: str, value: Tensor) -> None:
        """Set one tensor of a parameter's optimizer state."""
        self._optimizer.state[parameter][key] = value

    def whole(self, weight: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Weights are whole."""
        return contextlib.nullcontext()

    def set_weight(self, weight: Tensor, value: Tensor | None) -> None:
        """Set a parameter or buffer to the value that rank 0 passes."""
        source = weight if value is None else value.to(weight)
        weight.copy_(distributed.broadcast_tensor(source))

    def weights_are_set(self) -> None:
        """Nothing to do."""

    def parts(self) -> list[Tensor]:
        """Give the parameters, or what DeepSpeed put in their place."""
        return [part for group in self._optimizer.param_groups for part in group["params"]]

    def use_parts(self) -> None:
        """Nothing to do."""


class FlatState(PlainState):
    """Stages 1 and 2: whole weights, flat partitions of their fp32 copies and of the state."""

    def __init__(self, optimizer: Optimizer, zero: Any) -> None:
        super().__init__(optimizer)
        self._zero = zero

    def prepare(self) -> None:
        """Let DeepSpeed find each parameter's slice in the partitions of the optimizer state.

        It links them by itself in the first step, but of all groups after stepping the first
        one, so that the state of the others is not found (DeepSpeed 0.19.8).
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def create(self, keys: Sequence[str]) -> None:
        """Fill the partitions with zeros."""
        for settings in self._optimizer.param_groups:
            _add_zeros(self._optimizer, settings["params"][0], keys)
        self.prepare()

    def read(self, parameter: Tensor, group: int, key: str) -> Tensor:
        """Put one tensor of a parameter's optimizer state together."""
        if key == "step":
            step: Tensor = self._optimizer.state[self._partition(group)][key]
            return step
        full: Tensor = safe_get_full_optimizer_state(parameter, key)
        return full

    def write(self, parameter: Tensor, group: int, key: str, value: Tensor) -> None:
        """Set this rank's part of one tensor of a parameter's optimizer state."""
        if key == "step":
            self._optimizer.state[self._partition(group)][key] = value
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _partition(self, group: int) -> Tensor:
        """What the optimizer steps for a group."""
        partition: Tensor = self._optimizer.param_groups[group]["params"][0]
        return partition

    def weights_are_set(self) -> None:
        """Renew the partitions, which are copies."""
        self._zero.refresh_fp32_params()

    def use_parts(self) -> None:
        """Renew the weights by the partitions of all ranks."""
        self._zero.update_lp_params()


class ShardedState:
    """Stage 3: a padded partition of each parameter on every rank."""

    def __init__(self, optimizer: Optimizer, zero: Any) -> None:
        self._optimizer = optimizer
        self._zero = zero

    def prepare(self) -> None:
        """Nothing to do."""

    def create(self, keys: Sequence[str]) -> None:
        """Fill the partitions with zeros."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            _add_zeros(self._optimizer, flat, keys)

    def read(self, parameter: Tensor, group: int, key: str) -> Tensor:
        """Put one tensor of a parameter's optimizer state together."""
        if key == "step":
            step: Tensor = self._optimizer.state[self._flat(parameter)][key]
            return step
        full: Tensor = safe_get_full_optimizer_state(parameter, key)
        return full

    def write(self, parameter: Tensor, group: int, key: str, value: Tensor) -> None:
        """Set this rank's part of one tensor of a parameter's optimizer state."""
        if key == "step":
            self._optimizer.state[self._flat(parameter)][key] = value
        else:
            # safe_set_full_* forgets the padding (DeepSpeed 0.19.8).
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = value.new_zeros(size * distributed.world_size())
            padded[: value.numel()] = value.flatten()
            part = padded.narrow(0, size * distributed.rank(), size)
            safe_set_local_optimizer_state(parameter, part, key)

    def _flat(self, parameter: Tensor) -> Tensor:
        """The flat tensor that has this rank's partition of a parameter."""
        group = self._zero.grad_position[self._zero.get_param_id(parameter)][0]
        flat: Tensor = self._zero.fp32_partitioned_groups_flat[group]
        return flat

    def whole(self, weight: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Gather a parameter inside the block; buffers are whole."""
        if not hasattr(weight, "ds_tensor"):
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            [weight]
        )
        return gathered

    def set_weight(self, weight: Tensor, value: Tensor | None) -> None:
        """Set a parameter or buffer to the value that rank 0 passes."""
        if not hasattr(weight, "ds_tensor"):
            source = weight if value is None else value.to(weight)
            weight.copy_(distributed.broadcast_tensor(source))
            return
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if value is not None:
                weight.data.copy_(value)
        # The same memory, but for offload, which has another copy for the optimizer.
        safe_set_local_fp32_param(weight, weight.ds_tensor.data)

    def weights_are_set(self) -> None:
        """Nothing to do."""

    def parts(self) -> list[Tensor]:
        """Give the flat tensors of the partitions."""
        flat: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flat

    def use_parts(self) -> None:
        """Do what DeepSpeed does after a step: renew partitions, gather what stays whole."""
        self._zero.checkpoint_event_prologue()  # partitions all, as before a step
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        self._zero.checkpoint_event_epilogue()


def let_go_of(wrapped: nn.Module) -> None:
    """Empty what stage 3 of DeepSpeed 0.19.8 keeps of a destroyed engine in globals.

    Args:
        wrapped: what ``deepspeed.initialize`` was given.
    """
    parameter_offload.FWD_MODULE_STACK.remove(wrapped)
    name = "_PartitionedParameterCoordinator__params_to_release"
    decorated = getattr(PartitionedParameterCoordinator, name)
    inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()


def _add_zeros(optimizer: Optimizer, flat: Tensor, keys: Sequence[str]) -> None:
    """Give a flat tensor the state that a first step would make."""
    optimizer.state[flat] = {
        key: torch.zeros(()) if key == "step" else torch.zeros_like(flat.detach()) for key in keys
    }
