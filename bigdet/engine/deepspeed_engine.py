"""The engine on DeepSpeed: ZeRO stages 0 to 2. The only module that imports deepspeed.

What is DeepSpeed's here: gradients reduced over the ranks, gradients and optimizer state sharded
over them, and the optimizer step. What is ours: accumulation, the verdict whether a step counts,
and the state by parameter name.
"""

from __future__ import annotations

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
from bigdet.config.schema import EngineConfig
from bigdet.engine.base import EngineState, MakeOptimizer, StepResult, misfits, state_keys

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else its import warns that it found no GPU

import deepspeed
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

# Elements reduced at once. DeepSpeed's own 500 million would be a buffer of 2 GB, whatever the
# model; overlapped communication has two of them.
BUCKET_ELEMENTS = 50_000_000

# On CPUs DeepSpeed would compile a C++ extension in the first run, for inference only: it needs a
# compiler, takes half a minute, and a rank killed meanwhile leaves a lock that hangs later runs.
deepspeed.ops.__compatible_ops__ = {}

# What DeepSpeed need not say: that it knows Adam alone (tests/ranks/test_engine.py tests SGD), and
# that a step was skipped, which the training loop counts and tells.
UNSAID = ("untested optimizer", "OVERFLOW! Skipping step")
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(words in record.getMessage() for words in UNSAID)
)


class _TotalLoss(nn.Module):
    """What DeepSpeed wraps: its hooks stay off the bare module, which evaluation also runs.

    Args:
        module: gives a dict of scalar losses for a batch.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        trained = [p for p in module.parameters() if p.requires_grad]
        assert trained, "no parameter is trained"
        self._probe = (min(trained, key=Tensor.numel),)  # in a tuple: not registered twice

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module on a batch.

        Returns:
            The sum of the losses, for the backward pass, and all losses with it, detached.
        """
        losses: dict[str, Tensor] = self.module(batch)
        total = torch.stack(list(losses.values())).sum()
        # A loss can be infinite where its gradient is not (through a masked branch). The verdict
        # is taken from the gradient norm, which all ranks know, so such a loss must reach it: as
        # NaN in one element's gradient. Costs neither a collective nor a wait for the device.
        poison = torch.where(torch.isfinite(total.detach()), 0.0, torch.nan)
        return total + poison * self._probe[0].view(-1)[0], {
            "total": total.detach(),
            **{name: loss.detach() for name, loss in losses.items()},
        }


class DeepSpeedEngine:
    """``Engine`` with ZeRO stage 0, 1 or 2, in fp32 or under bf16 autocast with fp32 weights.

    Args:
        module: with its weights loaded and ``requires_grad`` set; the same on every rank.
        make_optimizer: gives SGD or AdamW over what is trained in the module.
        config: stage, precision and clipping.
        num_micro_batches: of this rank per step, the same on every rank.
        device: of this rank.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        config: EngineConfig,
        num_micro_batches: int,
        device: torch.device,
    ) -> None:
        self.module = module
        self._num_micro_batches = num_micro_batches
        self._clip_norm = config.clip_norm
        self._is_sharded = config.zero_stage > 0
        module.to(device)
        for parameter in module.parameters():
            # DeepSpeed broadcasts weights as bytes, which channels_last ones cannot be seen as.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
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
        distributed.start()
        self._engine: Any = deepspeed.initialize(
            model=_TotalLoss(module),
            optimizer=self._optimizer,
            config=_deepspeed_config(config, device),
            dist_init_required=False,
        )[0]

    def train_step(self, micro_batches: Iterable[Any]) -> StepResult:
        """Take one optimizer step on the mean loss of all micro-batches of all ranks."""
        seen: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == self._num_micro_batches)
            total, losses = self._engine(batch)
            self._engine.backward(total / self._num_micro_batches, scale_wrt_gas=False)
            seen.append(losses)
        assert len(seen) == self._num_micro_batches, len(seen)
        mean = {
            name: torch.stack([losses[name] for losses in seen]).mean().float() for name in seen[0]
        }
        norm = self._step_sharded() if self._is_sharded else self._step_whole()
        return StepResult(losses=mean, is_finite=math.isfinite(norm), grad_norm=norm)

    def _step_whole(self) -> float:
        """Stage 0: every rank has the same reduced gradients. Return the norm, inf if skipped."""
        parameters = [parameter for parameter, _ in self._trained.values()]
        # In fp64, as DeepSpeed's other stages: a sum of 10 million squares in fp32 is off by 4e-4.
        norms = [
            torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            for parameter in parameters
            if parameter.grad is not None
        ]
        total_norm = torch.linalg.vector_norm(torch.stack(norms))
        norm = float(total_norm)
        if not math.isfinite(norm):
            self._engine.zero_grad()  # DeepSpeed's stage 0 would take the step
            return math.inf
        if self._clip_norm is not None:
            clip_grads_with_norm_(parameters, self._clip_norm, total_norm.float())
        self._engine.step()
        return norm

    def _step_sharded(self) -> float:
        """Stages 1 and 2: DeepSpeed reduces the norm, clips, and skips a step without a norm."""
        self._engine.step()
        if self._engine.optimizer.overflow:
            return math.inf
        return float(self._engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> EngineState:
        """Give weights and optimizer state, complete on rank 0. Collective."""
        optimizer: dict[str, dict[str, Tensor]] = {}
        if self._optimizer.state:
            self._link_partitions()
            for name, (parameter, group) in self._trained.items():
                full = {key: self._full_state(parameter, group, key) for key in self._keys}
                if distributed.is_main():
                    optimizer[name] = {key: _saved(value) for key, value in full.items()}
        if not distributed.is_main():
            return EngineState()
        model = {name: _saved(value) for name, value in self.module.state_dict().items()}
        return EngineState(model, optimizer)

    def load_state(self, state: EngineState) -> None:
        """Go on from the state that rank 0 has. Collective.

        Raises:
            ValueError: on every rank, when the state is that of another model or optimizer.
        """
        problems = misfits(state, self.module, self._keys) if distributed.is_main() else ""
        problems = distributed.broadcast_object(problems)
        if problems:
            raise distributed.SharedError(
                f"The checkpoint does not fit the model and optimizer of this phase: {problems}. "
                f"Go on with the config it was made with, or start anew in another output folder."
            )
        with torch.no_grad():
            for name, value in self.module.state_dict().items():
                source = state.model.get(name, value).to(value)
                value.copy_(distributed.broadcast_tensor(source))
        if self._is_sharded:
            self._engine.optimizer.refresh_fp32_params()  # the partitions are copies
        self._load_optimizer(state.optimizer)

    def _load_optimizer(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Put optimizer state in place, or clear it where nothing is saved."""
        self._optimizer.state.clear()
        if not self._keys or not distributed.broadcast_object(bool(saved)):
            return
        if self._is_sharded:
            for settings in self._optimizer.param_groups:
                flat = settings["params"][0]
                self._optimizer.state[flat] = {
                    key: torch.zeros(()) if key == "step" else torch.zeros_like(flat.detach())
                    for key in self._keys
                }
            self._link_partitions()
        for name, (parameter, group) in self._trained.items():
            for key in self._keys:
                empty = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                source = saved[name][key] if name in saved else empty
                value = distributed.broadcast_tensor(source.to(empty))
                self._set_full_state(parameter, group, key, value)

    def _full_state(self, parameter: nn.Parameter, group: int, key: str) -> Tensor:
        """One tensor of a parameter's optimizer state, whole. Collective."""
        owner = self._state_owner(parameter, group)
        if key == "step" or not self._is_sharded:
            value: Tensor = self._optimizer.state[owner][key]
            return value
        full: Tensor = safe_get_full_optimizer_state(parameter, key)
        return full

    def _set_full_state(self, parameter: nn.Parameter, group: int, key: str, value: Tensor) -> None:
        """Set one tensor of a parameter's optimizer state, or this rank's part of it."""
        if key == "step" or not self._is_sharded:
            self._optimizer.state[self._state_owner(parameter, group)][key] = value
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _state_owner(self, parameter: nn.Parameter, group: int) -> Tensor:
        """The tensor that the optimizer steps for a parameter: itself, or its group's partition."""
        if not self._is_sharded:
            return parameter
        owner: Tensor = self._optimizer.param_groups[group]["params"][0]
        return owner

    def _link_partitions(self) -> None:
        """Let DeepSpeed find each parameter's slice in the partitions of the optimizer state.

        It links them by itself in the first step, but of all groups after stepping the first
        one, so that the state of the others is not found (DeepSpeed 0.19.8).
        """
        if self._is_sharded:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Let go of all memory but the module's own."""
        self._engine.destroy()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        self._trained.clear()
        self._engine = None
        gc.collect()  # engine and optimizer refer to each other


def _deepspeed_config(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    settings: dict[str, Any] = {
        # Only their product with the number of ranks is ever used, for messages: accumulation
        # and averaging over micro-batches are done in train_step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",  # needs streams
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        # At stage 0 the norm is needed before DeepSpeed's step: clipped here.
        "gradient_clipping": (config.clip_norm or 0.0) if config.zero_stage else 0.0,
        "timers": {"throughput": {"enabled": False}},  # waits for the device in every forward
    }
    if config.precision == "bf16":
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # Gradients of these would be added over the ranks in bf16 at stages 1 and 2, but in
            # fp32 at stage 0: 8 bits are too few for a sum, and stages must not differ.
            "lower_precision_safe_modules": [],
        }
    return settings


def _saved(tensor: Tensor) -> Tensor:
    """A copy on the CPU, fp32 if it is floating point."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
