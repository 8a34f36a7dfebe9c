"""Batch normalization over the batches of all ranks on CUDA, without a wait for the device.

torch's ``SyncBatchNorm`` leaves out ranks with an empty batch, for which the host has to know the
counts: three waits a layer in the forward pass. Here no batch is empty. The kernels are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigdet import distributed


class JointNorm(torch.autograd.Function):
    """Normalizes ``(B, C, H, W)`` by the mean and variance of all ranks' batches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        batch_mean: Tensor,
        batch_var: Tensor,
        eps: float,
    ) -> Tensor:
        """Leave the joint mean and unbiased variance in ``batch_mean`` and ``batch_var``."""
        assert x.numel() > 0
        x = _dense(x)
        channels = x.shape[1]
        mean, inverse = torch.batch_norm_stats(x, eps)
        count = torch.full((1,), x.numel() // channels, dtype=mean.dtype, device=x.device)
        of_ranks = distributed.stack_over_ranks(torch.cat([mean, inverse, count]))
        means, inverses, counts = of_ranks.split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, batch_mean, batch_var, 1.0, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.int())
        normalized: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        return normalized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the losses of all ranks together; those of scale and shift are local."""
        x, weight, mean, inverse, counts = ctx.saved_tensors
        grad = _dense(grad)
        total, total_times_x, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse, weight, True, True, True
        )
        totals = distributed.sum_over_ranks(torch.stack([total, total_times_x]))
        grad_x = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse, weight, totals[0], totals[1], counts
        )
        return grad_x, grad_weight, grad_bias, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Give the tensor in channels_last or contiguous memory."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
