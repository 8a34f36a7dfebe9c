"""Normalization on a GPU: over ranks, and by kernels of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigdet import distributed
from bigdet.models.norms import BatchNorm2d
from bigdet.ops import group_norm
from tests.spawn import run_ranks

pytestmark = pytest.mark.gpu


def normed() -> dict[str, Tensor]:
    """Output, gradients and statistics of this rank's part of a batch in mode ``sync``."""
    device = distributed.device()
    norm = BatchNorm2d(5).to(device)
    norm.mode = "sync"
    torch.manual_seed(0)
    x, grad = torch.randn(2, 6, 5, 4, 3) * 3 + 1
    own = slice(4 * distributed.rank(), 4 + 4 * distributed.rank())  # 4 and 2 images
    part = x[own].to(device, memory_format=torch.channels_last).requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    y = norm(part)
    y.backward(grad[own].to(device, non_blocking=True))
    torch.cuda.set_sync_debug_mode("default")
    assert part.grad is not None
    found = {"y": y, "x": part.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"mean": norm.batch_mean, "var": norm.batch_var}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def test_ranks_normalize_by_their_joint_batch_without_waiting(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = run_ranks(normed, 2, tmp_path, gpus="0,1")
    torch.manual_seed(0)
    x, grad = torch.randn(2, 6, 5, 4, 3, dtype=torch.float32).double() * 3 + 1
    x.requires_grad_()
    weight, bias = torch.ones(5).double().requires_grad_(), torch.zeros(5).double().requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    y.backward(grad)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(torch.cat([one["y"] for one in found]), y, **close)
    torch.testing.assert_close(torch.cat([one["x"] for one in found]), x.grad, **close)
    torch.testing.assert_close(sum(one["weight"] for one in found), weight.grad, **close)
    torch.testing.assert_close(sum(one["bias"] for one in found), bias.grad, **close)
    for one in found:
        torch.testing.assert_close(one["mean"], x.mean((0, 2, 3)), **close)
        torch.testing.assert_close(one["var"], x.var((0, 2, 3)), **close)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_kernels_of_group_norm_give_what_fp64_gives(
    channels: int, relu: bool, exact: torch.device
) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, channels, 45, 67) + 2
    weight, bias = torch.randn(2, channels)
    own = [x.to(exact, memory_format=torch.channels_last), weight.to(exact), bias.to(exact)]
    other = [x.double(), weight.double(), bias.double()]
    for tensor in own + other:
        tensor.requires_grad_()
    y = group_norm.kernel_group_norm(own[0], 32, own[1], own[2], 1e-5, relu)
    y.backward(grad.to(exact))
    expected = group_norm.group_norm(other[0], 32, other[1], other[2], 1e-5, relu=relu)
    expected.backward(grad.double())
    pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(own, other, strict=True))]
    for found, right in pairs:
        assert (found.cpu().double() - right).norm() / right.norm() < 1e-5
