"""RetinaNet and the R-CNN without a pyramid train and predict on two ranks, whatever they see."""

from dataclasses import replace
from functools import partial

import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.heads import RetinaConfig
from bigdet.config.model import ModelConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.rpn import RpnConfig
from bigdet.engine.deepspeed_engine import DeepSpeedEngine
from bigdet.models.build import build_detector
from bigdet.models.norms import update_running_statistics
from bigdet.training import optim
from tests.spawn import run_ranks
from tests.unit.models.scenes import make_scene

RETINA = RetinaConfig(anchor_sizes=[8, 16, 32, 48, 64], score_threshold=0.0)
RPN = RpnConfig(anchor_sizes=[16, 32], train_proposals=30, low_quality_iou=0.0)
VGG = {"backbone": "vgg16", "norm": "none", "fc_width": 16}
MODELS = {
    "retinanet resnet10": ModelConfig(
        detector="retinanet", backbone="resnet10", width=16, retina=RETINA
    ),
    "retinanet swin_t": ModelConfig(
        detector="retinanet", backbone="swin_t", width=16, retina=RETINA
    ),
    "faster_rcnn vgg16": ModelConfig(detector="faster_rcnn", **VGG, rpn=RPN),
    "mask_rcnn vgg16": ModelConfig(detector="mask_rcnn", **VGG, rpn=RPN),
}
PHASE = PhaseConfig(steps=10, images_per_gpu=1, images_per_step=2, lr=0.01, warmup_steps=0)


def scene(kind):
    """One image of 64x64: objects of a kind, or of another rank's."""
    boxes = {
        "ordinary": [(4, 4, 30, 28), (20, 30, 60, 62)],
        "nothing": [],
        "crowds": [(4, 4, 30, 28), (10, 10, 60, 60)],
        "300": [(x, y, x + 8, y + 9) for x in range(0, 54, 3) for y in range(0, 51, 3)][:300],
        "one pixel": [(20, 20, 21, 21)],
    }[kind]
    batch = make_scene([boxes], [(64, 64)], (64, 64))
    if kind == "crowds":
        is_crowd = torch.ones(len(boxes), dtype=torch.bool)
        batch = replace(batch, targets=replace(batch.targets, is_crowd=is_crowd))
    return batch


def train_and_predict(name, kinds):
    """A step per kind, which only rank 1 sees; then a prediction. Give losses and counts."""
    torch.manual_seed(0)
    detector = build_detector(MODELS[name], num_classes=3).train()
    config = EngineConfig(zero_stage=2, precision="fp32", clip_norm=5.0)
    make_optimizer = partial(optim.build_optimizer, phase=PHASE)
    engine = DeepSpeedEngine(detector, make_optimizer, config, 1, torch.device("cpu"))
    losses = []
    for kind in kinds:
        engine.set_lr(0.001)
        result = engine.train_step([scene(kind if distributed.rank() else "ordinary")])
        update_running_statistics(detector)
        assert result.is_finite
        losses.append({key: float(value) for key, value in result.losses.items()})
    engine.close()
    weights = sum(parameter.double().sum().item() for parameter in detector.parameters())
    (found,) = detector.eval()(scene("ordinary"))
    return losses, weights, found.scores.tolist()


def train_all(kinds):
    return {name: train_and_predict(name, kinds) for name in MODELS}


def test_any_batch_trains_on_two_ranks_at_zero_2(tmp_path):
    kinds = ["nothing", "crowds", "300", "one pixel"]
    first, second = run_ranks(train_all, 2, tmp_path, kinds, timeout_seconds=480)
    for name, (losses, *rest) in second.items():
        assert rest == list(first[name][1:])  # weights and scores
        box = [step["retina_box" if "retina" in name else "rpn_box"] for step in losses]
        assert box[0] == box[1] == 0.0  # no object: nothing to move a box to
        assert all(value > 0 for value in box[2:])
