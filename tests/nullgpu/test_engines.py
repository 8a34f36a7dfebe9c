"""Every engine on GPUs that do nothing: what a step of two micro-batches waits for and sends."""

from __future__ import annotations

from typing import Any

import pytest

from bigdet.engine.base import BUCKET_ELEMENTS
from bigdet.planning.cluster import KINDS, Work, state_bytes
from bigdet.training.sizes import FP32_BYTES, ModelSizes
from tests.nullgpu import engines
from tests.ranks.toy import ENGINES
from tests.spawn import run_ranks
from tests.unit.models.test_detector import detector_of

# Of the device, and for one number. ZeRO 1 to 3 ask for the gradient norm and whether it is finite,
# several times, stage 3 for each group of weights that it steps. On one rank they run as ZeRO-0,
# which waits for nothing.
ALONE = (0, 0)
MOST_WAITS = {
    "zero0": (0, 0), "zero1": (3, 4), "zero2": (4, 4), "zero3": (8, 2), "fsdp": (0, 0),
}  # fmt: skip
MOST_LAUNCHES = {"zero0": 2760, "zero1": 2870, "zero2": 2840, "zero3": 3150, "fsdp": 2930}
# DeepSpeed copies flags of ZeRO 1 to 3 from ordinary memory, a byte each.
MOST_PAGEABLE = {"zero0": 0, "zero1": 2, "zero2": 2, "zero3": 5, "fsdp": 0}
KIND_NAMES = dict(zip(ENGINES, KINDS, strict=True))


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
        assert of_rank.keys() == ENGINES.keys() | engines.GRAPHED.keys()
        for name in ENGINES:
            found = of_rank[name]
            syncs, items = MOST_WAITS[name] if len(seen) > 1 else ALONE
            assert found["syncs"] <= syncs, (name, found)
            assert found["waits"] == ({"item": items} if items else {}), (name, found)
            assert found["pageable"] <= (MOST_PAGEABLE[name] if len(seen) > 1 else 0), (name, found)
            # Read late: the gradient norm, and of each micro-batch the regions on objects.
            assert found["to_host"] == 1 + engines.MICRO_BATCHES, (name, found)
            assert found["refused"] == 0, (name, found)
            assert 1000 < found["launches"] <= MOST_LAUNCHES[name], (name, found)


def test_whole_weights_are_laid_out_as_convolutions_read_them(seen: list[dict[str, Any]]) -> None:
    for of_rank in seen:
        for name in ENGINES:
            # Weights in parts are consecutive numbers of flattened tensors. Alone, ZeRO-0 runs.
            is_whole = name == "zero0" or (len(seen) == 1 and name != "fsdp")
            assert (of_rank[name]["copied"] == 0) == is_whole, name


def test_graphs_are_replayed_and_all_else_is_the_same(seen: list[dict[str, Any]]) -> None:
    same = ("nccl", "syncs", "waits", "pageable", "to_device", "to_host", "refused")
    for of_rank in seen:
        for name in engines.GRAPHED:
            graphed, eager = of_rank[name], of_rank[name.removesuffix(", graphs")]
            assert {key: graphed[key] for key in same} == {key: eager[key] for key in same}, name
            assert graphed["in_graphs"] > 400 * engines.MICRO_BATCHES, name
            assert graphed["launches"] < eager["launches"] - 0.8 * graphed["in_graphs"], name


def test_all_ranks_call_the_same_collectives(seen: list[dict[str, Any]]) -> None:
    for name in ENGINES:
        calls = {of_rank[name]["nccl"] for of_rank in seen}
        assert len(calls) == 1, (name, calls)
        assert (calls == {0}) == (len(seen) == 1), (name, calls)


def test_memory_is_what_the_planner_says_and_what_is_on_its_way(seen: list[dict[str, Any]]) -> None:
    ranks = len(seen)
    module = detector_of()
    numbers = sum(parameter.numel() for parameter in module.parameters())
    buffers = sum(buffer.numel() for buffer in module.buffers())
    largest = max(
        sum(p.numel() for part in unit for p in part.parameters()) for unit in module.units
    )
    work = Work(ModelSizes(numbers, numbers, buffers), 2, 1.0, 0.0, 1)
    activations = seen[0]["zero0"]["peak"] - state_bytes("ZeRO-0", ranks, work)
    assert activations > 0
    for name, kind in KIND_NAMES.items():
        planned = activations + state_bytes(kind, ranks, work)
        # Two buckets of gradients, or a unit's weights, gradients and those that are sent.
        sent = 2 * BUCKET_ELEMENTS if name in ("zero1", "zero2") else 3 * largest
        if ranks == 1 and name != "fsdp":
            sent = 0
        for of_rank in seen:
            assert of_rank[name]["peak"] < 1.1 * planned + FP32_BYTES * sent, name
