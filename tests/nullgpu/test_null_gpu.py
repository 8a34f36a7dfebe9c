"""Every detector on a GPU that does nothing: what a step launches, copies and waits for.

Where this fails after a change, the change costs time on every GPU: a wait for the device, a copy
from ordinary memory, a type that is twice as large, more launches. Results are not tested here.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.nullgpu import null_gpu

# Seen with torch 2.15, and a twentieth more; R-CNNs have 16 to 32 channels, as in other tests.
MOST_LAUNCHES = {
    "mask_rcnn": 1360,
    "faster_rcnn, giou": 1180,
    "faster_rcnn, vgg16": 750,
    "mask_rcnn, gn": 1610,
    "cascade_mask_rcnn": 1920,
    "cascade_rcnn, mmdet": 1680,
    "keypoint_rcnn": 1380,
    "mask_rcnn, swin_t": 2610,
    "retinanet": 1360,
    "many images": 1440,
}


@pytest.fixture(scope="module")
def printed(null_gpu_variables: dict[str, str]) -> dict[str, Any]:
    """What `run.py` prints."""
    return null_gpu.last_line("tests.nullgpu.run", null_gpu_variables)


@pytest.fixture
def seen(printed: dict[str, Any]) -> dict[str, Any]:
    """What a step and a prediction of each detector did."""
    detectors: dict[str, Any] = printed["detectors"]
    return detectors


def test_a_step_waits_for_nothing_and_copies_from_page_locked_memory(seen: dict[str, Any]) -> None:
    assert seen.keys() == MOST_LAUNCHES.keys()
    for name, found in seen.items():
        step = found["step"]
        assert step["syncs"] == step["pageable"] == 0, name
        assert step["waits"] == {}, name
        # The number of regions on objects, read when the box head's work is queued, without a wait
        # for that. What else a step needs to know, the batch says.
        assert step["to_host"] == (name != "retinanet"), name


def test_a_prediction_waits_at_most_twice(seen: dict[str, Any]) -> None:
    for name, found in seen.items():
        if name == "many images":
            continue
        prediction = found["prediction"]
        assert prediction["pageable"] == 0, name
        # For the numbers of candidates (but in RetinaNet) and of detections.
        assert prediction["waits"] == ({} if name == "retinanet" else {"nonzero": 1}), name
        assert prediction["syncs"] == prediction["to_host"] == 1, name


def test_a_step_launches_no_more_than_it_did(seen: dict[str, Any]) -> None:
    found = {name: of["step"]["launches"] for name, of in seen.items()}
    assert {name: n for name, n in found.items() if n > MOST_LAUNCHES[name]} == {}
    assert min(found.values()) > 500  # they are counted


def test_suppression_is_one_launch_also_of_many_images(seen: dict[str, Any]) -> None:
    for name, found in seen.items():
        assert found["step"]["suppressions"] == (name != "retinanet"), name
        assert found["step"]["refused"] == 0, name


def test_group_norm_of_large_tensors_is_four_kernels_with_the_relu(printed: dict[str, Any]) -> None:
    large, small = printed["group norm"]["large"], printed["group norm"]["small"]
    # _gradient is in the name of _gradient_sums. There are also the sum over images and parts of
    # the gradients of scale and shift, and the additions of three gradients to those before.
    assert large["kernels"] == [1, 1, 1, 2]
    assert large["launches"] == 8
    assert large["refused"] == large["syncs"] == 0
    assert small["kernels"] == [0, 0, 0, 0]


def test_graphs_of_two_shapes_launch_the_same_kernels_and_deliver_the_same_gradients(
    printed: dict[str, Any],
) -> None:
    for name, found in printed["graphs"].items():
        eager, graphed = found["eager"], found["graphed"]
        for number, (one, other) in enumerate(zip(eager, graphed, strict=True)):
            is_first = number < 2  # of its shape: warm-ups and recordings
            assert other["gradients"] == one["gradients"], name
            assert other["delivered"] == one["delivered"] == sorted(one["gradients"]), name
            assert other["waits"] == {} == one["waits"], name
            assert other["refused"] == other["pageable"] == 0, name
            assert (other["syncs"] > 0) == is_first, name
            assert 400 < other["in_graphs"] < one["launches"], name
            if not is_first:
                # Two replays, and copies of inputs and gradients to and from where they happen.
                more = other["launches"] + other["in_graphs"] - one["launches"]
                assert 0 <= more < 10, (name, more)
        assert {step["in_graphs"] for step in graphed[:2]} == {graphed[2]["in_graphs"]}


def test_graphs_of_several_shapes_share_their_memory(printed: dict[str, Any]) -> None:
    one, two, three = printed["graph_memory"]
    # Apart from the copies of inputs and outputs, 1 of 9 maps here each: 64 MiB in fp32.
    assert one > 9 * (64 << 20)
    assert max(two - one, three - two) < 4 * (64 << 20)


def test_activations_have_the_types_that_they_have_on_a_cpu(seen: dict[str, Any]) -> None:
    assert [(name, of["other types"]) for name, of in seen.items() if of.get("other types")] == []


@pytest.mark.parametrize("workers", ["0 workers", "1 workers"])
def test_the_next_batches_are_copied_ahead_from_page_locked_memory(
    printed: dict[str, Any], workers: str
) -> None:
    found = printed["uploads"][workers]
    for number, copies in enumerate(found["copies"]):
        # 4 for each of 3 micro-batches. In the first step also those of the second step's first.
        assert copies["on_side"] == copies["to_device"] == 12 + 4 * (number == 0)
        assert copies["pageable"] == copies["syncs"] == copies["launches"] == 0
    assert found["are same"]  # images, and what the stream has counted, as without a thread
    assert found["dropped"] > 0
    assert found["most threads"] == 1
    assert found["threads left"] == 0


def test_what_fails_in_the_thread_is_raised_by_the_step(printed: dict[str, Any]) -> None:
    expected = {"first": 3, "message": "000000.tar: cut off", "threads left": 0}
    assert printed["uploads"]["failure"] == expected


def test_nccl_ends_a_rank_a_minute_after_the_watchdog_would(printed: dict[str, Any]) -> None:
    assert printed["NCCL"] == {
        "cuda": 160.0, "cpu": 1800.0, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "160",
    }  # fmt: skip
