"""The null GPU in Python: how it is built, and stand-ins for what needs cuDNN or values.

In a process that was started with it (`environment`), ``install()`` comes before the first use of
CUDA. Results mean nothing; launches, waits, copies, devices and types are those of a real GPU.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

COUNTERS = (
    "launches", "syncs", "to_device", "on_side", "to_host", "pageable", "refused", "in_graphs",
)  # fmt: skip
waits: collections.Counter[str] = collections.Counter()
"""How often the host has waited for the device's answer, by operation."""
_libraries: list[torch.library.Library] = []


def missing() -> str:
    """Say what is missing to build it; empty if nothing is."""
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if shutil.which("g++") is None:
        return "no g++"
    return "" if _headers() else "no headers of cudart, which torch's CUDA wheels bring"


def _headers() -> list[Path]:
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return [path.parent for path in sorted(packages.glob("*/include/cuda_runtime_api.h"))]


def build(folder: Path) -> None:
    """Compile the library into a folder."""
    source = Path(__file__).parent
    subprocess.run(
        [
            "g++", "-O1", "-shared", "-fPIC", "-std=c++17", "-w", f"-I{source}",
            f"-I{_headers()[0]}", str(source / "null_gpu.cpp"), "-o", str(folder / "libnull.so"),
            "-ldl",
        ],
        check=True,
    )  # fmt: skip
    for name in ("libcuda.so", "libcuda.so.1"):
        (folder / name).symlink_to("libnull.so")


def environment(folder: Path) -> dict[str, str]:
    """Variables with which a process sees the GPU."""
    library = str(folder / "libnull.so")
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_PRELOAD": library,
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }


def last_line(module: str, variables: dict[str, str]) -> dict[str, Any]:
    """Run a module with these variables, and return the JSON object in the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def print_and_leave(found: dict[str, Any]) -> NoReturn:
    """Print what `last_line` reads, and end at once.

    An ordinary end aborts now and then on a busy machine: autograd's thread may not yet have thrown
    away what the last backward pass left, for which it needs the interpreter.
    """
    print(json.dumps(found), flush=True)
    os._exit(0)


def counts() -> dict[str, int]:
    """Return the counters since the last ``reset``, and the waits of stand-ins among them."""
    values = (ctypes.c_long * len(COUNTERS))()
    ctypes.CDLL(None).null_counts(values)
    return dict(zip(COUNTERS, values, strict=True))


def reset() -> None:
    """Set all counters to 0."""
    ctypes.CDLL(None).null_reset()
    waits.clear()


def launches_of(part: str) -> int:
    """Return how many kernels with this part in their name were launched."""
    return int(ctypes.CDLL(None).null_launches_of(part.encode()))


def _launch(name: str, count: int = 1) -> None:
    ctypes.CDLL(None).null_launch(name.encode(), count)


def _format(*tensors: Tensor) -> torch.memory_format:
    """The format that cuDNN chooses: channels_last if any tensor has it; it copies others."""
    dense = torch.channels_last
    is_last = [t.is_contiguous(memory_format=dense) and not t.is_contiguous() for t in tensors]
    return dense if any(is_last) else torch.contiguous_format


def _sides(x: Tensor, w: Tensor, padding: list, stride: list, dilation: list) -> list[int]:
    return [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (w.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]


def _convolution(x, w, padding, stride, dilation, groups, *_):
    assert x.dtype == w.dtype, (x.dtype, w.dtype)
    chosen = _format(x, w)
    x, w = x.contiguous(memory_format=chosen), w.contiguous(memory_format=chosen)
    _launch("convolution")
    shape = [len(x), len(w), *_sides(x, w, padding, stride, dilation)]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=chosen)


def _transposed(x, w, padding, output_padding, stride, dilation, groups, *_):
    assert x.dtype == w.dtype, (x.dtype, w.dtype)
    sides = [
        (x.shape[i + 2] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (w.shape[i + 2] - 1)
        + output_padding[i]
        + 1
        for i in (0, 1)
    ]
    chosen = _format(x, w)
    x, w = x.contiguous(memory_format=chosen), w.contiguous(memory_format=chosen)
    _launch("convolution")
    shape = [len(x), w.shape[1] * groups, *sides]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=chosen)


def _convolution_backward(grad, x, w, bias_sizes, *options):
    wanted = options[-1]
    chosen = _format(x, w)
    grad, x, w = (tensor.contiguous(memory_format=chosen) for tensor in (grad, x, w))
    _launch("convolution backward", sum(wanted[:2]))
    grad_x = torch.empty_like(x) if wanted[0] else None
    grad_w = torch.empty_like(w) if wanted[1] else None
    return grad_x, grad_w, grad.sum((0, 2, 3)) if wanted[2] else None


def _batch_norm(x, w, b, mean, var, training, momentum, eps):
    _launch("batch norm")
    saved = [torch.empty(x.shape[1], device=x.device) for _ in range(2)]
    return torch.empty_like(x), *saved, torch.empty(0, dtype=torch.uint8, device=x.device)


def _batch_norm_backward(x, grad, w, *_):
    _launch("batch norm backward")
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)


def _item(tensor: Tensor) -> float | bool:
    """1 for a number; for a flag no: those of DeepSpeed say that a gradient is not finite."""
    waits["item"] += 1
    if tensor.dtype in (torch.bool, torch.uint8):
        return False if tensor.dtype == torch.bool else 0
    return 1.0 if tensor.is_floating_point() else 1


def _nonzero(tensor: Tensor) -> Tensor:
    waits["nonzero"] += 1
    shape = min(20, tensor.numel()), tensor.dim()
    return torch.zeros(shape, dtype=torch.int64, device=tensor.device)


def _bincount(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    waits["bincount"] += 1
    return torch.zeros(max(minlength, 1), dtype=torch.int64, device=tensor.device)


def install() -> None:
    """Put stand-ins in place of operations that need cuDNN, or values that are not there."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for name, function in {
        "cudnn_convolution": _convolution,
        "cudnn_convolution_transpose": _transposed,
        "convolution_backward": _convolution_backward,
        "cudnn_batch_norm": _batch_norm,
        "cudnn_batch_norm_backward": _batch_norm_backward,
        "_local_scalar_dense": _item,
        "nonzero": _nonzero,
        "bincount": _bincount,
    }.items():
        library.impl(name, function, "CUDA")
