"""What a micro-batch is computed in, the same in all engines: autocast, loss scale, total loss.

Weights, gradients and their sums over ranks are fp32 whatever the precision (but what is sent of
them need not be: `engine.gather_precision`, `engine.reduce_precision`); under bf16 and fp16 torch's
autocast casts the inputs of convolutions and matrix products, and nothing else. On CUDA it
would also turn what normalizations, nearest upsampling, softmax and sums give into fp32, which is
twice the memory (R50 with GN: 25 GiB instead of 11). They compute in fp32 anyway and keep their
input's type here, as they do on a CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigdet import distributed
from bigdet.config.engine import Precision

_HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
"""Both as in torch's GradScaler."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return a context in which a module with fp32 weights runs in the precision of a run."""
    dtype = _HALF_TYPES.get(precision)
    if dtype is not None and device.type == "cuda":
        _keep_types()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


KEPT = (
    "softmax.int",
    "sum",
    "sum.dim_IntList",
    "upsample_nearest2d",
    "upsample_nearest2d.vec",
)
"""What gives its input's type under autocast on CUDA, for the rest of the process; the kernels
accumulate in fp32. Normalizations too, whose scale and shift need a cast."""


@functools.cache
def _keep_types() -> Any:
    """Make autocast on CUDA leave the types that it leaves on a CPU; once per process."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Oo]verriding a previously registered kernel.*")
        for name in KEPT:
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCUDA")
        library.impl("group_norm", _group_norm, "AutocastCUDA")
        library.impl("layer_norm", _layer_norm, "AutocastCUDA")
    return library  # what it changed ends with it


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return torch.group_norm(x, num_groups, _as(x, weight), _as(x, bias), eps, cudnn_enabled)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return torch.layer_norm(x, shape, _as(x, weight), _as(x, bias), eps, cudnn_enabled)


def _as(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Cast scale or shift to the type of the input: CUDA has no kernel for two types."""
    return None if parameter is None else parameter.to(x.dtype)


ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
"""Layers whose weights and biases autocast casts whenever it uses them. Not classes derived from
them, which may do anything with their parameters."""


def rounded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that autocast casts wherever they are used.

    So it makes no difference to what is computed whether they are rounded before or after they are
    sent. Call it before an engine wraps the module: engines change the classes of layers.
    """
    own: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for layer in module.modules():
        own[type(layer) in ROUNDED] += layer.parameters(recurse=False)
    elsewhere = {id(parameter) for parameter in own[False]}
    return [parameter for parameter in own[True] if id(parameter) not in elsewhere]


class TotalLoss(nn.Module):
    """A module's losses under autocast, and their sum. Engines wrap this, not the module itself.

    Args:
        module: gives a dict of scalar losses for a batch.
        precision: of convolutions and matrix products.
        device: of the module.
    """

    def __init__(self, module: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        assert any(p.requires_grad for p in module.parameters()), "no parameter is trained"
        self.module = module
        self._precision, self._device = precision, device

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module on a batch.

        Returns:
            The sum of the losses, for the backward pass, and all losses with it, detached.
        """
        with autocast(self._device, self._precision):
            losses: dict[str, Tensor] = self.module(batch)
        total = torch.stack(list(losses.values())).sum()
        seen = {"total": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}
        # A loss can be infinite where its gradient is not (through a masked branch). The verdict
        # on a step is taken from the gradient norm, which all ranks know, so such a loss must
        # reach it: as NaN in all gradients. Costs neither a collective nor a wait for the device.
        return total * torch.where(torch.isfinite(total.detach()), 1.0, torch.nan), seen


def lane_losses(seen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the losses of the M micro-batches of a step together by name: ``(M,)`` in fp32."""
    return {name: torch.stack([losses[name] for losses in seen]).float() for name in seen[0]}


class LossScale:
    """The dynamic loss scale of fp16, whose gradients reach neither below 6e-8 nor above 65504.

    Halved by each step that overflows, doubled after 2000 steps without.

    Attributes:
        is_used: only for fp16.
        value: what the next losses are multiplied by; stays 1 for bf16 and fp32.
    """

    def __init__(self, precision: Precision) -> None:
        self.is_used = precision == "fp16"
        self.value = INITIAL_SCALE if self.is_used else 1.0
        self._good_steps = 0

    def update(self, is_finite: bool, losses: dict[str, Tensor]) -> bool:
        """Update the scale after a step, on all ranks (a collective after a bad step of fp16).

        Args:
            is_finite: the gradient norm is, on all ranks.
            losses: of this rank's micro-batches, by name.

        Returns:
            True if the step failed because the scale was too high.
        """
        if not self.is_used:
            return False
        if is_finite:
            self._good_steps += 1
            if self._good_steps == GROWTH_STEPS:
                self.value, self._good_steps = 2 * self.value, 0
            return False
        is_loss_finite = bool(torch.isfinite(losses["total"]).all())
        if distributed.any_rank(not is_loss_finite) or self.value == 1:
            return False
        self.value, self._good_steps = self.value / 2, 0
        return True

    def state(self) -> dict[str, float]:
        """What a resume needs; empty where no scale is used."""
        return {"value": self.value, "good_steps": self._good_steps} if self.is_used else {}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from the state that rank 0 has, or start anew if it has none. Collective."""
        state = distributed.broadcast_object(state)
        self.value = state.get("value", INITIAL_SCALE) if self.is_used else 1.0
        self._good_steps = int(state.get("good_steps", 0)) if self.is_used else 0
