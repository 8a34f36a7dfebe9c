"""The real detector on real ranks: ZeRO stages and ranks do not change a step."""

import dataclasses
from functools import partial

import pytest
import torch

from bigdet import distributed
from bigdet.config.schema import EngineConfig, ModelConfig, PhaseConfig, RoiConfig, RpnConfig
from bigdet.engine.deepspeed_engine import DeepSpeedEngine
from bigdet.models.build import build_detector
from bigdet.models.norms import update_running_statistics
from bigdet.training import optim
from tests.spawn import run_ranks
from tests.unit.models.scenes import make_scene

MODEL = ModelConfig(
    detector="mask_rcnn",
    backbone="resnet10",
    width=32,
    fc_width=32,
    rpn=RpnConfig(anchor_sizes=[16, 24, 32, 48, 64], train_proposals=30),
    roi=RoiConfig(rois_per_image=32),
)
LANES = 4
STEPS = 2
PHASE = PhaseConfig(steps=10, images_per_gpu=2, images_per_step=8, lr=0.01, warmup_steps=0)


def lanes_of_step(step):
    """Four lanes; the last two, which are rank 1's of two, hold no object at all."""
    boxes = [(4, 4, 30, 28), (20, 30, 60, 62)]
    objects = [[boxes, boxes[:1]], [boxes[1:], []], [[], []], [[], []]]
    return [
        make_scene(lane, [(64, 64), (56, 64)], (64, 64), seed=10 * step + number)
        for number, lane in enumerate(objects)
    ]


def new_detector():
    torch.manual_seed(0)
    return build_detector(MODEL, num_classes=3).train()


def summary(detector):
    """Weights and running statistics after the steps."""
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def train_with_engine(zero_stages):
    """Two steps at each ZeRO stage: losses over all lanes, and the weights after."""
    results = []
    own = slice(None)
    if distributed.world_size() > 1:
        share = LANES // distributed.world_size()
        own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for stage in zero_stages:
        detector = new_detector()
        config = EngineConfig(zero_stage=stage, precision="fp32", clip_norm=5.0)
        lanes = lanes_of_step(0)[own]
        make_optimizer = partial(optim.build_optimizer, phase=PHASE)
        device = torch.device("cpu")
        engine = DeepSpeedEngine(detector, make_optimizer, config, len(lanes), device)
        losses = []
        for step in range(STEPS):
            engine.set_lr(0.01)
            result = engine.train_step(lanes_of_step(step)[own])
            update_running_statistics(detector)
            names = sorted(result.losses)
            values = torch.stack([result.losses[name].double() for name in names])
            losses.append(distributed.mean_over_ranks(values).tolist())
        results.append((losses, summary(detector)))
        engine.close()
    return results


def train_plainly():
    """The same steps in plain PyTorch, one lane after the other."""
    detector = new_detector()
    optimizer = optim.build_optimizer(detector, PHASE)
    optimizer.param_groups[0]["lr"] = 0.01
    history = []
    for step in range(STEPS):
        sums = {}
        for lane in lanes_of_step(step):
            losses = detector(lane)
            losses["total"] = torch.stack(list(losses.values())).sum()
            (losses["total"] / LANES).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / LANES
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        update_running_statistics(detector)
        history.append([sums[name] for name in sorted(sums)])
    return history, summary(detector)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_gives_the_losses_and_weights_of_plain_pytorch(tmp_path, world_size):
    expected_losses, expected = train_plainly()
    every_rank = run_ranks(train_with_engine, world_size, tmp_path, [0, 1, 2])
    for results in every_rank:
        for losses, weights in results:
            # Gradients are added in another order: rounding of fp32. Losses are means of some
            # hundred terms, weights move by lr x gradient (about 1e-2 x 1).
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5, atol=1e-6
            )
            assert weights.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_without_any_object_trains_on_background_and_touches_every_parameter():
    detector = new_detector()
    batch = lanes_of_step(0)[2]
    losses = detector(batch)
    assert losses["rpn_box"].item() == losses["box_delta"].item() == losses["mask"].item() == 0.0
    assert losses["rpn_objectness"].item() > 0
    sum(losses.values()).backward()
    untouched = [name for name, p in detector.named_parameters() if p.grad is None]
    assert untouched == []


def test_masked_slots_leave_no_gradient_but_their_statistics():
    detector = new_detector()
    batch = lanes_of_step(0)[0]
    masked = dataclasses.replace(batch, weights=torch.zeros(2))
    losses = detector(masked)
    assert all(loss.item() == 0.0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.abs().max() == 0 for p in detector.parameters())
    update_running_statistics(detector)
    assert detector.backbone.bn1.running_mean.abs().max() > 0
