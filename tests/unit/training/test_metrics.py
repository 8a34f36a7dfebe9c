import dataclasses
from collections import Counter

import pytest
import torch

from bigdet.data.samples import Damage
from bigdet.training.metrics import StepMeter, clock, mean_losses, progress_line
from bigdet.training.state import RunState
from tests.unit.models.scenes import make_scene


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
    meter, state = StepMeter(), RunState("train")
    meter.add([a_batch(), a_batch()], step_seconds=2.0, data_seconds=0.5)
    meter.sync(state, damages(7), dropped_boxes=2)
    # Of each batch: 2 images that count, objects 1 + 1 (one is crowd), pixels 30x40 + 20x40.
    assert state.seen.images == 4
    assert state.seen.instances == 4
    assert state.seen.pixels == 2 * (1200 + 800)
    assert state.seen.gpu_seconds == 2.0
    assert state.damaged == {"undecodable": 1}


def test_syncing_twice_counts_once_and_a_resumed_run_counts_on():
    meter = StepMeter()
    state = RunState("train", damaged={"undecodable": 2}, damaged_rows=[3, 4])
    meter.add([a_batch()], 1.0, 0.0)
    meter.sync(state, damages(5), dropped_boxes=3)
    meter.sync(state, damages(5), dropped_boxes=3)
    found = damages(5, 3) | damages(6, kind="wrong_size")  # 3 was found before
    meter.sync(state, found, dropped_boxes=4)
    assert state.dropped_boxes == 4
    assert state.seen.images == 2
    assert Counter(state.damaged) == {"undecodable": 3, "wrong_size": 1}
    assert sorted(state.damaged_rows) == [3, 4, 5, 6]
    StepMeter().sync(state, damages(4, 5), dropped_boxes=1)  # another phase, another stream
    assert sum(state.damaged.values()) == 4
    assert state.dropped_boxes == 5


def test_rates_are_of_the_interval():
    meter = StepMeter()
    meter.add([a_batch()], step_seconds=1.0, data_seconds=0.25)
    meter.add([a_batch()], step_seconds=3.0, data_seconds=0.25)
    rates = meter.rates()
    assert rates["images_per_second"] == pytest.approx(4 / 4.0)
    assert rates["time/step_seconds"] == pytest.approx(2.0)
    assert rates["time/data_seconds"] == pytest.approx(0.25)
    assert rates["memory_gib"] > 0
    meter.add([a_batch()], step_seconds=0.5, data_seconds=0.0)
    assert meter.rates()["images_per_second"] == pytest.approx(2 / 0.5)


def test_progress_line_says_what_a_person_wants_to_know():
    values = {
        "phase": "pretrain", "step": 200, "loss/total": 1.5, "loss/mask": 0.5, "loss/rpn_box": 1.0,
        "lr": 0.01, "images_per_second": 32.0, "time/step_seconds": 0.5, "time/data_seconds": 0.05,
        "memory_gib": 3.25,
    }  # fmt: skip
    assert progress_line(values, 7400) == (
        "pretrain 200/7400  loss 1.500 (mask 0.500 rpn_box 1.000)  lr 1.00e-02  32.0 images/s  "
        "data wait 10%  3.2 GiB  1:00:00 left"
    )


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
