"""Steps and predictions of every detector on the null GPU; prints what was seen as JSON."""

from __future__ import annotations

import os
from typing import Any

import torch

from bigdet import distributed
from bigdet.engine.precision import TotalLoss, autocast
from bigdet.models.detector import Detector
from bigdet.models.norms import GroupNorm
from bigdet.structures import Batch, _map_tensors
from tests.gpu.test_detectors import MODELS, many_images, types_of
from tests.nullgpu import null_gpu, uploads
from tests.unit.models.test_detector import detector_of, scene

GPU = torch.device("cuda", 0)


def pinned(batch: Batch) -> Batch:
    return _map_tensors(batch, lambda tensor: tensor.pin_memory())


def seen() -> dict[str, Any]:
    return {**null_gpu.counts(), "waits": dict(null_gpu.waits)}


def step(detector: Detector, batch: Batch) -> dict[str, Any]:
    """A training step under bf16, the second one."""
    total = TotalLoss(detector.to(GPU).train(), "bf16", GPU)
    for _ in range(2):
        null_gpu.reset()
        total(batch.to(GPU))[0].backward()
    assert all(parameter.is_cuda for parameter in detector.parameters())
    return {**seen(), "suppressions": null_gpu.launches_of("_suppress")}


def prediction(detector: Detector) -> dict[str, Any]:
    detector.to(GPU).eval()
    batch = pinned(scene()).to(GPU)
    null_gpu.reset()
    with autocast(GPU, "bf16"):
        detector(batch)
    return seen()


def group_norms() -> dict[str, Any]:
    """Forward and backward pass of group normalization and ReLU, of a large and a small tensor."""
    norm, found = GroupNorm(32, 64).to(GPU), {}
    norm.relu = True
    for name, side in (("large", 512), ("small", 64)):
        x = torch.empty(2, side, side, 64, dtype=torch.bfloat16, device=GPU).permute(0, 3, 1, 2)
        x.requires_grad_()
        for _ in range(2):  # the first compiles
            null_gpu.reset()
            with autocast(GPU, "bf16"):
                y = norm(x)
            y.backward(y.detach())
        assert y.is_contiguous(memory_format=torch.channels_last)
        kernels = ("_moments", "_normalize", "_gradient_sums", "_gradient")
        found[name] = seen() | {"kernels": [null_gpu.launches_of(kernel) for kernel in kernels]}
    return found


def nccl_limits() -> dict[str, Any]:
    """What NCCL is given where a run may stall for 100 seconds."""
    distributed.start(100.0)
    group = torch.distributed.group.WORLD
    limits = {kind: group._get_backend(torch.device(kind)) for kind in ("cuda", "cpu")}
    return {
        **{kind: backend.options._timeout.total_seconds() for kind, backend in limits.items()},
        **{name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL")},
    }


def main() -> None:
    null_gpu.install()
    found: dict[str, Any] = {}
    for name, config in MODELS.items():
        on_cpu = types_of(detector_of(config), torch.device("cpu"))
        found[name] = {
            "step": step(detector_of(config), pinned(scene())),
            "prediction": prediction(detector_of(config)),
            "other types": [
                f"{part}: {types} instead of {on_cpu[part]}"
                for part, types in types_of(detector_of(config), GPU).items()
                if types != on_cpu[part]
            ],
        }
    detector, batch = many_images()
    found["many images"] = {"step": step(detector, pinned(batch))}
    from tests.nullgpu import graphs  # here, as it imports from this module

    others = {"uploads": uploads.main(), "NCCL": nccl_limits(), "group norm": group_norms()}
    others |= {"graphs": graphs.main(), "graph_memory": graphs.reserved()}
    null_gpu.print_and_leave({"detectors": found, **others})


if __name__ == "__main__":
    main()
