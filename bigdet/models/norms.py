"""Normalization of all layers: batch and group normalization, and what a phase may do with them.

Batch normalization has a mode, set for a whole model by `set_norm_mode`:

| mode | normalizes with | scale and shift | running statistics |
| --- | --- | --- | --- |
| ``live`` | the batch in training, running statistics else | trained | one update per step |
| ``affine`` | running statistics | trained | stay |
| ``fixed`` | running statistics | stay | stay |

Running statistics do not follow every forward pass, as torch's do. A lane is one micro-batch of
one rank; a step has a fixed number of lanes, however many ranks share them. Each layer averages the
batch means and the (unbiased) batch variances of its lanes; the trainer then calls
`update_running_statistics` once per step, which averages over the ranks and moves the running
statistics of all layers by one momentum. So they depend on neither accumulation nor ranks. The mean
of the variances leaves out how far the means of the lanes lie apart: a layer that will be fixed
sees the spread that a lane saw, which is what its weights were trained for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigdet import distributed

Mode = Literal["live", "affine", "fixed"]
Kind = Literal["bn", "gn", "none"]

MOMENTUM = 0.1
"""Weight of a step's statistics in the running ones, as in torch and the papers' code."""
GROUPS = 32
"""Of group normalization, as in its paper and in Detectron."""

_is_collecting = False


@contextmanager
def collect_statistics() -> Iterator[None]:
    """Count the batch statistics of the forward passes inside, and of no others.

    The detector's forward runs in it in training. A forward pass that activation checkpointing
    repeats during backward lies outside, so its statistics are not counted a second time.
    """
    global _is_collecting
    before, _is_collecting = _is_collecting, True
    try:
        yield
    finally:
        _is_collecting = before


class BatchNorm2d(nn.Module):
    """Batch normalization over all positions of a micro-batch, with a mode.

    Statistics are computed in fp32 for bf16 inputs, else in the input's own precision. Parameters
    and saved buffers carry torch's names, so published weights load.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    lane_mean: Tensor
    lane_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Start in mode ``live``, with scale 1 and shift 0; timm passes device and dtype."""
        super().__init__()
        self.eps = eps
        self.mode: Mode = "live"
        self.num_lanes = 0
        ones = torch.ones(num_features, device=device, dtype=dtype)
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(ones.clone())
        self.bias = nn.Parameter(zeros.clone())
        self.register_buffer("running_mean", zeros.clone())
        self.register_buffer("running_var", ones.clone())
        # Averages over the lanes of this step so far.
        self.register_buffer("lane_mean", zeros.clone(), persistent=False)
        self.register_buffer("lane_var", zeros.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)`` as the mode says; dtype and memory format stay."""
        if self.mode == "live" and self.training:
            return self._normalize_with_batch(x)
        if self.mode == "fixed" and x.requires_grad and torch.is_grad_enabled():
            normalized: Tensor = _FixedNorm.apply(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
            return normalized
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def _normalize_with_batch(self, x: Tensor) -> Tensor:
        momentum = 0.0
        if _is_collecting:
            # Momentums 1, 1/2, 1/3, ... make torch's own update the plain average over the lanes:
            # counting costs no kernel of its own.
            self.num_lanes += 1
            momentum = 1.0 / self.num_lanes
        return F.batch_norm(
            x,
            # Passed even when nothing is counted: checkpointing compares what is saved.
            self.lane_mean,
            self.lane_var,
            self.weight,
            self.bias,
            training=True,
            momentum=momentum,
            eps=self.eps,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # torch's; no use for a constant rate
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the layer in the printed model."""
        return f"{len(self.weight)}, mode={self.mode}"


class _FixedNorm(torch.autograd.Function):
    """Normalization by constants that keeps nothing of the size of its input for backward.

    torch's own keeps the input for the gradient of the scale, which fixed layers do not have: that
    is half of what a ResNet-50 keeps for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        zeros = torch.zeros_like(var)
        # The same scale on the gradient, in one pass, whatever the two precisions.
        grad_x = F.batch_norm(grad, zeros, var, weight, zeros, eps=ctx.eps)
        return grad_x, None, None, None, None, None


def make_norm(kind: Kind, channels: int) -> nn.Module:
    """Build the normalization of a convolution's output; ``none`` gives the identity.

    Group normalization has 32 groups where 32 divides the channels, else as many as both allow
    (their greatest common divisor), so that every group has equally many channels.
    """
    if kind == "bn":
        return BatchNorm2d(channels)
    if kind == "gn":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps=1e-5)
    return nn.Identity()


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    norm: Kind,
    *,
    relu: bool = False,
) -> nn.Sequential:
    """Build a convolution that keeps height and width, its normalization and activation.

    The convolution has a bias exactly where no normalization follows. Weights: MSRA (Kaiming
    normal, fan-out), biases zero. Submodules are named ``conv``, ``norm`` (absent for ``none``) and
    ``relu`` (absent without).
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=(norm == "none"))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm != "none":
        layers["norm"] = make_norm(norm, out_channels)
    if relu:
        layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def batch_norms(module: nn.Module) -> list[BatchNorm2d]:
    """List the batch normalization layers of a model, in its order."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm2d)]


def set_norm_mode(module: nn.Module, mode: Mode) -> None:
    """Set what all batch normalization layers do, and whether scale and shift are trained.

    Call it before freezing stages, which fixes the layers in them.
    """
    for layer in batch_norms(module):
        layer.mode = mode
        layer.weight.requires_grad_(mode != "fixed")
        layer.bias.requires_grad_(mode != "fixed")


@torch.no_grad()
def update_running_statistics(module: nn.Module) -> None:
    """Move all running statistics once, by the mean over all lanes of all ranks of this step.

    Every rank calls it after its last micro-batch of a step (one all-reduce of all layers'
    statistics), and all ranks have equal running statistics afterwards.
    """
    layers = [layer for layer in batch_norms(module) if layer.num_lanes]
    if not layers:
        return
    lanes = [layer.lane_mean for layer in layers] + [layer.lane_var for layer in layers]
    flat = distributed.mean_over_ranks(torch.cat(lanes))
    means = list(torch.split(flat, [len(lane) for lane in lanes]))
    running = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    torch._foreach_lerp_(running, means, MOMENTUM)
    discard_statistics(module)


@torch.no_grad()
def discard_statistics(module: nn.Module) -> None:
    """Forget the statistics collected since the last update: those of a skipped step."""
    layers = batch_norms(module)
    if not layers:
        return
    # A momentum of 1 multiplies what was there by 0, and 0 x inf is not a number.
    torch._foreach_zero_([layer.lane_mean for layer in layers])
    torch._foreach_zero_([layer.lane_var for layer in layers])
    for layer in layers:
        layer.num_lanes = 0
