"""Normalization of all layers: batch and group normalization, and what a phase may do with them.

Batch normalization has a mode, set for a whole model by `set_norm_mode`:

| mode | normalizes with | scale and shift | running statistics |
| --- | --- | --- | --- |
| ``live`` | the batch in training, else running statistics | trained | one update per step |
| ``sync`` | the batches of all ranks together in training | trained | one update per step |
| ``affine`` | running statistics | trained | stay |
| ``fixed`` | running statistics | stay | stay |

Running statistics do not follow every forward pass, as torch's do. A lane is one micro-batch of
one rank; a step has a fixed number of lanes, however many ranks share them. A forward pass leaves
its mean and (unbiased) variance in each layer, the detector then calls `count_lane`, which adds
them up, and the trainer `update_running_statistics` once per step, which averages over the lanes of
all ranks and moves the running statistics of all layers by one momentum. (A pass that activation
checkpointing repeats leaves what the first one left, and is not counted.) So they depend on neither
accumulation nor ranks. The mean of the variances does not include the variance between the means of
the lanes: a layer that will be fixed has the variance within a lane, which its weights were trained
for. In ``sync`` the lanes that run at the same time on all ranks have the statistics of
their joint batch, so there the number of ranks matters.

Rows of a batch that fill empty slots (`valid_rows`) are normalized but not counted; a lane without
any other row is left out of the averages.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from bigdet import distributed
from bigdet.models.joint_norm import JointNorm
from bigdet.ops.group_norm import group_norm

Mode = Literal["live", "sync", "affine", "fixed"]
Kind = Literal["bn", "gn", "ln", "none"]

MOMENTUM = 0.1
"""Weight of a step's statistics in the running ones, as in torch and the papers' code."""
GROUPS = 32
"""Of group normalization, as in its paper and in Detectron."""


class BatchNorm2d(nn.Module):
    """Batch normalization over all positions of a micro-batch, with a mode.

    Statistics are computed in fp32 for bf16 inputs, else in the input's own precision. Parameters
    and saved buffers carry torch's names, so published weights load.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    mean_sum: Tensor
    var_sum: Tensor
    is_filled: Tensor
    num_filled: Tensor
    rows: Tensor | None = None  # which count, see `valid_rows`

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
        ones = torch.ones(num_features, device=device, dtype=dtype)
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(ones.clone())
        self.bias = nn.Parameter(zeros.clone())
        self.register_buffer("running_mean", zeros.clone())
        self.register_buffer("running_var", ones.clone())
        # What the last pass left, 1 if any row of it counted; their sums over this step's lanes.
        for name in ("batch_mean", "batch_var", "mean_sum", "var_sum"):
            self.register_buffer(name, zeros.clone(), persistent=False)
        self.register_buffer("is_filled", torch.ones(1, device=device), persistent=False)
        self.register_buffer("num_filled", torch.zeros(1, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)`` as the mode says; dtype and memory format are kept."""
        if self.mode in ("live", "sync") and self.training:
            is_joint = self.mode == "sync" and distributed.world_size() > 1
            if self.rows is not None or (is_joint and not x.is_cuda):
                return self._normalize_with_rows(x, self.rows, is_joint)
            return self._normalize_with_batch(x, is_joint)
        if self.mode == "fixed" and x.requires_grad and torch.is_grad_enabled():
            normalized: Tensor = _FixedNorm.apply(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
            return normalized
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def _normalize_with_batch(self, x: Tensor, is_joint: bool) -> Tensor:
        # With a momentum of 1 they become those of this pass. A pass without `valid_rows` is never
        # empty, and a layer has all its passes with them or all without: is_filled stays 1.
        left = (self.batch_mean, self.batch_var)
        if is_joint:
            normalized: Tensor = JointNorm.apply(x, self.weight, self.bias, *left, self.eps)
            return normalized
        return F.batch_norm(
            x, *left, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )

    def _normalize_with_rows(self, x: Tensor, rows: Tensor | None, is_joint: bool) -> Tensor:
        """Normalize by the rows that count, of this rank or of all ranks together.

        The mathematics of torch's SyncBatchNorm in plain operations: any number of rows per rank,
        or none. It keeps more for backward than the fused layers do.

        Args:
            x: ``(N, C, H, W)``.
            rows: ``(N,)`` bool. None: all.
            is_joint: over all ranks.
        """
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        if rows is None:
            rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        assert len(rows) == len(x), (len(rows), len(x))
        is_counted = rows[:, None, None, None]
        add = distributed.sum_with_gradient if is_joint else _identity
        count = (rows.sum() * (x.shape[2] * x.shape[3])).to(values.dtype)
        total = torch.where(is_counted, values, 0).sum(dim=(0, 2, 3))
        sums = add(torch.cat([total, count[None]]))
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        centered = values - mean[:, None, None]
        squares = add(torch.where(is_counted, centered, 0).square().sum(dim=(0, 2, 3)))
        # Without any row at all the others pass as they are: magnified, they could overflow.
        var = torch.where(count > 0, squares / count.clamp(min=1), 1)
        self.batch_mean.copy_(mean.detach())  # 0 without any row
        self.batch_var.copy_(squares.detach() / (count - 1).clamp(min=1))
        self.is_filled.copy_(count > 0)
        scale = self.weight * torch.rsqrt(var + self.eps)
        normalized = centered * scale[:, None, None] + self.bias[:, None, None]
        return normalized.to(x.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # torch's; no use for a constant rate
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the layer in the printed model."""
        return f"{len(self.weight)}, mode={self.mode}"


def _identity(tensor: Tensor) -> Tensor:
    return tensor


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


class GroupNorm(nn.GroupNorm):
    """Group normalization, with torch's names.

    Attributes:
        relu: apply the ReLU that follows as well, which a GPU does in the same pass.
    """

    relu = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``; dtype and memory format are kept."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, relu=self.relu)

    def extra_repr(self) -> str:
        """Describe the layer in the printed model."""
        return f"{super().extra_repr()}, relu={self.relu}"


def take_relu(norm: nn.Module, relu: nn.Module) -> nn.Module:
    """Let group normalization do the ReLU that follows it; return what is left of the ReLU."""
    if isinstance(norm, GroupNorm) and isinstance(relu, nn.ReLU):
        norm.relu = True
        return nn.Identity()
    return relu


def make_norm(kind: Kind, channels: int) -> nn.Module:
    """Build the normalization of a convolution's output; ``none`` gives the identity.

    Group normalization has 32 groups where 32 divides the channels, else as many as both allow
    (their greatest common divisor), so that every group has equally many channels. ``ln`` is
    layer normalization over the channels of each position, with ViTDet's eps of 1e-6.
    """
    if kind == "bn":
        return BatchNorm2d(channels)
    if kind == "gn":
        return GroupNorm(math.gcd(GROUPS, channels), channels, eps=1e-5)
    if kind == "ln":
        norm: nn.Module = LayerNorm2d(channels, eps=1e-6)
        return norm
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
        layers["relu"] = take_relu(layers.get("norm", conv), nn.ReLU(inplace=True))
    return nn.Sequential(layers)


_NORMS: weakref.WeakKeyDictionary[nn.Module, list[BatchNorm2d]] = weakref.WeakKeyDictionary()


def batch_norms(module: nn.Module) -> list[BatchNorm2d]:
    """List the batch normalization layers of a model, in its order."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm2d)]


def _known_norms(module: nn.Module) -> list[BatchNorm2d]:
    """The same, looked for once in each module: a step asks several times, and a model is whole."""
    if module not in _NORMS:
        _NORMS[module] = batch_norms(module)
    return _NORMS[module]


@contextmanager
def valid_rows(module: nn.Module, rows: Tensor | None) -> Iterator[None]:
    """Let only some rows of a batch count in the statistics of a module's forward passes inside.

    Heads run on a number of slots, some of which hold no region.

    Args:
        module: whose batch normalization layers it is for.
        rows: ``(N,)`` bool, which of the N rows count. None: all.
    """
    layers = _known_norms(module)
    before = [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = rows
        yield
    finally:
        for layer, its_rows in zip(layers, before, strict=True):
            layer.rows = its_rows


def set_norm_mode(module: nn.Module, mode: Mode) -> None:
    """Set what all batch normalization layers do, and whether scale and shift are trained.

    Call it before freezing stages, which fixes the layers in them.
    """
    for layer in batch_norms(module):
        layer.mode = mode
        layer.weight.requires_grad_(mode != "fixed")
        layer.bias.requires_grad_(mode != "fixed")


def _live_norms(module: nn.Module) -> list[BatchNorm2d]:
    return [layer for layer in _known_norms(module) if layer.mode in ("live", "sync")]


@torch.no_grad()
def count_lane(module: nn.Module) -> None:
    """Add what the forward pass of a lane left in the layers, all of them, to this step's sums."""
    layers = _live_norms(module)
    if not layers:
        return
    sums = [tensor for layer in layers for tensor in (layer.mean_sum, layer.var_sum)]
    left = [tensor for layer in layers for tensor in (layer.batch_mean, layer.batch_var)]
    torch._foreach_add_(sums, left)
    torch._foreach_add_([layer.num_filled for layer in layers], [x.is_filled for x in layers])


@torch.no_grad()
def update_running_statistics(
    module: nn.Module, momentum: float = MOMENTUM, counts: Tensor | None = None
) -> None:
    """Move all running statistics once, by the mean over all lanes of all ranks of this step.

    Every rank calls it after its last micro-batch of a step (one all-reduce of all layers'
    statistics), and all ranks have equal running statistics afterwards. A layer whose lanes were
    all empty stays as it is. With a momentum of 1 they become that mean.

    Args:
        module: whose batch normalization layers it is for.
        momentum: part of the mean that the statistics take.
        counts: bool, a scalar on their device. False: the statistics of this step are forgotten.
    """
    layers = _live_norms(module)
    if not layers:
        return
    filled = torch.cat([layer.num_filled for layer in layers])
    sums = [layer.mean_sum for layer in layers] + [layer.var_sum for layer in layers]
    flat = distributed.sum_over_ranks(torch.cat([filled.to(sums[0].dtype), *sums]))
    if counts is not None:
        flat = torch.where(counts, flat, 0.0)  # as if all lanes were empty
    filled, *totals = torch.split(flat, [len(layers), *[len(total) for total in sums]])
    running = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    means = torch._foreach_div(totals, list(filled.clamp(min=1).unbind() * 2))
    parts = list((momentum * (filled > 0).to(filled.dtype)).unbind() * 2)
    changes = torch._foreach_mul(torch._foreach_sub(means, running), parts)
    torch._foreach_add_(running, changes)
    discard_statistics(module)


@torch.no_grad()
def discard_statistics(module: nn.Module) -> None:
    """Forget the statistics collected since the last update: those of a skipped step."""
    layers = _live_norms(module)
    if not layers:
        return
    # Those of the last pass too: a momentum of 1 multiplies what was there by 0, and 0 x inf is not
    # a number.
    torch._foreach_zero_(
        [
            tensor
            for x in layers
            for tensor in (x.batch_mean, x.batch_var, x.mean_sum, x.var_sum, x.num_filled)
        ]
    )
