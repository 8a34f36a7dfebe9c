"""Every detector of the R-CNN family trains and predicts on two ranks, whatever a rank sees."""

from dataclasses import replace
from functools import partial

import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.heads import CascadeConfig, KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.rpn import RpnConfig
from bigdet.engine.deepspeed_engine import DeepSpeedEngine
from bigdet.models.build import build_detector
from bigdet.models.norms import update_running_statistics
from bigdet.training import optim
from tests.spawn import run_ranks
from tests.unit.models.scenes import make_scene

SMALL = {
    "width": 32,
    "fc_width": 32,
    "rpn": RpnConfig(
        anchor_sizes=[8, 16, 32, 48, 64],
        train_proposals=30,
        test_proposals=20,
        low_quality_iou=0.0,  # so that one pixel has an anchor
    ),
    "roi": RoiConfig(rois_per_image=32, score_threshold=0.0),
    "keypoint": KeypointConfig(num_keypoints=3, width=32),
}
MMDET = CascadeConfig(gradients="mmdet")
GIOU = replace(SMALL["roi"], box_loss="giou", box_loss_weight=10.0)
MODELS = [
    ModelConfig(detector="faster_rcnn", backbone="resnet10", **SMALL | {"roi": GIOU}),
    ModelConfig(detector="mask_rcnn", backbone="resnet10", norm="gn", box_head="4conv1fc", **SMALL),
    ModelConfig(detector="cascade_rcnn", backbone="resnet10", cascade=MMDET, **SMALL),
    ModelConfig(detector="cascade_mask_rcnn", backbone="resnet10", **SMALL),
    ModelConfig(detector="keypoint_rcnn", backbone="resnet10", **SMALL),
    ModelConfig(detector="cascade_mask_rcnn", backbone="swin_t", cascade=MMDET, **SMALL),
    ModelConfig(detector="keypoint_rcnn", backbone="swin_t", norm="gn", **SMALL),
]
BATCHES = {
    "nothing": [],
    "crowds": [(4, 4, 30, 28), (10, 10, 60, 60)],
    "300": [(x, y, x + 8, y + 9) for x in range(0, 54, 3) for y in range(0, 51, 3)][:300],
    "one pixel": [(20, 20, 21, 21)],
}
ORDINARY = [(4, 4, 30, 28), (20, 30, 60, 62)]
PHASE = PhaseConfig(steps=10, images_per_gpu=1, images_per_step=2, lr=0.001, warmup_steps=0)


def scene(boxes, is_crowd=False):
    batch = make_scene([boxes], [(64, 64)], (64, 64), num_keypoints=3)
    crowd = torch.full((len(boxes),), is_crowd)
    return replace(batch, targets=replace(batch.targets, is_crowd=crowd))


def train_and_predict(config):
    """A step per kind of batch, which rank 1 sees along with an ordinary one, then a prediction."""
    torch.manual_seed(0)
    detector = build_detector(config, num_classes=3).train()
    settings = EngineConfig(zero_stage=2, precision="fp32", clip_norm=5.0)
    make_optimizer = partial(optim.build_optimizer, phase=PHASE)
    engine = DeepSpeedEngine(detector, make_optimizer, settings, 1, torch.device("cpu"))
    losses = {}
    for kind, boxes in BATCHES.items():
        engine.set_lr(PHASE.lr)
        own = scene(boxes, kind == "crowds") if distributed.rank() else scene(ORDINARY)
        result = engine.train_step([own])
        update_running_statistics(detector)
        assert result.is_finite, (config.detector, config.backbone, kind)
        losses[kind] = {name: float(value) for name, value in result.losses.items()}
    engine.close()
    weights = sum(parameter.double().sum().item() for parameter in detector.parameters())
    (found,) = detector.eval()(scene(ORDINARY))
    assert len(found.boxes) > 0
    assert (found.masks is not None) == ("mask" in config.detector)
    assert (found.keypoints is not None) == ("keypoint" in config.detector)
    return losses, weights, found.scores.tolist()


def train_all():
    return [train_and_predict(config) for config in MODELS]


def test_any_batch_trains_every_detector_on_two_ranks_at_zero_2(tmp_path):
    first, second = run_ranks(train_all, 2, tmp_path, timeout_seconds=590)
    for (_, *rest), (losses, *others) in zip(first, second, strict=True):
        assert rest == others  # weights and scores
        learned = [
            name for name in losses["300"] if not name.endswith(("objectness", "class", "total"))
        ]
        for kind in ("nothing", "crowds"):  # no object: nothing to learn but the background
            assert all(losses[kind][name] == 0.0 for name in learned)
            assert losses[kind]["rpn_objectness"] > 0
        assert all(losses["300"][name] > 0 for name in learned)
        assert losses["one pixel"]["rpn_box"] > 0
