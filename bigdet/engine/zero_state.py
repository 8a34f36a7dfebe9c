"""Where each ZeRO stage keeps weights and optimizer state, and how to read and set one tensor.

Stage 0 has everything whole. Stages 1 and 2 have whole weights, and one flat partition per
parameter group of their fp32 copy and of the optimizer state. Stage 3 has a padded partition of
each parameter; those of a group lie one after the other in flat tensors, which the optimizer steps.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    iter_params,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from bigdet.engine.parts import Part
from bigdet.engine.sharding import Sharding


class ZeroState(Protocol):
    """One stage's way to its state; all ranks call the same methods in the same order."""

    def prepare(self) -> None:
        """Make the optimizer state readable."""
        ...

    def create(self, keys: Sequence[str]) -> None:
        """Make room for the optimizer state, as a first step would."""
        ...

    def weight(self, kind: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Part:
        """Give what this rank holds of a parameter or buffer; ``shape`` is that of the whole."""
        ...

    def part(
        self, name: str, parameter: Tensor, group: int, key: str, shape: tuple[int, ...]
    ) -> Part:
        """Give what this rank holds of one tensor of a parameter's optimizer state."""
        ...

    def setting(self) -> contextlib.AbstractContextManager[None]:
        """Let weights be set inside a block, and take them over at its end."""
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
        """Fill the state with zeros."""
        for settings in self._optimizer.param_groups:
            for parameter in settings["params"]:
                _add_zeros(self._optimizer, parameter, keys)

    def weight(self, kind: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Part:
        """Weights are whole."""
        return Part(kind, name, shape, 0, value, is_whole=True)

    def part(
        self, name: str, parameter: Tensor, group: int, key: str, shape: tuple[int, ...]
    ) -> Part:
        """The optimizer's state is whole."""
        return _whole(name, key, self._optimizer.state[parameter][key])

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Nothing to do."""
        yield

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

    def part(
        self, name: str, parameter: Tensor, group: int, key: str, shape: tuple[int, ...]
    ) -> Part:
        """Give this rank's slice of a parameter's optimizer state, empty where it has none."""
        state = self._optimizer.state[self._optimizer.param_groups[group]["params"][0]]
        if key == "step":
            return _whole(name, key, state[key])
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:
            return Part(key, name, shape, 0, state[key][:0])
        values = fragment.get_optim_state_fragment(key)
        return Part(key, name, shape, fragment.lp_fragment_address.start, values)

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Renew the partitions, which are copies, from the weights that were set."""
        yield
        self._zero.refresh_fp32_params()

    def use_parts(self) -> None:
        """Renew the weights by the partitions of all ranks."""
        self._zero.update_lp_params()


class ShardedState:
    """Stage 3: a padded partition of each parameter on every rank, or on those of each node."""

    def __init__(self, optimizer: Optimizer, zero: Any, sharding: Sharding) -> None:
        self._optimizer = optimizer
        self._zero = zero
        self._position = sharding.position
        self._is_first_step = True
        if sharding.copy_group is not None:
            _average_over_copies(zero, sharding)

    def prepare(self) -> None:
        """Nothing to do."""

    def create(self, keys: Sequence[str]) -> None:
        """Fill the partitions with zeros."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            _add_zeros(self._optimizer, flat, keys)

    def weight(self, kind: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Part:
        """Give this rank's partition of a parameter; buffers are whole."""
        if not hasattr(value, "ds_tensor"):
            return Part(kind, name, shape, 0, value, is_whole=True)
        return self._partition(kind, name, shape, value.ds_tensor)

    def part(
        self, name: str, parameter: Tensor, group: int, key: str, shape: tuple[int, ...]
    ) -> Part:
        """Give this rank's partition of a parameter's optimizer state."""
        values = self._slice(parameter, key)
        if key == "step":
            return _whole(name, key, values)
        return self._partition(key, name, shape, values)

    def _partition(self, kind: str, name: str, shape: tuple[int, ...], padded: Tensor) -> Part:
        """Describe this rank's partition of a tensor, without the padding at its end."""
        first = min(len(padded) * self._position, math.prod(shape))
        count = min(len(padded), math.prod(shape) - first)
        return Part(kind, name, shape, first, padded[:count])

    def _slice(self, parameter: Tensor, key: str | None) -> Tensor:
        """Give the numbers of a parameter in a flat tensor: its fp32 copy, or the state ``key``."""
        number, begin, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat: Tensor = self._zero.fp32_partitioned_groups_flat[number]
        if key is not None:
            flat = self._optimizer.state[flat][key]
        return flat if key == "step" else flat.narrow(0, begin, size)

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Let go of the small parameters that are kept whole, and gather them anew afterwards."""
        self._zero.checkpoint_event_prologue()
        yield
        for parameter in (parameter for group in self._zero.fp16_groups for parameter in group):
            # The same memory, but for offload, which has another copy for the optimizer.
            self._slice(parameter, None).data.copy_(parameter.ds_tensor.data)
        self._zero.checkpoint_event_epilogue()

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

    def after_step(self, wrapped: nn.Module, *, is_skipped: bool) -> None:
        """Prepare the next forward pass (collective).

        In the first step, DeepSpeed finds out which layers use weights of others. After it, hooks
        stay where there is something to gather; small parameters are whole between steps.

        Args:
            wrapped: what ``deepspeed.initialize`` was given.
            is_skipped: after a skipped step DeepSpeed leaves small parameters partitioned.
        """
        if is_skipped:
            self._zero.checkpoint_event_epilogue()
        if self._is_first_step:
            _unhook_idle(self._zero, wrapped)
        self._is_first_step = False


def _whole(name: str, key: str, value: Tensor) -> Part:
    """Describe a tensor of the optimizer that every rank has whole."""
    return Part(key, name, tuple(value.shape), 0, value, is_whole=True)


def _average_over_copies(zero: Any, sharding: Sharding) -> None:
    """Let stage 3 average gradients over nodes too, as DeepSpeed's MiCS did before it was removed.

    DeepSpeed averages them over the ranks of a node, which its parameters are partitioned over, and
    then calls ``partition_grads`` with this rank's partitions, which adds them to those of earlier
    micro-batches. In the last one of a step the sums are averaged over the nodes, so every weight
    needs a gradient in that one, as with bigdet's detectors: losses without objects are exactly 0
    and depend on all weights.
    """
    partition_grads = zero.partition_grads
    sums = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition

    def averaged(parameters: list[nn.Parameter], partitions: list[Tensor]) -> Any:
        if not zero.is_gradient_accumulation_boundary():
            return partition_grads(parameters, partitions)
        sizes, earlier = [len(each) for each in partitions], zero.micro_step_id
        total = torch.cat(partitions).to(zero.gradient_accumulation_dtype)
        if earlier:
            pairs = zip(parameters, sizes, strict=True)  # the last rank's are not padded here
            found = [sums[zero.get_param_id(each)][:size] for each, size in pairs]
            total += torch.cat(found).to(total.device)
        sent = total.to(zero.communication_data_type).div_(sharding.copies)
        torch.distributed.all_reduce(sent, group=sharding.copy_group)
        means = torch.split(sent.to(total.dtype), sizes)
        zero.micro_step_id = 0  # they replace the sums
        buffers = partition_grads(parameters, list(means))
        zero.micro_step_id = earlier
        return buffers

    zero.partition_grads = averaged


class PartitionedInit(deepspeed.zero.Init):  # type: ignore[misc]
    """Partitions the parameters of a module one after the other, each with memory of its own.

    As ``deepspeed.initialize`` would, but for parameters whose numbers share one place: these get
    memory when it is their turn, which is free again when they are partitioned.
    """

    def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
        for parameter in param_list:
            if not parameter.is_contiguous():
                parameter.data = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=self.local_device
                )
            super()._convert_to_zero_parameters([parameter])


def step_partitions(zero: Any) -> None:
    """Let the optimizer of stage 3 step the partitions themselves, and free the copies of them.

    DeepSpeed 0.19.8 means to do so with weights in fp32, but it compares a device with a name.
    """
    for stepped, partitions in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
    ):
        stepped.data = partitions.data


def _unhook_idle(zero: Any, wrapped: nn.Module) -> None:
    """Take stage 3's hooks from layers that have nothing to gather in a step.

    DeepSpeed hooks every module, and each of the four hooks takes host time.
    """
    offload = zero.parameter_offload
    idle = [
        module
        for module in wrapped.modules()
        if module is not wrapped and all(parameter.ds_persist for parameter in iter_params(module))
    ]
    hooks = {id(of) for layer in idle for of in (layer._forward_pre_hooks, layer._forward_hooks)}
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in hooks:
            handle.remove()
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()  # the order of modules is noted anew
    _forget_released()


def _forget_released() -> None:
    """Empty what DeepSpeed 0.19.8 caches, for all engines and orders: what a module releases."""
    name = "_PartitionedParameterCoordinator__params_to_release"
    decorated = getattr(PartitionedParameterCoordinator, name)
    inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()


def let_go_of(wrapped: nn.Module) -> None:
    """Empty what stage 3 of DeepSpeed 0.19.8 keeps of a destroyed engine in globals.

    Args:
        wrapped: what ``deepspeed.initialize`` was given.
    """
    parameter_offload.FWD_MODULE_STACK.remove(wrapped)
    _forget_released()


def _add_zeros(optimizer: Optimizer, flat: Tensor, keys: Sequence[str]) -> None:
    """Give a flat tensor the state that a first step would make."""
    optimizer.state[flat] = {
        key: torch.zeros(()) if key == "step" else torch.zeros_like(flat.detach()) for key in keys
    }
