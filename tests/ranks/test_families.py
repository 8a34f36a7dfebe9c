"""Every backbone family, and one of a user's, trains and predicts on two ranks at ZeRO 2."""

from dataclasses import replace
from functools import partial

import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.rpn import RpnConfig
from bigdet.engine.deepspeed_engine import DeepSpeedEngine
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.build import build_detector
from bigdet.models.norms import set_norm_mode, update_running_statistics
from bigdet.training import optim
from tests.spawn import run_ranks
from tests.unit.models.scenes import make_scene

FAMILIES = ["resnet10", "swin_t", "swinv2_t", "convnext_t", "vit_s", "tests.own_nets:Plain"]
PHASE = PhaseConfig(steps=10, images_per_gpu=2, images_per_step=4, lr=0.001, warmup_steps=0)
MANY = [(x, y, x + 8, y + 9) for x in range(0, 54, 3) for y in range(0, 51, 3)]
CROWDS = [(4, 4, 30, 28), (10, 10, 60, 60)]


def scene(*objects, num_crowds=0):
    batch = make_scene(list(objects), [(64, 60), (64, 64)], (64, 64))
    flags = torch.arange(len(batch.targets.labels)) < num_crowds
    return replace(batch, targets=replace(batch.targets, is_crowd=flags))


ORDINARY = scene([(4, 4, 30, 28), (20, 30, 60, 62)], [(0, 0, 64, 64)])
STEPS = [scene([], CROWDS, num_crowds=2), scene(MANY, [(20, 20, 21, 21)])]
"""What rank 1 sees: nothing and only crowds; 306 objects and one of a single pixel."""


def train_and_predict(backbone):
    """BN of all parts in ``sync``, blocks run twice; give losses, weights and scores."""
    torch.manual_seed(0)
    config = ModelConfig(
        detector="mask_rcnn",
        backbone=backbone,
        norm="bn",
        norm_scope="all",
        width=16,
        fc_width=16,
        rpn=RpnConfig(anchor_sizes=[8, 16, 32, 48, 64], train_proposals=30),
        roi=RoiConfig(rois_per_image=32, score_threshold=0.0),
    )
    detector = build_detector(config, num_classes=3).train()
    set_norm_mode(detector, "sync")
    enable_checkpointing(detector)
    engine_config = EngineConfig(zero_stage=2, precision="fp32", clip_norm=5.0)
    make_optimizer = partial(optim.build_optimizer, phase=PHASE)
    engine = DeepSpeedEngine(detector, make_optimizer, engine_config, 1, torch.device("cpu"))
    losses = []
    for batch in STEPS:
        engine.set_lr(PHASE.lr)
        result = engine.train_step([batch if distributed.rank() else ORDINARY])
        update_running_statistics(detector)
        assert result.is_finite
        losses.append({key: float(value) for key, value in result.losses.items()})
    engine.close()
    state = sum(tensor.double().abs().sum().item() for tensor in detector.state_dict().values())
    found = detector.eval()(ORDINARY)
    return losses, state, found[0].scores.tolist()


def train_all():
    return {backbone: train_and_predict(backbone) for backbone in FAMILIES}


def test_every_family_trains_and_predicts_whatever_a_rank_sees(tmp_path):
    first, second = run_ranks(train_all, 2, tmp_path, timeout_seconds=500)
    for backbone, (losses, *rest) in second.items():
        assert rest == list(first[backbone][1:]), backbone  # weights, statistics and scores
        assert len(rest[1]) > 0
        empty, full = losses
        # No object: nothing to move a box to, no mask to learn.
        assert empty["rpn_box"] == empty["box_delta"] == empty["mask"] == 0.0
        assert full["rpn_box"] > 0, backbone
        assert full["mask"] > 0, backbone
