"""Heads run on slots; those that hold no region must not enter batch normalization."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigdet.config.heads import KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.heads import positives
from bigdet.models.norms import batch_norms, update_running_statistics
from bigdet.structures import Batch
from tests.unit.models.scenes import make_scene

DETECTORS = ["mask_rcnn", "cascade_mask_rcnn", "keypoint_rcnn"]
BOX = (4, 6, 40, 50)


def scene(objects_of_second: list[tuple[int, int, int, int]]) -> Batch:
    sizes = [(64, 64), (64, 60)]
    return make_scene([[BOX], objects_of_second], sizes, (64, 64), num_keypoints=3)


def step(detector: str, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses, gradients and running statistics of one step; 2 x 64 slots for regions."""
    config = ModelConfig(
        detector=detector,
        backbone="resnet10",
        norm="bn",
        norm_scope="all",
        box_head="4conv1fc",
        width=8,
        fc_width=16,
        keypoint=KeypointConfig(num_keypoints=3, width=16),
        rpn=RpnConfig(train_proposals=100, anchors_per_image=16),
        roi=RoiConfig(rois_per_image=64),
    )
    torch.manual_seed(0)
    model = build_detector(config, 3).double()
    found = model(batch)
    sum(found.values()).backward()
    update_running_statistics(model)
    for name, layer in model.named_modules():
        if layer in batch_norms(model):
            found |= {f"{name}.mean": layer.running_mean, f"{name}.var": layer.running_var}
            assert layer.running_mean.any(), name
    return found | {f"{name}.grad": p.grad for name, p in model.named_parameters()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("detector", DETECTORS)
def test_slots_that_fill_a_bucket_do_not_count(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = scene([])
    few = step(detector, batch)
    monkeypatch.setattr(positives, "CPU_BUCKET", 96)  # of 128 regions
    assert_equal(few, step(detector, batch))


@pytest.mark.parametrize("detector", DETECTORS)
def test_regions_of_an_image_of_weight_zero_do_not_count(detector: str) -> None:
    weights = torch.tensor([1.0, 0.0])
    without, other = (replace(scene(objects), weights=weights) for objects in ([], [BOX]))
    # Other objects: other regions are drawn in the second image, but the losses leave them out.
    assert without.targets.keypoints is not None
    assert other.targets.keypoints is not None
    keypoints = torch.cat([without.targets.keypoints, other.targets.keypoints[1:]])
    other = replace(
        other, images=without.images, targets=replace(other.targets, keypoints=keypoints)
    )
    assert_equal(step(detector, without), step(detector, other))
