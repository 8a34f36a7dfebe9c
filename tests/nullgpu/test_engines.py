"""Every engine on GPUs that do nothing: what a step of two micro-batches waits for and sends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.nullgpu import engines
from tests.ranks.toy import ENGINES
from tests.spawn import run_ranks

# Of the device, and for one number. One of the numbers for each micro-batch is that of regions on
# objects. ZeRO 1 to 3 ask for the gradient norm up to four times; the other engines let the host
# read it when it has launched the next step.
MOST_WAITS = {
    "zero0": (0, 2), "zero1": (3, 6), "zero2": (4, 6), "zero3": (7, 4), "fsdp": (0, 2),
}  # fmt: skip
MOST_LAUNCHES = {"zero0": 2760, "zero1": 2970, "zero2": 2990, "zero3": 3100, "fsdp": 2930}
# DeepSpeed copies two flags of ZeRO 1 to 3 from ordinary memory, a byte each.
MOST_PAGEABLE = {"zero0": 0, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp": 0}


@pytest.fixture(scope="module", params=[1, 2])
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    null_gpu_variables: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """What each rank saw of each engine."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**null_gpu_variables, "NULL_GPUS": "2"}.items():
            patch.setenv(name, value)
        return run_ranks(engines.steps, request.param, folder, gpus="0,1", timeout_seconds=580)


def test_a_step_waits_and_launches_no_more_than_it_did(seen: list[dict[str, Any]]) -> None:
    for of_rank in seen:
        assert of_rank.keys() == ENGINES.keys()
        for name, found in of_rank.items():
            syncs, items = MOST_WAITS[name]
            assert found["syncs"] <= syncs, (name, found)
            assert found["waits"] == {"item": items}, (name, found)
            assert found["pageable"] <= MOST_PAGEABLE[name], (name, found)
            assert found["to_host"] == 1, (name, found)  # the norm, to page-locked memory
            assert found["refused"] == 0, (name, found)
            assert 1000 < found["launches"] <= MOST_LAUNCHES[name], (name, found)


def test_all_ranks_call_the_same_collectives(seen: list[dict[str, Any]]) -> None:
    for name in ENGINES:
        calls = {of_rank[name]["nccl"] for of_rank in seen}
        assert len(calls) == 1, (name, calls)
        assert len(seen) == 1 or calls != {0}, name
