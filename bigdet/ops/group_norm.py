"""Group normalization, with a ReLU where one follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigdet.ops.nms import HAS_TRITON

FEWEST_NUMBERS = 2**25
"""Of a tensor that is worth the kernels. To launch them costs the host about twice as much as
torch's own, while they read and write 8 tensors instead of 13 where a ReLU follows: 0.1 ms less
for so many numbers in bf16."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, relu: bool = False
) -> Tensor:
    """Normalize the channels of each group of each image; dtype and memory format are kept.

    On a GPU with Triton, large tensors in channels_last memory are read and written as they lie, by
    kernels that apply the ReLU as well; torch 2.11 would copy them to contiguous memory and back.

    Args:
        x: ``(N, C, H, W)``.
        num_groups: divides C.
        weight: ``(C,)`` scale.
        bias: ``(C,)`` shift.
        eps: added to the variance.
        relu: set negative results to 0.
    """
    is_large = x.numel() >= FEWEST_NUMBERS
    if x.is_cuda and HAS_TRITON and is_large and _is_for_kernel(x, num_groups):
        return kernel_group_norm(x, num_groups, weight, bias, eps, relu)
    normalized = F.group_norm(x, num_groups, weight, bias, eps)
    return F.relu_(normalized) if relu else normalized


def kernel_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """The same as ``group_norm`` with Triton, for what `_is_for_kernel` accepts."""
    from bigdet.ops.group_norm_kernel import FusedGroupNorm

    normalized: Tensor = FusedGroupNorm.apply(x, num_groups, weight, bias, eps, relu)
    return normalized


def _is_for_kernel(x: Tensor, num_groups: int) -> bool:
    """Whether the kernels can normalize a tensor; torch.compile fuses its own."""
    is_laid_out = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    is_aligned = 64 % (x.shape[1] // num_groups) == 0  # no group crosses the edge of a tile
    is_known = is_laid_out and is_aligned and x.dtype in _TYPES and x.numel() > 0
    return is_known and not torch.compiler.is_compiling()
