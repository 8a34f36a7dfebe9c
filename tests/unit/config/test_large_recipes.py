"""The configs of large backbones have the numbers of the code that they are from."""

from __future__ import annotations

import pytest

from bigdet.config.model import model_parts
from bigdet.config.phase import drop_points, in_steps
from bigdet.config.rpn import proposal_limits
from bigdet.config.run import phase_data, phase_model, phase_source, start_parts
from bigdet.models.build import build_detector, head_norm
from bigdet.pieces.building import parameters_on_meta
from bigdet.training.optim import build_optimizer
from tests.shipped import CONFIGS, config_of

SWIN = "patch4_window7_224.ms_in22k"
TIMM_B, TIMM_L = "timm:vit_base_patch16_224", "timm:vit_large_patch16_224"
DEIT_L = "timm:deit3_large_patch16_224"
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
    ("vitdet:b_in21k", TIMM_B, f"{TIMM_B}.augreg_in21k", 50, 8e-5, 0.1, 0.1, None),
    ("vitdet:l_in21k", TIMM_L, f"{TIMM_L}.augreg_in21k", 50, 8e-5, 0.1, 0.4, None),
    ("vitdet:l_in1k", DEIT_L, f"{DEIT_L}.fb_in1k", 50, 8e-5, 0.1, 0.4, None),
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


PYRAMID_NORMS = ("backbone.pyramid.0.1.weight", "backbone.pyramid.0.1.bias")


@pytest.mark.parametrize(
    ("name", "depth", "decay"),
    [("vitdet_b", 12, 0.7), ("vitdet_l", 24, 0.8), ("vitdet_h", 32, 0.9)],
)
def test_vitdet_decays_weights_and_rates_as_its_head_says(name: str, depth: int, decay: float):
    # Rates: get_vit_lr_decay_rate of detectron2's vit.py, depth + 2 layers. Weight decay: 0.1, and
    # 0 for norms and absolute positions (mask_rcnn_vitdet_b_100ep.py; in _h_75ep.py for none).
    config = config_of(name)
    phase = config.phases["train"]
    with parameters_on_meta():
        detector = build_detector(config.model, 80)
    groups = build_optimizer(detector, phase).param_groups
    assert len(groups) <= 2 * (depth + 2)
    of = {id(p): (g["weight_decay"], g["lr_factor"]) for g in groups for p in g["params"]}
    for parameter_name, parameter in detector.named_parameters():
        words = parameter_name.split(".")
        is_norm = "norm" in parameter_name and parameter.ndim == 1
        is_plain = is_norm or words[-1] == "pos_embed" or parameter_name in PYRAMID_NORMS
        place = depth + 1
        if words[:2] == ["backbone", "blocks"]:
            place = int(words[2]) + 1
        elif words[:2] == ["backbone", "patch_embed"]:
            place = 0
        expected = (0.0 if is_plain else 0.1, pytest.approx(decay ** (depth + 1 - place)))
        assert of[id(parameter)] == expected, parameter_name


EVA02 = [
    # Name, phase, detector, images and steps, rate, drop path, drops, warm-up, decay of the
    # average, patches in a window.
    # EVA-02/det of baaivision/EVA: eva2_coco_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8.py,
    # eva2_o365_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py,
    # eva2_o365_to_coco_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py.
    ("eva02_l_cascade", "train", "cascade_mask_rcnn", (128, 60_000), 5e-5, 0.4, [0.8, 0.9], 1000,
     None, 32),
    ("eva02_l_objects365", "objects365", "cascade_rcnn", (160, 400_000), 6e-5, 0.4, [0.8, 0.9],
     5000, None, 16),
    ("eva02_l_objects365", "coco", "cascade_mask_rcnn", (64, 40_000), 4e-5, 0.3, [], 400, 0.9999,
     16),
]  # fmt: skip


@pytest.mark.parametrize(
    (
        "name",
        "phase_name",
        "detector",
        "length",
        "lr",
        "drop_path",
        "drops",
        "warm_up",
        "average",
        "window",
    ),
    EVA02,
)
def test_recipes_of_eva02_are_its_repositorys(
    name: str,
    phase_name: str,
    detector: str,
    length: tuple[int, int],
    lr: float,
    drop_path: float,
    drops: list[float],
    warm_up: int,
    average: float | None,
    window: int,
):
    config = config_of(name)
    model, phase = phase_model(config, phase_name), config.phases[phase_name]
    # Blocks 2, 5, ..., 23 of 24, counted from 0, attend over the whole image.
    assert (model.rope_window, model.global_blocks) == (window, 8)
    assert (model.detector, model.backbone) == (detector, "timm:eva02_large_patch14_224")
    assert (model.drop_path, phase.layer_decay, phase.lr) == (drop_path, 0.8, lr)
    assert (phase.images_per_step, phase.steps) == length
    found = (
        [] if phase.schedule == "constant" else [drop / length[1] for drop in drop_points(phase)]
    )
    assert found == pytest.approx(drops)
    assert (phase.warmup_steps, phase.warmup_factor) == (warm_up, 0.001)
    # common/optim.py; LSJ at 1536.
    assert (phase.optimizer, phase.betas, phase.weight_decay) == ("adamw", (0.9, 0.999), 0.1)
    assert (phase.resize.kind, phase.resize.size) == ("jitter", 1536)
    assert (None if phase.ema is None else phase.ema.decay) == average
    rpn = proposal_limits(model.rpn, model.detector)
    assert (rpn.num_convs, rpn.train_candidates, rpn.train_proposals) == (2, 2000, 1000)
    assert (model.neck, model.norm, model.box_head) == ("simple", "ln", "4conv1fc")
    if detector == "cascade_mask_rcnn":
        # README.md of EVA-02/det: linear soft-NMS from 0.6; fast_rcnn.py: min_score 1e-3.
        roi = model.roi
        assert (roi.nms, roi.nms_iou, roi.score_threshold) == ("linear", 0.6, 0.001)


def test_the_ladder_of_dinov3_rises_from_1536_to_2048():
    # DINOv3's detector: Objects365 22 passes at 1536 and 1 at 2048, COCO 12 at 2048; the backbone
    # is frozen, four layers at even depths (10, 20, 30, 40 of 40) are concatenated, 3x3 windows.
    config = config_of("dinov3_l_ladder")
    phases = config.phases.values()
    assert [(p.passes, p.resize.size) for p in phases] == [(22, 1536), (1, 2048), (12, 2048)]
    assert all(phase.freeze == "backbone" for phase in phases)
    assert (config.model.taps, config.model.image_windows) == ([6, 12, 18, 24], 3)


@pytest.mark.parametrize("name", ["eva02_l_objects365", "dinov3_l_ladder", "objects365_direct"])
def test_ladders_are_on_objects365_until_their_last_phase_on_coco(name: str):
    config = config_of(name)
    *first, last = config.phases
    for phase in first:
        data = phase_data(config, phase)
        assert data.train.shards == "data/objects365/train"
        assert data.val.shards == "data/objects365/val"
    assert phase_data(config, last) == config.data == config_of("r50_direct").data
    assert phase_source(config, last) == "previous"
    masks = {"mask_head"} & {*model_parts(phase_model(config, last))}
    handed = {*model_parts(phase_model(config, last))} - masks
    assert {*start_parts(config, last)} == handed


def test_dinov3_is_frozen_or_tuned_with_the_rates_of_vitdet():
    vitdet = config_of("vitdet_l").phases["train"]
    for name, freeze, layer_decay in (("frozen", "backbone", None), ("tuned", None, 0.8)):
        config = config_of(f"dinov3_l_{name}")
        phase = config.phases["train"]
        assert config.model.backbone == "timm:vit_large_patch16_dinov3"
        assert (phase.freeze, phase.layer_decay) == (freeze, layer_decay)
        assert (phase.lr, phase.weight_decay) == (vitdet.lr, vitdet.weight_decay)
        assert (phase.images_per_step, phase.resize) == (vitdet.images_per_step, vitdet.resize)


LARGE = [*dict.fromkeys(n for n, *_ in (*VITDET, *EVA02) if ":" not in n), "dinov3_l_frozen",
         "dinov3_l_tuned", "dinov3_l_ladder"]  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_was_not_run_says_what_to_expect_and_on_how_many_gpus(name: str):
    text = (CONFIGS / f"{name}.yaml").read_text().replace("\n# ", " ")
    assert "box AP" in text or "No number to expect" in text
    assert "Sized for " in text
    assert "Not run yet by us." in text
