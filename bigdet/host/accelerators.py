"""What a GPU can compute at most, by its name."""

from __future__ import annotations

TERAFLOPS = {
    "B200": 2250.0,
    "GH200": 989.5,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""Matrix products in bf16 with sums in fp32, without sparsity, 1e12 per second, from NVIDIA's data
sheets. A name that contains another comes first."""


def peak_flops(device_name: str) -> float | None:
    """Return what a GPU computes per second at most, with dense matrix products in bf16.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, such as ``NVIDIA H100 80GB HBM3``.

    Returns:
        None if it is not known.
    """
    padded = f" {device_name.replace('-', ' ')} "
    return next((1e12 * n for name, n in TERAFLOPS.items() if f" {name} " in padded), None)
