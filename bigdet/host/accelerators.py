"""What a GPU has and can do at most, by its name.

Numbers of NVIDIA's data sheets: H200 SXM, H100 SXM and PCIe, GH200 (96 GB), A100 SXM, A40, A30,
L40S, L4, B200 (DGX B200: 180 GB and 8 TB/s each), GeForce RTX 3090 and 4090 (white papers of GA102
and Ada, appendix A: matrix products with sums in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        memory_gib: as the driver reports it.
        bandwidth: of its memory, bytes per second.
        teraflops: matrix products in bf16 with sums in fp32, without sparsity, 1e12 per second.
    """

    memory_gib: float
    bandwidth: float
    teraflops: float


GPUS = {
    "B200": Gpu(178.4, 8000 * GB, 2250.0),
    "GH200": Gpu(94.5, 4000 * GB, 989.5),
    "H200": Gpu(139.8, 4800 * GB, 989.5),
    "H100 PCIe": Gpu(79.2, 2000 * GB, 756.0),
    "H100": Gpu(79.2, 3350 * GB, 989.5),
    "A100 40GB": Gpu(39.4, 1555 * GB, 312.0),
    "A100": Gpu(79.2, 2039 * GB, 312.0),
    "A40": Gpu(44.4, 696 * GB, 149.7),
    "A30": Gpu(23.5, 933 * GB, 165.0),
    "L40S": Gpu(44.4, 864 * GB, 362.0),
    "L4": Gpu(22.0, 300 * GB, 121.0),
    "RTX 4090": Gpu(23.5, 1008 * GB, 165.2),
    "RTX 3090": Gpu(23.6, 936 * GB, 71.0),
}
"""By name; a name that contains another comes first."""
_VARIANTS = {"NVL", "Ti", "D", "Laptop", "MIG"}
"""Words in the names of other GPUs, or of parts of one, whose peak is lower or higher."""


def short_name(name: str) -> str:
    """Return how a GPU is called on a command line: ``RTX 4090`` is ``rtx4090``."""
    return name.lower().replace(" ", "")


def peak_flops(device_name: str) -> float | None:
    """Return what a GPU computes per second at most, with dense matrix products in bf16.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, such as ``NVIDIA H100 80GB HBM3``.

    Returns:
        None if it is not known.
    """
    padded = f" {device_name.replace('-', ' ')} "
    if _VARIANTS & set(padded.split()):
        return None
    return next((1e12 * gpu.teraflops for name, gpu in GPUS.items() if f" {name} " in padded), None)
