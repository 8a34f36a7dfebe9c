"""Memory and time of a phase on GPUs that are not there, from a simulated step.

**Memory** of one of n GPUs: what `simulated.simulate` allocates, with weights, gradients and
optimizer state divided as the engine divides them (`cluster.py`), and what engines need to send and
gather them, in fp32: ZeRO-0 a bucket of gradients, ZeRO-1 and 2 two of them and one of weights, its
stage 3 two of gathered weights (of each kind one holds the largest tensor, which is never cut),
FSDP2 two units of weights and two of gradients. Autocast's bf16 copies of matrices are counted
whole, although FSDP2 has none where it gathers bf16, its default, and ZeRO-3 none of linear layers:
there up to two bytes per weight too many. On top of what is allocated come

- what the allocator reserves but does not use (`allocator.py`), with segments of fixed size: less
  with ``device.expandable_segments``,
- the CUDA context: 287 MB after the first kernels (PyTorch pull request 86509, lazy loading),
- NCCL's buffers: 688 MB for a group of more than two GPUs, 544 MB for two (4 A100 with NVLink,
  NVIDIA/nccl issue 964); both together are 0.98 GB, and 1.06 GB was seen on 8 H100 (issue 1685).

**Time** is an estimate, a roofline: each kernel takes the time of its floating-point operations or
of the bytes that it reads and writes, whichever is longer, at a share of the GPU's peak. It is
about the GPU alone: small kernels may wait for the host, whose launches are counted. Rather a lower
bound: detectron2 published five to seven times as much for its ViTDets on A100 (one image per GPU,
attention that is not fused, 64 GPUs), `tests/published_memory.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigdet.engine.averaging import SENT_ELEMENTS
from bigdet.engine.base import BUCKET_ELEMENTS
from bigdet.host.accelerators import GPUS, Gpu, short_name
from bigdet.planning.simulated import Step
from bigdet.training.sizes import BF16_BYTES, FP32_BYTES, ModelSizes

CONTEXT_BYTES = 287_047_680
NCCL_BYTES = {1: 0, 2: 544_000_000}
"""By number of GPUs; `NCCL_MANY` for more."""
NCCL_MANY = 688_000_000
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.52, 0.9
"""Of the peaks: matrix products of the sizes of detectors, and kernels that only move data."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, in the order in which they add up.

    Attributes:
        rest: activations and temporary tensors.
        sending: buckets and gathered weights.
        unused: reserved by the allocator, not allocated.
    """

    weights: float
    gradients: float
    optimizer: float
    rest: float
    sending: float
    unused: float
    context: float
    nccl: float

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` would report."""
        return self.weights + self.gradients + self.optimizer + self.rest + self.sending

    @property
    def total(self) -> float:
        """What the GPU needs."""
        return self.allocated + self.unused + self.context + self.nccl


def find_gpus(text: str) -> dict[str, Gpu]:
    """Read ``h200,rtx4090``.

    Raises:
        ValueError: a name is not known.
    """
    known = {short_name(name): name for name in GPUS}
    names = [short_name(name) for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--device: found {unknown[0]}, expected one of {', '.join(known)}, or several with "
            f"commas."
        )
    return {known[name]: GPUS[known[name]] for name in names}


def stage_of(kind: str) -> int:
    """Return the stage of ZeRO that divides as much as this engine."""
    return 3 if kind == "FSDP2" else int(kind[-1])


def memory_of(
    step: Step,
    kind: str,
    gpus: int,
    sizes: ModelSizes,
    over: int,
    *,
    shares_frozen: bool = False,
) -> Memory:
    """Return the memory of each of some GPUs in training.

    Args:
        step: simulated on one GPU.
        kind: one of ``cluster.KINDS``; makes no difference on one GPU.
        gpus: number of GPUs, n.
        sizes: of the model.
        over: number of GPUs that share what the engine divides: n, or those of a host.
        shares_frozen: all GPUs share a frozen backbone; else each has it whole.
    """
    stage = stage_of(kind) if gpus > 1 else 0
    parts = [min(gpus, over) if stage >= first else 1 for first in (3, 2, 1)]
    frozen = BF16_BYTES * sizes.frozen
    weights = (step.weights - frozen) / parts[0] + frozen / (gpus if shares_frozen else 1)
    gradients = step.gradients / parts[1]
    copies = step.gradients if stage in (1, 2) else 0  # DeepSpeed updates a copy
    optimizer = (step.state + copies) / parts[2]
    fixed = step.weights + step.state
    if stage >= 2:  # gradients leave while the backward pass frees activations
        passes = max(step.forward, step.backward - step.gradients) - fixed
    else:
        passes = max(step.forward, step.backward) - fixed - step.gradients
    updating = (step.optimizer - fixed - step.gradients) / parts[2]
    sending = _sending(kind, gpus, step, sizes)
    return Memory(
        weights,
        gradients,
        optimizer,
        max(passes, updating - sending, 0.0),
        sending,
        step.reserved - step.peak,
        CONTEXT_BYTES,
        NCCL_BYTES.get(gpus, NCCL_MANY),
    )


def _sending(kind: str, gpus: int, step: Step, sizes: ModelSizes) -> float:
    """Return the bytes of buckets and gathered weights."""
    if gpus == 1:
        return 0.0
    if kind == "FSDP2":
        return 4.0 * FP32_BYTES * step.largest_unit
    if kind == "ZeRO-3":
        largest = step.largest_tensor
        return 2.0 * FP32_BYTES * (largest + min(largest, BUCKET_ELEMENTS))
    if kind == "ZeRO-0":  # the part of a bucket whose gradients are still to come
        return float(FP32_BYTES * min(sizes.trained, SENT_ELEMENTS + step.largest_tensor))
    return 3.0 * FP32_BYTES * min(sizes.trained, BUCKET_ELEMENTS)


def gpu_seconds(step: Step, gpu: Gpu) -> float:
    """Estimate the time of a step's kernels on a GPU, in bf16 or fp16."""
    speed, bandwidth = COMPUTE_SHARE * 1e12 * gpu.teraflops, BANDWIDTH_SHARE * gpu.bandwidth
    return sum(max(flops / speed, moved / bandwidth) for flops, moved in step.costs)


def most_images(images: tuple[int, int], totals: tuple[float, float], room: float) -> int:
    """Return how many images of a micro-batch fit: memory grows linearly with them.

    Args:
        images: two numbers of images, rising.
        totals: bytes that they need.
        room: bytes of the GPU.
    """
    rate = (totals[1] - totals[0]) / (images[1] - images[0])
    left = room - (totals[0] - rate * images[0])
    return max(0, math.floor(left / rate)) if rate > 0 else 0
