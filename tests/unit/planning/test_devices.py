import dataclasses

import pytest

from bigdet.config.load import load_config
from bigdet.host.accelerators import GPUS, Gpu
from bigdet.planning import device_report
from bigdet.planning.devices import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    CONTEXT_BYTES,
    NCCL_MANY,
    find_gpus,
    gpu_seconds,
    memory_of,
    most_images,
)
from bigdet.planning.scaling import scale
from bigdet.planning.simulated import Step, simulate
from bigdet.training.sizes import ModelSizes, model_sizes

SIZES = ModelSizes(parameters=1000, trained=1000, buffers=0)
# 4000 bytes of weights and gradients, 8000 of AdamW, 50,000 of activations at the end of forward.
STEP = Step(
    forward=62_000, backward=63_000, optimizer=18_000, reserved=70_000, weights=4000,
    gradients=4000, state=8000, largest_unit=300, largest_tensor=100, costs=[(2e12, 1e9), (0, 3e9)],
)  # fmt: skip
TINY = [
    "configs/quickstart.yaml", "model.width=16", "model.fc_width=16", "engine.precision=bf16",
    "phases.pretrain.resize.size=320", "phases.pretrain.images_per_step=null",
]  # fmt: skip


def test_memory_of_one_gpu_is_what_was_simulated():
    for kind in ("ZeRO-0", "ZeRO-2", "FSDP2"):
        memory = memory_of(STEP, kind, 1, SIZES, 1)
        assert memory.allocated == 63_000
        assert (memory.rest, memory.sending) == (63_000 - 16_000, 0)
        assert memory.total == 63_000 + (70_000 - 63_000) + CONTEXT_BYTES


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # weights, gradients, optimizer, sent
        ("ZeRO-0", (4000, 4000, 8000, 4000)),
        ("ZeRO-1", (4000, 4000, 12_000 / 4, 12_000)),  # a copy of the weights is updated
        ("ZeRO-2", (4000, 1000, 12_000 / 4, 12_000)),
        ("ZeRO-3", (1000, 1000, 8000 / 4, 4 * 400)),
        ("FSDP2", (1000, 1000, 8000 / 4, 4 * 1200)),
    ],
)
def test_what_an_engine_shares_is_divided(kind: str, expected: tuple[float, ...]):
    memory = memory_of(STEP, kind, 4, SIZES, 4)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.sending) == expected
    # With gradients that leave at once, what forward keeps is the most; else all of the peak.
    assert memory.rest == (50_000 if kind in ("ZeRO-2", "ZeRO-3", "FSDP2") else 47_000)
    assert memory.nccl == NCCL_MANY
    # On 8 hosts of 4 GPUs, each host with a whole copy.
    assert memory_of(STEP, kind, 32, SIZES, 4).allocated == memory.allocated


def test_zero_3_gathers_a_tensor_whole_however_large_it_is():
    step = dataclasses.replace(STEP, largest_tensor=50_000_000)
    # Weights and gradients: 50 million numbers, and a bucket of 10 million, 4 bytes each.
    assert memory_of(step, "ZeRO-3", 4, SIZES, 4).sending == 2 * 4 * 60_000_000


def test_an_update_that_takes_more_than_the_activations_counts():
    step = dataclasses.replace(STEP, forward=13_000, backward=17_000, optimizer=24_000)
    assert memory_of(step, "ZeRO-0", 1, SIZES, 1).allocated == 24_000


def test_time_is_that_of_the_slower_of_computing_and_moving():
    gpu = Gpu(memory_gib=80, bandwidth=1e12, teraflops=1000)
    # 2 TFLOP at 520 TFLOP/s, then 3 GB at 0.9 TB/s.
    expected = 2 / (1000 * COMPUTE_SHARE) + 3e-3 / BANDWIDTH_SHARE
    assert gpu_seconds(STEP, gpu) == pytest.approx(expected)


def test_most_images_solves_the_line_through_two_batches():
    # 10 + 5 n: 20 at 2 images, 30 at 4; 100 holds 18.
    assert most_images((2, 4), (20, 30), 100) == 18
    assert most_images((2, 4), (20, 30), 14) == 0


def test_gpus_are_found_by_name_and_others_refused():
    assert find_gpus("H200,rtx4090") == {name: GPUS[name] for name in ("H200", "RTX 4090")}
    with pytest.raises(ValueError, match="--device: found tpu, expected one of b200, gh200"):
        find_gpus("h100,tpu")


@pytest.mark.parametrize("option", ["device.cuda_graphs", "model.compile"])
def test_a_plan_says_what_it_leaves_out(
    option: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(device_report, "simulate", lambda *_: STEP)
    for value in ("true", "false"):
        caplog.clear()
        config = load_config(TINY[0], [*TINY[1:], "engine.kind=deepspeed", f"{option}={value}"])
        device_report.report_devices(
            config, "pretrain", devices="h200", gpus=[1], num_classes=3, num_objects=20, disk=1e9
        )
        warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert [text.split(":")[0] for text in warnings] == ([option] if value == "true" else [])


def test_start_and_save_follow_the_share():
    row = scale(STEP, "FSDP2", 16, SIZES, over=16, disk=1000.0)  # 2 hosts
    assert (row.start_whole, row.start) == (4000 + 250, 250)
    assert (row.save_whole, row.save) == (12_000, 750)
    assert (row.write_whole, row.write) == (12, 6)


def test_a_frozen_backbone_is_shared_or_whole_and_in_no_checkpoint():
    sizes = dataclasses.replace(SIZES, frozen=500)  # 1000 of the 4000 bytes of weights
    for kind, shares_frozen, expected in (
        ("ZeRO-2", False, 4000),
        ("ZeRO-2", True, 3000 + 1000 / 16),
        ("ZeRO-3", False, 3000 / 8 + 1000),  # one node shares the rest, all ranks the frozen part
        ("ZeRO-3", True, 3000 / 8 + 1000 / 16),
    ):
        memory = memory_of(STEP, kind, 16, sizes, 8, shares_frozen=shares_frozen)
        assert memory.weights == expected
        row = scale(STEP, kind, 16, sizes, 8, disk=1000.0, shares_frozen=shares_frozen)
        assert (row.start, row.save_whole, row.save) == (expected, 11_000, 11_000 / 16)


def test_a_step_without_memory_has_the_sizes_of_the_model_and_grows_with_its_images():
    steps = []
    for images in (8, 16, 24):  # blocks are up to 1 MiB larger than tensors
        config = load_config(TINY[0], [*TINY[1:], f"phases.pretrain.images_per_gpu={images}"])
        steps.append(simulate(config, "pretrain", 3, 20))
    sizes = model_sizes(config, "pretrain", 3)
    first = steps[0]
    assert first.gradients == 4 * sizes.trained
    assert 0 < first.state - 8 * sizes.trained < 4 * 400  # AdamW: two of each weight, a step
    # Every tensor is rounded to 512 bytes, and some buffers are in no checkpoint.
    assert 0 <= first.weights - 4 * (sizes.parameters + sizes.buffers) < 512 * 400
    peaks = [step.peak for step in steps]
    assert 2 * peaks[1] - peaks[0] == pytest.approx(peaks[2], rel=0.05)
    assert peaks[0] < peaks[1] < peaks[2]
    flops = [sum(cost for cost, _ in step.costs) for step in steps]
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=0.05)
