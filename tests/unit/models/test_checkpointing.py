import gc

import pytest
import torch

from bigdet.config.heads import KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.build import build_detector
from bigdet.models.norms import batch_norms, set_norm_mode, update_running_statistics
from tests.unit.models.scenes import make_scene

SCENE = make_scene(
    [[(4, 6, 40, 50), (20, 10, 60, 44)], [(10, 10, 30, 60)]],
    [(64, 64), (64, 60)],
    (64, 64),
    num_keypoints=4,
)
KEYPOINTS = {
    "detector": "keypoint_rcnn",
    "keypoint": KeypointConfig(num_keypoints=4, width=64),
}


def make_detector(backbone, **options):
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone,
        box_head="4conv1fc",
        width=8,
        fc_width=16,
        rpn=RpnConfig(train_proposals=50, anchors_per_image=32),
        roi=RoiConfig(rois_per_image=16),
        **{"detector": "mask_rcnn", **options},
    )
    detector = build_detector(config, 3).double()
    for parameter in detector.backbone.parameters():
        if parameter.ndim == 1:  # scales of ConvNeXt and SwinV2 start near 0
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
    return detector


def run_step(detector):
    """Losses, gradients and running statistics of a step, and bytes kept for backward."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = detector(SCENE)
    for parameter in detector.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    torch.stack(list(losses.values())).sum().backward()
    update_running_statistics(detector)
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    running = {n: b.clone() for n, b in detector.named_buffers() if "running" in n}
    gc.collect()
    return losses, gradients, running, sum(kept.values())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", {"norm": "bn", "norm_scope": "all"}),
        ("resnet10", {"norm_scope": "all", **KEYPOINTS}),
        ("swin_t", {"norm": "none", "drop_path": 0.3}),
        ("swinv2_t", {"norm": "none", "drop_path": 0.3}),
        ("convnext_t", {"norm": "gn", "drop_path": 0.3}),
        ("vit_s", {"norm": "none", "drop_path": 0.3}),
    ],
)
def test_losses_gradients_and_statistics_are_those_without_it_and_less_is_kept(backbone, options):
    detector = make_detector(backbone, **options)
    losses, gradients, running, kept = run_step(detector)
    assert gradients
    again = make_detector(backbone, **options)
    enable_checkpointing(again)
    losses_again, gradients_again, running_again, kept_again = run_step(again)
    for name, loss in losses.items():
        assert torch.equal(losses_again[name], loss), name
    assert set(gradients_again) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-9, atol=1e-12)
    for name, buffer in running.items():
        assert torch.equal(running_again[name], buffer), name
    assert kept_again < 0.7 * kept


def test_evaluation_and_frozen_models_run_as_without_it():
    detector = make_detector("resnet10")
    enable_checkpointing(detector)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    reference = make_detector("resnet10")
    for model in (detector, reference):
        set_norm_mode(model, "fixed")
        model.requires_grad_(False)
    for mine, expected in zip(detector.backbone(images), reference.backbone(images), strict=True):
        assert torch.equal(mine, expected)
    assert len(batch_norms(detector)) == 12
