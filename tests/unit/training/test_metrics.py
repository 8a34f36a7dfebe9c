import dataclasses
import json
import math
from collections import Counter
from types import SimpleNamespace

import pynvml
import pytest
import torch

from bigdet.data.examples.samples import Damage
from bigdet.training import energy
from bigdet.training.metrics import StepMeter, clock, mean_losses, progress_line
from bigdet.training.state import Cost, RunState
from tests.unit.models.scenes import make_scene

CPU = torch.device("cpu")


def a_batch():
    boxes = [(0, 0, 10, 10), (5, 5, 20, 20)]
    batch = make_scene([boxes, boxes[:1], boxes], [(30, 40), (20, 40), (40, 40)], (64, 64))
    crowd = torch.tensor([False, True, False, False, False])
    targets = dataclasses.replace(batch.targets, is_crowd=crowd)
    weights = torch.tensor([1.0, 1.0, 0.0])
    return dataclasses.replace(batch, targets=targets, weights=weights)


def damages(*rows: int, kind: str = "undecodable") -> dict[int, Damage]:
    return {row: Damage(row, kind, f"row {row} is bad") for row in rows}


def test_masked_slots_and_crowds_are_not_counted():
    meter, state = StepMeter(CPU), RunState("train")
    meter.add([a_batch(), a_batch()], step_seconds=2.0, data_seconds=0.5, cpu_seconds=1.5)
    meter.sync(state, damages(7), dropped_boxes=2)
    # Of each batch: 2 images that count, objects 1 + 1 (one is crowd), pixels 30x40 + 20x40.
    assert state.seen.images == 4
    assert state.seen.instances == 4
    assert state.seen.pixels == 2 * (1200 + 800)
    assert state.seen.gpu_seconds == 2.0
    assert state.damaged == {"undecodable": 1}


def test_costs_are_counted_by_phase_and_in_all():
    state, meter = RunState("pretrain"), StepMeter(CPU)
    for _ in range(2):
        meter.add([a_batch()], step_seconds=2.0, data_seconds=0.5, cpu_seconds=1.5)
    meter.add_evaluation(7.0, 6.0)
    meter.sync(state, {}, 0)
    state.total_steps = 2
    state = RunState.from_json(json.loads(json.dumps(state.to_json())))  # as a resumed run does
    state.begin("finetune")
    meter = StepMeter(CPU)
    meter.add([a_batch()], step_seconds=3.0, data_seconds=0.25, cpu_seconds=2.5)
    meter.sync(state, {}, 0)
    assert state.costs["pretrain"] == Cost(2, 4, 4, 4000, 3.0, 1.0, 7.0, None, 3.0, 6.0)
    counters = state.counters()
    # 2 images, 2 objects that are not crowd and 2000 pixels per step; a CPU reports no energy.
    assert counters == {
        "seen/images": 6, "seen/instances": 6, "seen/pixels": 6000, "seen/gpu_seconds": 7.0,
        "cost/steps": 3, "cost/compute_gpu_seconds": 5.75, "cost/data_gpu_seconds": 1.25,
        "cost/evaluation_gpu_seconds": 7.0, "cost/cpu_seconds": 5.5,
        "cost/evaluation_cpu_seconds": 6.0,
        "phase_cost/steps": 1, "phase_cost/images": 2, "phase_cost/instances": 2,
        "phase_cost/pixels": 2000, "phase_cost/compute_gpu_seconds": 2.75,
        "phase_cost/data_gpu_seconds": 0.25, "phase_cost/evaluation_gpu_seconds": 0.0,
        "phase_cost/cpu_seconds": 2.5, "phase_cost/evaluation_cpu_seconds": 0.0,
    }  # fmt: skip


def test_cpu_seconds_that_an_earlier_version_did_not_count_are_left_out():
    state = RunState("pretrain")
    meter = StepMeter(CPU)
    meter.add([a_batch()], 2.0, 0.5, 1.5)
    meter.sync(state, {}, 0)
    written = json.loads(json.dumps(state.to_json()))
    del written["costs"]["pretrain"]["cpu_seconds"]
    del written["costs"]["pretrain"]["evaluation_cpu_seconds"]
    state = RunState.from_json(written)
    state.begin("finetune")
    meter.add([a_batch()], 2.0, 0.5, 1.25)
    meter.sync(state, {}, 0)
    counters = state.counters()  # of the run not known, of its second phase all
    assert not {"cost/cpu_seconds", "cost/evaluation_cpu_seconds"} & counters.keys()
    assert counters["phase_cost/cpu_seconds"] == 1.25


def test_a_run_on_gpus_counts_no_cpu_seconds(cuda_properties):
    state, meter = RunState("train"), StepMeter(torch.device("cuda", 0))
    meter.add([a_batch()], 2.0, 0.5, 1.5)
    meter.sync(state, {}, 0)
    assert not any("cpu_seconds" in name for name in state.counters())


class OneGpu:
    """``pynvml`` on a machine with one GPU, which uses 1.5 joules between two readings."""

    NVMLError = pynvml.NVMLError

    def __init__(self):
        self.millijoules = 10_000

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1234-abcd"
        return "the handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        assert handle == "the handle"
        self.millijoules += 1500
        return self.millijoules


class NoCounter(OneGpu):
    """A GPU older than Volta."""

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def cuda_properties(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def test_energy_is_what_the_counter_grew_by(cuda_properties, monkeypatch):
    monkeypatch.setattr(energy, "pynvml", OneGpu())
    state, meter = RunState("train"), StepMeter(torch.device("cuda", 0))  # reads it once
    meter.sync(state, {}, 0)
    meter.sync(state, {}, 0)
    assert state.counters()["cost/energy_joules"] == pytest.approx(3.0)
    assert energy.EnergyCounter(torch.device("cuda", 0)).joules() == 16.0  # 16,000 mJ by now


def test_a_gpu_without_an_energy_counter_leaves_the_run_without(cuda_properties, monkeypatch):
    monkeypatch.setattr(energy, "pynvml", NoCounter())
    state = RunState("train", costs={"train": Cost(energy_joules=5.0)})
    StepMeter(torch.device("cuda", 0)).sync(state, {}, 0)
    assert "cost/energy_joules" not in state.counters()


def test_without_nvidias_driver_the_energy_is_not_known(cuda_properties, monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)  # the package itself, not loaded yet
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    assert math.isnan(energy.EnergyCounter(torch.device("cuda", 0)).joules())


def test_syncing_twice_counts_once_and_a_resumed_run_counts_on():
    meter = StepMeter(CPU)
    state = RunState("train", damaged={"undecodable": 2}, damaged_rows=[3, 4])
    meter.add([a_batch()], 1.0, 0.0, 1.0)
    meter.sync(state, damages(5), dropped_boxes=3)
    meter.sync(state, damages(5), dropped_boxes=3)
    found = damages(5, 3) | damages(6, kind="wrong_size")  # 3 was found before
    meter.sync(state, found, dropped_boxes=4)
    assert state.dropped_boxes == 4
    assert state.seen.images == 2
    assert Counter(state.damaged) == {"undecodable": 3, "wrong_size": 1}
    assert sorted(state.damaged_rows) == [3, 4, 5, 6]
    StepMeter(CPU).sync(state, damages(4, 5), dropped_boxes=1)  # another phase, another stream
    assert sum(state.damaged.values()) == 4
    assert state.dropped_boxes == 5


def test_rates_are_of_the_interval():
    meter = StepMeter(CPU)
    meter.add([a_batch()], step_seconds=1.0, data_seconds=0.25, cpu_seconds=0.5)
    meter.add([a_batch()], step_seconds=3.0, data_seconds=0.25, cpu_seconds=2.5)
    rates = meter.rates()
    assert rates["images_per_second"] == pytest.approx(4 / 4.0)
    assert rates["time/step_seconds"] == pytest.approx(2.0)
    assert rates["time/data_seconds"] == pytest.approx(0.25)
    assert rates["memory_gib"] > 0
    meter.add([a_batch()], step_seconds=0.5, data_seconds=0.0)
    assert meter.rates()["images_per_second"] == pytest.approx(2 / 0.5)


def test_progress_line_says_what_a_person_wants_to_know():
    values = {
        "phase": "pretrain",
        "step": 200,
        "loss/total": 1.5,
        "loss/mask": 0.5,
        "loss/rpn_box": 1.0,
        "lr": 0.01,
        "images_per_second": 32.0,
        "time/step_seconds": 0.5,
        "time/data_seconds": 0.05,
        "memory_gib": 3.25,
    }
    assert progress_line(values, 7400) == (
        "pretrain 200/7400  loss 1.500 (mask 0.500 rpn_box 1.000)  lr 1.00e-02  32.0 images/s  "
        "data wait 10%  3.2 GiB  1:00:00 left"
    )


def test_a_line_without_a_finite_step_shows_dashes():
    values = {
        "phase": "pretrain",
        "step": 2,
        "loss/total": None,
        "loss/mask": None,
        "lr": 0.01,
        "images_per_second": 32.0,
        "time/step_seconds": 0.5,
        "time/data_seconds": 0.05,
        "memory_gib": 3.25,
    }
    assert progress_line(values, 4).startswith("pretrain 2/4  loss - (mask -)  lr 1.00e-02")


def test_losses_are_named_as_logged():
    losses = {"mask": torch.tensor(0.5), "total": torch.tensor(0.75)}
    assert mean_losses(losses) == {"loss/mask": 0.5, "loss/total": 0.75}


def test_clock_counts_hours_beyond_a_day():
    assert clock(59.6) == "0:01:00"
    assert clock(100 * 3600 + 61) == "100:01:01"


def test_state_survives_json():
    state = RunState("finetune", step=3, total_steps=9, best_ap=0.5, damaged={"wrong_size": 2})
    state.seen.pixels = 10**15
    assert RunState.from_json(state.to_json()) == state
