"""The engine on DeepSpeed: ZeRO stages 0 to 3.

DeepSpeed shards gradients, optimizer state and weights, reduces gradients over the ranks (at stage
0 `averaging.py` does) and takes the optimizer step. Precision, accumulation, the decision whether a
step counts, and the state by parameter name are bigdet's. DeepSpeed itself always runs in fp32:
autocast and loss scale are the same in all engines (`precision.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.engine.averaging import GradientAverage
from bigdet.engine.base import (
    BUCKET_ELEMENTS,
    Launched,
    MakeOptimizer,
    state_keys,
    weight_shapes,
)
from bigdet.engine.ema import MovingAverage
from bigdet.engine.parts import Part
from bigdet.engine.precision import LossScale, TotalLoss, lane_losses, rounded_parameters
from bigdet.engine.sharding import find_sharding, stage_of_run
from bigdet.engine.stateful import StatefulEngine
from bigdet.engine.stepping import launched, step_where
from bigdet.pieces.building import materialize, place

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else its import warns that it found no GPU

import deepspeed
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

from bigdet.engine.zero_state import (
    FlatState,
    PartitionedInit,
    PlainState,
    ShardedState,
    ZeroState,
    let_go_of,
    step_partitions,
)

# The import has read it, once; processes that this one starts may see a GPU.
if not torch.cuda.is_available() and os.environ["DS_ACCELERATOR"] == "cpu":
    del os.environ["DS_ACCELERATOR"]

# At stage 3 smaller parameters stay whole on every rank: norms and biases, together less than 1%
# of a detector. DeepSpeed's own 100,000 would leave half of a ResNet's convolutions whole.
WHOLE_ELEMENTS = 10_000

# On CPUs DeepSpeed would compile a C++ extension in the first run, for inference only: it needs a
# compiler, takes half a minute, and a rank killed meanwhile leaves a lock that hangs later runs.
deepspeed.ops.__compatible_ops__ = {}

# Messages of DeepSpeed that are left out: that it was tested with Adam only
# (tests/ranks/test_engine.py tests SGD), that a step was skipped (the training loop logs and counts
# it), and that its stage 3 finds no tensors in the dataclasses that heads return: the layers
# inside, which have the parameters, do return tensors.
UNSAID = ("untested optimizer", "OVERFLOW! Skipping step", "unknown inputs or outputs type")
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(words in record.getMessage() for words in UNSAID)
)


class DeepSpeedEngine(StatefulEngine):
    """``Engine`` with ZeRO stage 0 to 3.

    Args:
        module: the same on every rank, with ``requires_grad`` set; with its weights, or with
            parameters on the meta device, whose weights `begin` or `load_state` brings.
        make_optimizer: gives SGD or AdamW over what is trained in the module.
        config: stage, precision, clipping and offload.
        num_micro_batches: of this rank per step, the same on every rank.
        device: of this rank.
        with_ema: keep a moving average of what is trained.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        config: EngineConfig,
        num_micro_batches: int,
        device: torch.device,
        *,
        with_ema: bool = False,
    ) -> None:
        self.module = module
        self._num_micro_batches = num_micro_batches
        self._clip_norm = config.clip_norm
        distributed.start()
        self._stage = stage_of_run(config)
        self._is_offloaded = config.offload != "none"
        self._scale = LossScale(config.precision)
        self._shapes = weight_shapes(module)
        self._place(device)
        self._optimizer = make_optimizer(module)
        self._keys = state_keys(self._optimizer)
        # By name, with its group: DeepSpeed puts flat partitions in place of the parameters.
        group_of = {
            id(parameter): number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        self._trained = {
            name: (parameter, group_of[id(parameter)])
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._sharding = find_sharding(config, device)
        largest = max(math.prod(shape) for shape in self._shapes.values())
        settings = _deepspeed_config(
            dataclasses.replace(config, zero_stage=self._stage), device, largest
        )
        if self._stage == 3:
            offload = config.offload == "all"
            if config.gather_precision == "bf16":
                for parameter in rounded_parameters(module):
                    setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
            PartitionedInit(
                module=module,
                data_parallel_group=self._sharding.shard_group,
                dtype=torch.float32,
                config_dict_or_path=settings,
                remote_device="cpu" if offload else None,
                pin_memory=offload and device.type == "cuda",
            )
        self._engine: Any = deepspeed.initialize(
            model=TotalLoss(module, config.precision, device),
            optimizer=self._optimizer,
            config=settings,
            dist_init_required=False,
        )[0]
        self._average: GradientAverage | None = None
        if self._stage == 0:
            self._engine.enable_backward_allreduce = False
            place(module, _channels_last)
            if distributed.world_size() > 1:
                parameters = {name: parameter for name, (parameter, _) in self._trained.items()}
                group = self._engine.seq_data_parallel_group  # DeepSpeed's own copy of all ranks
                self._average = GradientAverage(parameters, group)
        self._state = self._state_access()
        self._ema = None
        if with_ema:
            state = self._state
            self._ema = MovingAverage(module, self._trained, state.parts, state.use_parts)

    def _place(self, device: torch.device) -> None:
        """Bring the module to its device; of parameters without memory, stage 3 has none yet."""
        place(self.module, lambda value: value if value.is_meta else value.to(device))
        for parameter in self.module.parameters():
            if not parameter.is_meta:
                # DeepSpeed broadcasts weights as bytes, which channels_last ones cannot be seen as.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

        def make(value: Tensor) -> Tensor:
            if self._stage == 3:  # one number that stands for all
                return torch.empty((), dtype=value.dtype, device=device).expand(value.shape)
            return torch.empty(value.shape, dtype=value.dtype, device=device)

        materialize(self.module, make)

    def _state_access(self) -> ZeroState:
        """How weights and optimizer state of this stage are read and written."""
        if self._stage == 0:
            return PlainState(self._optimizer)
        zero = self._engine.optimizer
        if self._stage == 3:
            if not self._is_offloaded:
                step_partitions(zero)
            return ShardedState(self._optimizer, zero, self._sharding)
        return FlatState(self._optimizer, zero)

    def launch_step(self, micro_batches: Iterable[Any]) -> Launched:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks.

        Stages 1 to 3 wait for the device: DeepSpeed's optimizers read on the host whether a
        gradient is not finite (``has_overflow``), before they decide to clip and step.
        """
        scale = self._scale.value
        if self._stage:
            self._engine.optimizer.loss_scale = scale  # multiplies losses, divides gradients
        seen: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == self._num_micro_batches)
            total, losses = self._engine(batch)
            total = total / self._num_micro_batches
            if not self._stage:
                total = total * scale
            if self._average is not None and number == self._num_micro_batches:
                self._average.expect()
            self._engine.backward(total, scale_wrt_gas=False)
            seen.append(losses)
        assert len(seen) == self._num_micro_batches, len(seen)
        if self._average is not None:
            self._average.finish()
        losses = lane_losses(seen)
        self._settle_ema()
        norm = self._step_sharded(losses) if self._stage else self._step_whole(scale)
        self._last = launched(norm, losses, self._scale)
        return self._last

    def _step_whole(self, scale: float) -> Tensor:
        """Stage 0: every rank has the same reduced gradients. Return the norm, fp64."""
        parameters = [parameter for parameter, _ in self._trained.values()]
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:  # no loss depends on it: 0, as DeepSpeed has it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if scale != 1:
            torch._foreach_mul_(gradients, 1 / scale)
        # In fp64, as DeepSpeed's other stages: a sum of 10 million squares in fp32 is off by 4e-4.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if self._clip_norm is not None:
            clip_grads_with_norm_(parameters, self._clip_norm, norm.float())
        if not self._optimizer.state:
            self._make_optimizer_state()
        step_where(norm.isfinite(), self._optimizer)  # DeepSpeed's stage 0 would take any step
        self._engine.zero_grad()
        return norm

    def _step_sharded(self, losses: dict[str, Tensor]) -> Tensor:
        """Stages 1 to 3: DeepSpeed reduces the norm, clips, and skips a step without a norm."""
        self._engine.step()
        is_skipped = self._engine.optimizer.overflow
        if isinstance(self._state, ShardedState):
            self._state.after_step(self._engine.module, is_skipped=is_skipped)
        norm = math.inf if is_skipped else float(self._engine.get_global_grad_norm())
        return torch.full((), norm, dtype=torch.float64, device=losses["total"].device)

    def _weights(self, kind: str, names: Iterable[str]) -> list[Part]:
        """Give what this rank holds of parameters and buffers, as they are now."""
        own = self.module.state_dict(keep_vars=True)
        return [self._state.weight(kind, name, own[name], self._shapes[name]) for name in names]

    def _optimizer_parts(self) -> list[Part]:
        """Give what this rank holds of the optimizer state, once there is any."""
        if not self._optimizer.state:
            return []
        self._state.prepare()
        return [
            self._state.part(name, parameter, group, key, self._shapes[name])
            for name, (parameter, group) in self._trained.items()
            for key in self._keys
        ]

    def _make_optimizer_state(self) -> None:
        """Make room for the optimizer state, as a first step would."""
        self._state.create(self._keys)

    def _setting(self) -> contextlib.AbstractContextManager[None]:
        """Let weights be set inside a block, and take them over at its end."""
        return self._state.setting()

    def close(self) -> None:
        """Free all memory but the module's own."""
        wrapped = self._engine.module
        if self._average is not None:
            self._average.close()
        self._engine.destroy()
        if self._stage == 3:
            let_go_of(wrapped)
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        self._trained.clear()
        self._engine = self._ema = self._last = self._average = None
        del self._state
        gc.collect()  # engine and optimizer refer to each other


def _channels_last(value: Tensor) -> Tensor:
    """Lay weights of convolutions out as images are, or cuDNN would copy them in each pass.

    Partitions of the other stages are consecutive numbers of flattened tensors, so their weights
    stay contiguous. Checkpoints are in logical order in any case.
    """
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _deepspeed_config(config: EngineConfig, device: torch.device, largest: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; the largest tensor of the module has so many numbers."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        # Needs streams, and waits for the device at the end of each backward pass.
        "overlap_comm": device.type == "cuda" and distributed.world_size() > 1,
        "reduce_bucket_size": BUCKET_ELEMENTS,
    }
    offloaded = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if config.offload != "none":
        zero["offload_optimizer"] = offloaded
    if config.offload == "all":
        zero["offload_param"] = offloaded
    if config.zero_stage == 3:
        # What a rank holds besides its share. DeepSpeed would let 10^9 weights stay gathered, and
        # would step all weights of a group at once, with copies of all their gradients.
        bucket = min(BUCKET_ELEMENTS, largest)
        zero["stage3_param_persistence_threshold"] = WHOLE_ELEMENTS
        zero["stage3_prefetch_bucket_size"] = zero["reduce_bucket_size"] = bucket
        zero["stage3_max_reuse_distance"] = bucket
        zero["stage3_max_live_parameters"] = 2 * bucket
        zero["sub_group_size"] = max(bucket // 4, 1)  # a step has three more of each of its numbers
    else:
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    return {
        # Only their product with the number of ranks is ever used, for messages: accumulation
        # and averaging over micro-batches are done in train_step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # a C++ extension that is compiled at run time
        "zero_optimization": zero,
        # At stage 0 the norm is needed before DeepSpeed's step: clipped here.
        "gradient_clipping": (config.clip_norm or 0.0) if config.zero_stage else 0.0,
        "communication_data_type": config.reduce_precision,
        "timers": {"throughput": {"enabled": False}},  # waits for the device in every forward
    }
