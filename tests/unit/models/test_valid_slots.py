"""Heads run on slots; those that hold no region must not enter batch normalization."""

from __future__ import annotations

import pytest
import torch

from bigdet.config.schema import Detector, KeypointConfig, ModelConfig, RoiConfig, RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.heads import positives
from bigdet.models.norms import batch_norms, update_running_statistics
from tests.unit.models.scenes import make_scene

SCENE = make_scene([[(4, 6, 40, 50)], []], [(64, 64), (64, 60)], (64, 64), num_keypoints=4)


def step(detector: Detector, slots: int) -> dict[str, torch.Tensor]:
    """Losses and running statistics of one step with so many slots for box regions."""
    config = ModelConfig(
        detector=detector,
        backbone="resnet10",
        norm="bn",
        norm_scope="all",
        box_head="4conv1fc",
        width=8,
        fc_width=16,
        # 5 proposals of an image and its object: all are sampled, whatever the slots.
        rpn=RpnConfig(train_proposals=5, anchors_per_image=16),
        roi=RoiConfig(rois_per_image=slots, positive_fraction=0.5),
        keypoint=KeypointConfig(num_keypoints=4, width=8),
    )
    torch.manual_seed(0)
    model = build_detector(config, 3).double()
    found = model(SCENE)
    sum(found.values()).backward()
    update_running_statistics(model)
    for name, layer in model.named_modules():
        if layer in batch_norms(model):
            found |= {f"{name}.mean": layer.running_mean, f"{name}.var": layer.running_var}
            assert layer.running_mean.any(), name
    found |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn", "keypoint_rcnn"])
def test_losses_gradients_and_statistics_do_not_depend_on_empty_slots(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = step(detector, 16)
    monkeypatch.setattr(positives, "BUCKET", 96)
    many = step(detector, 32)
    assert set(few) == set(many)
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, rtol=1e-8, atol=1e-10, msg=name)
