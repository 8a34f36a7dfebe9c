"""The configs of large backbones have the numbers of the code that they are from."""

from __future__ import annotations

import pytest

from bigdet.config.phase import drop_points, in_steps
from bigdet.config.rpn import proposal_limits
from bigdet.models.build import head_norm
from tests.shipped import CONFIGS, config_of

SWIN = "patch4_window7_224.ms_in22k"
VITDET = [
    # Name, backbone, start, passes, rate, weight decay, drop path, layer decay. projects/ViTDet:
    # mask_rcnn_vitdet_{b,l}_100ep.py, mask_rcnn_vitdet_h_75ep.py, common/optim.py.
    ("vitdet_b", "vit_b", "timm:vit_base_patch16_224.mae", 100, 1e-4, 0.1, 0.1, 0.7),
    ("vitdet_l", "vit_l", "timm:vit_large_patch16_224.mae", 100, 1e-4, 0.1, 0.4, 0.8),
    ("vitdet_h", "vit_h", "timm:vit_huge_patch14_224.mae", 75, 1e-4, 0.1, 0.5, 0.9),
    # cascade_mask_rcnn_swin_{b,l}_in21k_50ep.py.
    ("swin_b_cascade", "swin_b", f"timm:swin_base_{SWIN}", 50, 4e-5, 0.05, 0.4, None),
    ("swin_l_cascade", "swin_l", f"timm:swin_large_{SWIN}", 50, 4e-5, 0.05, 0.4, None),
    # The paper's tables 4 and 11: from random weights and supervised ones, without layer decay.
    ("vitdet:b_none", "vit_b", "random", 300, 1.6e-4, 0.2, 0.1, None),
    ("vitdet:l_none", "vit_l", "random", 200, 1.6e-4, 0.2, 0.4, None),
    ("vitdet:b_in1k", "vit_b", "timm:deit_base_patch16_224.fb_in1k", 50, 8e-5, 0.1, 0.1, None),
    ("vitdet:b_mae", "vit_b", "timm:vit_base_patch16_224.mae", 100, 1e-4, 0.1, 0.1, 0.7),
    ("vitdet:l_mae", "vit_l", "timm:vit_large_patch16_224.mae", 100, 1e-4, 0.1, 0.4, 0.8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backbone", "start", "passes", "lr", "decay", "drop_path", "layer_decay"), VITDET
)
def test_recipes_of_vitdet_are_detectron2s(
    name: str,
    backbone: str,
    start: str,
    passes: int,
    lr: float,
    decay: float,
    drop_path: float,
    layer_decay: float | None,
):
    config = config_of(name)
    model, phase = config.model, config.phases["train"]
    assert (model.backbone, model.drop_path) == (backbone, drop_path)
    assert phase.layer_decay == layer_decay
    assert (phase.start_from.source, phase.passes) == (start, passes)
    assert (phase.optimizer, phase.betas, phase.lr, phase.weight_decay) == (
        "adamw", (0.9, 0.999), lr, decay,
    )  # fmt: skip
    # 184,375 steps of 64 images are 100 passes; drops at 163,889 and 177,546.
    assert (phase.images_per_step, phase.warmup_steps, phase.warmup_factor) == (64, 250, 0.001)
    steps = in_steps(phase, 184_375 / 100)
    assert steps.steps == pytest.approx(184_375 * passes / 100, abs=1)
    expected = [163_889 * passes / 100, 177_546 * passes / 100]
    assert drop_points(steps) == pytest.approx(expected, rel=3e-4)
    assert (phase.resize.kind, phase.resize.size) == ("jitter", 1024)
    assert phase.resize.jitter_range == (0.1, 2.0)
    # configs/common/models/mask_rcnn_vitdet.py and mask_rcnn_fpn.py; of Swin
    # cascade_mask_rcnn_mvitv2_b_in21k_100ep.py.
    is_swin = backbone.startswith("swin")
    assert model.neck == ("fpn" if is_swin else "simple")
    assert (model.norm, head_norm(model), model.box_head) == ("ln", "ln", "4conv1fc")
    assert model.detector == ("cascade_mask_rcnn" if is_swin else "mask_rcnn")
    assert model.relative_positions == (name.startswith("vitdet_"))
    assert model.pad_to_square
    rpn = proposal_limits(model.rpn, model.detector)
    assert (rpn.num_convs, rpn.low_quality_iou, rpn.border, rpn.box_beta) == (2, 0.0, None, 0.0)
    limits = (rpn.train_candidates, rpn.train_proposals, rpn.test_candidates, rpn.test_proposals)
    assert limits == (2000, 1000, 1000, 1000)
    roi = model.roi
    assert (roi.sampling_ratio, roi.box_loss, roi.nms, roi.nms_iou) == (0, "l1", "hard", 0.5)


def test_what_was_not_run_says_what_to_expect_and_on_how_many_gpus():
    for name in [name for name, *_ in VITDET if ":" not in name]:
        text = (CONFIGS / f"{name}.yaml").read_text()
        assert "box AP" in text, name
        assert "Sized for 64 GPUs" in text, name
        assert "Not run by us." in text, name
