"""Group normalization for GPUs, run by Triton's interpreter on a CPU, against torch's in fp64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigdet.ops import group_norm
from tests.spawn import run_ranks

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton, which torch's CUDA build brings"
)

# Images, channels, height, width, groups: rows and channels that fill no tile, groups of 1, 2 and
# 64 channels, one row, more parts than a tile has rows.
SHAPES = [
    (2, 6, 7, 5, 3),
    (2, 33, 3, 43, 33),
    (1, 128, 5, 15, 2),
    (2, 64, 1, 1, 32),
    (1, 4, 65, 64, 2),
]
CASES = [(shape, torch.float32, True) for shape in SHAPES]
CASES += [(SHAPES[0], torch.float32, False), (SHAPES[2], torch.bfloat16, True)]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Input and gradient of the output, in a type, and weight and bias in fp32."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = torch.randn(2, *shape[:4], generator=generator)
    x = 5 + x * torch.rand(shape[1], 1, 1, generator=generator)  # far from 0: sums cancel
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return [
        x.to(dtype, memory_format=torch.channels_last),
        grad.to(dtype),  # contiguous
        1 + 0.3 * weight, 0.5 * bias,
    ]  # fmt: skip


def derived(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, normalize: Any) -> list[Tensor]:
    """Output and gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = normalize(*inputs)
    y.backward(grad)
    return [y.detach(), *(tensor.grad for tensor in inputs)]


def in_interpreter() -> list[tuple[Any, list[Tensor], list[Tensor]]]:
    """What the kernels and torch give: the case, and output and gradients of each."""
    found = []
    for shape, dtype, relu in CASES:
        own = sample(shape, dtype)

        def by_kernel(x: Tensor, *of: Tensor, groups: int = shape[4], relu: bool = relu) -> Tensor:
            return group_norm.kernel_group_norm(x, groups, *of, 1e-5, relu)

        def by_torch(x: Tensor, *of: Tensor, groups: int = shape[4], relu: bool = relu) -> Tensor:
            y = F.group_norm(x, groups, *of, 1e-5)
            return F.relu(y) if relu else y

        exact = derived(*(tensor.double() for tensor in own), by_torch)
        found.append(((shape, dtype, relu), derived(*own, by_kernel), exact))
    return found


@needs_triton
def test_the_kernels_give_what_torch_gives_in_fp64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when triton is imported: a new process
    [found] = run_ranks(in_interpreter, 1, tmp_path)
    assert [case for case, _, _ in found] == CASES
    for (shape, dtype, relu), kernel, exact in found:
        assert group_norm._is_for_kernel(kernel[0], shape[4]), shape
        assert kernel[0].dtype == kernel[1].dtype == dtype
        assert kernel[0].is_contiguous(memory_format=torch.channels_last)
        for name, own, other in zip(("y", "x", "weight", "bias"), kernel, exact, strict=True):
            error = (own.double() - other).norm() / other.norm().clamp(min=1e-12)
            # bf16 has 8 bits: a rounding is off by up to 2^-9, of the sign of a result near 0 too.
            limit = 1e-2 if dtype == torch.bfloat16 else 2e-5
            if shape[2:4] == (1, 1) and name == "x":
                continue  # groups of 2 numbers: the gradient is what rounding leaves of 0
            assert error < limit, (shape, dtype, relu, name, float(error))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_without_one(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from bigdet.ops import group_norm_kernel as kernels

    integers = {"num_rows", "num_channels", "chunk", "num_parts", "per_group"}
    tensors = {"x", "y", "grad", "grad_x"}
    for function in (
        kernels._moments, kernels._normalize, kernels._gradient_sums, kernels._gradient,
    ):  # fmt: skip
        constants = {"tile": kernels.TILE, "relu": True}
        types = {
            name: "constexpr" if name in constants else "i32" if name in integers
            else "fp32" if name == "eps" else "*bf16" if name in tensors else "*fp32"
            for name in function.arg_names
        }  # fmt: skip
        known = {name: value for name, value in constants.items() if name in types}
        source = ASTSource(function, signature=types, constexprs=known)
        options = {"enable_fp_fusion": True}
        kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert kernel.metadata.shared < 48 * 1024, function
        assert "bf16" in kernel.asm["ttir"]


def test_without_the_kernels_it_is_torchs_own() -> None:
    x, _, weight, bias = sample((2, 6, 7, 5), torch.float32)
    expected = F.group_norm(x, 3, weight, bias, 1e-5)
    assert torch.equal(group_norm.group_norm(x, 3, weight, bias, 1e-5), expected)
    found = group_norm.group_norm(x, 3, weight, bias, 1e-5, relu=True)
    assert torch.equal(found, expected.clamp(min=0))


@pytest.mark.parametrize(
    ("shape", "groups", "is_known"),
    [((2, 64, 3, 3), 32, True), ((0, 64, 3, 3), 32, False), ((2, 96, 3, 3), 1, False)],
)
def test_what_the_kernels_can_normalize(
    shape: tuple[int, ...], groups: int, is_known: bool
) -> None:
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    assert group_norm._is_for_kernel(x, groups) == is_known
    assert not group_norm._is_for_kernel(x.double(), groups)
    assert not group_norm._is_for_kernel(torch.zeros(2, 64, 3, 2), groups)
