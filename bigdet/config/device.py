"""How CUDA computes and keeps memory; without effect on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """How CUDA computes and keeps memory; without effect on a CPU."""

    tf32: bool = True
    """What is computed in fp32 on tensor cores: numbers keep 10 of 23 bits in matrix products and
    convolutions, as published detectors were trained; up to 8 times as fast."""
    cudnn_benchmark: bool | None = None
    """In training, cuDNN tries its convolutions on each new shape of images and keeps the fastest.
    None: where canvases have one or two shapes (``direct``, ``jitter``, ``pad_to: two_shapes``),
    since trying takes longer than it gains where each step has another shape."""
    expandable_segments: bool = True
    """Memory is taken in pieces that grow, so that images of many sizes leave no gaps. A variable
    PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF that is set goes before."""
    cuda_graphs: bool = False
    """In phases whose canvases have one or two shapes (``direct``, ``jitter``, ``pad_to:
    two_shapes``), backbone, FPN and RPN (or RetinaNet's) head are recorded as CUDA graphs and
    replayed: half as many launches in a step, for GPUs that wait for their host. The memory of
    their backward pass is kept between steps, and ``memory`` in the log does not count it. Ranks
    exchange the gradients of these parts after their backward pass, not during it."""
