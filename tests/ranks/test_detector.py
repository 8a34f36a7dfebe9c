"""The real detector on real ranks: engines, ZeRO stages and ranks do not change a step."""

import dataclasses
from functools import partial

import pytest
import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.evaluation import TtaConfig
from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.rpn import RpnConfig
from bigdet.engine import deepspeed_engine
from bigdet.engine.build import build_engine
from bigdet.evaluation.tta import AugmentedDetector
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.build import build_detector
from bigdet.models.detector import evaluating
from bigdet.models.norms import update_running_statistics
from bigdet.training import optim
from tests.ranks.toy import ENGINES, whole_state
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


# A backbone that calls neither its stages nor its blocks as modules, a head of several stages.
SWIN_CASCADE = dataclasses.replace(MODEL, backbone="swin_t", detector="cascade_mask_rcnn")
# A network whose class token and positions are its own, and one with batch normalization.
TIMM_PLAIN = dataclasses.replace(MODEL, backbone="timm:eva02_tiny_patch14_224", norm="none")
TIMM_PYRAMID = dataclasses.replace(MODEL, backbone="timm:regnety_002")


def new_detector(model=MODEL):
    torch.manual_seed(0)
    return build_detector(model, num_classes=3).train()


def detect(detector, rank):
    """Scores on one image, another one on each rank: with augmentation, then without.

    Boxes of an untrained model have nearly equal scores: rounding changes their order.
    """
    batch = make_scene([[]], [(64, 48 - 16 * rank)], (64, 64), seed=100 + rank)
    augmented = AugmentedDetector(detector, TtaConfig(scales=[64], cap=64, vote_iou=None), [])
    with evaluating(detector):
        return torch.cat([found.scores for each in (augmented, detector) for found in each(batch)])


def train_with_engines(names, model, is_checkpointed):
    """Two steps with each engine: losses over all lanes, detections between, weights after."""
    deepspeed_engine.WHOLE_ELEMENTS = 100  # of so small a model nothing would be sharded
    results = []
    share = LANES // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for name in names:
        detector = new_detector(model)
        if is_checkpointed:
            enable_checkpointing(detector)
        config = EngineConfig(**ENGINES[name], precision="fp32", clip_norm=5.0)
        make_optimizer = partial(optim.build_optimizer, phase=PHASE)
        engine = build_engine(
            detector, make_optimizer, config, share, torch.device("cpu"), detector.units
        )
        losses = []
        for step in range(STEPS):
            engine.set_lr(0.01)
            result = engine.train_step(lanes_of_step(step)[own])
            update_running_statistics(detector)
            keys = sorted(result.losses)
            values = torch.stack([result.losses[key].double() for key in keys])
            losses.append(distributed.mean_over_ranks(values).tolist())
            found = detect(detector, distributed.rank())
        results.append((losses, found, whole_state(engine).model))
        engine.close()
    return results


def train_plainly(model):
    """The same steps in plain PyTorch, one lane after the other; what ranks 0 and 1 detect."""
    detector = new_detector(model)
    optimizer = optim.build_optimizer(detector, PHASE)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
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
    return history, [detect(detector, rank) for rank in range(2)], detector.state_dict()


@pytest.mark.parametrize(
    ("model", "is_checkpointed", "world_size", "names"),
    [
        (MODEL, False, 1, list(ENGINES)),
        (MODEL, False, 2, list(ENGINES)),
        (SWIN_CASCADE, True, 2, ["zero3", "fsdp"]),
        (TIMM_PLAIN, True, 2, ["zero3", "fsdp"]),
        (TIMM_PYRAMID, False, 2, list(ENGINES)),
    ],
    ids=["one rank", "two ranks", "swin cascade checkpointed", "plain of timm", "pyramid of timm"],
)
def test_every_engine_gives_the_results_of_plain_pytorch(
    tmp_path, model, is_checkpointed, world_size, names
):
    expected_losses, expected_found, expected = train_plainly(model)
    every_rank = run_ranks(
        train_with_engines, world_size, tmp_path, names, model, is_checkpointed, timeout_seconds=600
    )
    for rank, results in enumerate(every_rank):
        assert len(results) == len(names)
        for losses, found, weights in results:
            # Gradients are added in another order: rounding of fp32. Losses are means of some
            # hundred terms, weights move by lr x gradient (about 1e-2 x 1).
            torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, expected_found[rank], rtol=1e-3, atol=1e-4)
            assert len(found) > 0
            if rank == 0:
                torch.testing.assert_close(weights, dict(expected), rtol=1e-4, atol=1e-6)


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
