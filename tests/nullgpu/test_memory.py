"""The planner's memory against torch's own allocator, on a GPU that does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.nullgpu import null_gpu


@pytest.fixture(scope="module")
def found(null_gpu_variables: dict[str, str]) -> dict[str, Any]:
    """What `memory.py` prints."""
    return null_gpu.last_line("tests.nullgpu.memory", null_gpu_variables)


def test_the_simulated_allocator_reserves_what_torch_reserves(found: dict[str, Any]) -> None:
    assert found["allocations"]["simulated"] == found["allocations"]["torch"]


def test_a_step_without_memory_needs_what_a_gpu_needs(found: dict[str, Any]) -> None:
    for name, peaks in found["peaks"].items():
        for simulated, real in zip(peaks["simulated"], peaks["torch"], strict=True):
            # Sorting the points of RoIAlign takes memory that no tensor has.
            kernels = 0 if name == "retinanet" else 34e6
            assert 0.98 * real - kernels <= simulated <= 1.02 * real, name
