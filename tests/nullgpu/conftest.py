"""The null GPU, built once."""

from __future__ import annotations

import pytest

from tests.nullgpu import null_gpu


@pytest.fixture(scope="session")
def null_gpu_variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees null GPUs; NULL_GPUS says how many, else 1."""
    if reason := null_gpu.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nullgpu")
    null_gpu.build(folder)
    return null_gpu.environment(folder)
