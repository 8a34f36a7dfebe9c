"""The shipped configs and sweeps have the papers' numbers, written here from the papers alone."""

from __future__ import annotations

import pytest

from bigdet.config.phase import PhaseConfig, drop_points, in_steps
from bigdet.config.resize import plan_of
from bigdet.config.rpn import proposal_limits
from bigdet.training.optim import scaled_lr
from tests.shipped import CONFIG_NAMES, CONFIGS, config_of, sweep_of

K = 1000


def numbers(phase: PhaseConfig) -> tuple[object, ...]:
    """Steps, images per step, rate, thousands of steps at drops, weight decay, sides."""
    images = phase.images_per_step
    assert images is not None
    if phase.images is not None:
        phase = in_steps(phase, 1 / images)
    drops = [] if phase.schedule == "constant" else [round(x) / K for x in drop_points(phase)]
    return phase.steps, images, scaled_lr(phase, images), drops, plan_of(phase.resize)


FULL, SMALL = (800, 1333), (448, 448)
FINETUNE = (88 * K, 16, 0.02, [58.667, 80.667], FULL)  # 8 and 11 of 12 passes
RECIPES = [
    # Paper 1: 1x is 90k steps of 16 images; drops at the last 60k and 20k whatever the length.
    ("r50_gn_scratch", "train", (540 * K, 16, 0.02, [480, 520], FULL)),
    ("r50_syncbn_scratch", "train", (540 * K, 16, 0.02, [480, 520], FULL)),
    ("r50_gn_imagenet", "train", (180 * K, 16, 0.02, [120, 160], FULL)),
    ("figure1:random_5x", "train", (450 * K, 16, 0.02, [390, 430], FULL)),
    ("figure1_r101:imagenet_3x", "train", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("syncbn:r101_imagenet_4x", "train", (360 * K, 16, 0.02, [300, 340], FULL)),
    ("augmentation:r50_random_9x", "train", (810 * K, 16, 0.02, [750, 790], FULL)),
    ("augmentation:r101_imagenet_6x", "train", (540 * K, 16, 0.02, [480, 520], FULL)),
    ("r50_gn_cascade", "train", (540 * K, 16, 0.02, [], FULL)),
    ("r50_gn_cascade", "cascade", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("x152_gn_late_cascade", "train", (540 * K, 16, 0.02, [], FULL)),
    ("x152_gn_late_cascade", "cascade", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("augmentation:x152_imagenet_6x_cascade", "train", (270 * K, 16, 0.02, [], FULL)),
    ("keypoint_r50_gn", "train", (180 * K, 16, 0.02, [120, 160], FULL)),
    ("keypoints:imagenet_3x", "train", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("vgg16_scratch", "train", (990 * K, 16, 0.02, [930, 970], FULL)),
    ("vgg16:imagenet_9x", "train", (810 * K, 16, 0.02, [750, 790], FULL)),
    ("less_data:random_35k", "train", (540 * K, 16, 0.04, [480, 520], FULL)),
    # "We simply" drop at the last 60k and 20k "no matter how many total iterations" (section 4),
    # which 60k and 18k steps do not have; 35k images take 6x from both starts (section 5.2).
    ("less_data:imagenet_35k", "train", (540 * K, 16, 0.04, [480, 520], FULL)),
    ("less_data:imagenet_35k_default", "train", (540 * K, 16, 0.02, [480, 520], FULL)),
    ("less_data_grid:lr_0_08_decay_0_02", "train", (540 * K, 16, 0.08, [480, 520], FULL)),
    ("less_data:random_10k", "train", (220 * K, 16, 0.04, [160, 200], FULL)),
    ("less_data:random_3_5k", "train", (220 * K, 16, 0.04, [160, 200], FULL)),
    ("less_data:random_1k", "train", (220 * K, 16, 0.04, [160, 200], FULL)),
    ("less_data:imagenet_10k", "train", (60 * K, 16, 0.04, [40, 55], FULL)),
    ("voc_r101_gn", "train", (144 * K, 16, 0.02, [84, 124], FULL)),
    ("voc:r101_imagenet", "train", (18 * K, 16, 0.02, [12, 16.5], FULL)),
    # Paper 2: 8 GPUs x 8 images at lr 0.08, then 8 x 2 at 0.02.
    ("r50_direct", "pretrain", (88 * K, 64, 0.08, [], SMALL)),
    ("r50_direct", "finetune", FINETUNE),
    ("r50_imagenet", "train", FINETUNE),
    ("retinanet_r50_direct", "pretrain", (88 * K, 64, 0.04, [], SMALL)),
    ("retinanet_r50_direct", "finetune", FINETUNE),
    ("table8:retinanet_imagenet", "train", (88 * K, 16, 0.01, [58.667, 80.667], FULL)),
    ("swin_t_direct", "pretrain", (88 * K, 64, 4e-4, [], SMALL)),
    ("swin_t_direct", "finetune", (88 * K, 16, 1e-4, [58.667, 80.667], FULL)),
    ("swin_t_imagenet", "train", (88 * K, 16, 1e-4, [58.667, 80.667], FULL)),
    ("table8:swin_t_direct_p3x", "pretrain", (264 * K, 64, 4e-4, [], SMALL)),
    # "Fixed steps K" (section 3.1; 261k at 3x in figure 2): 3 x 88k at every batch, lr by batch.
    ("table1:size_224_batch_2", "pretrain", (264 * K, 16, 0.02, [], (224, 224))),
    ("table1:size_640_batch_4", "pretrain", (264 * K, 32, 0.04, [], (640, 640))),
    ("table1:size_448_batch_8", "pretrain", (264 * K, 64, 0.08, [], SMALL)),
    ("table1:size_320_batch_16", "pretrain", (264 * K, 128, 0.16, [], (320, 320))),
    # "12 epochs (88k steps)", section 3.
    ("presets:paper", "pretrain", (88 * K, 64, 0.08, [], SMALL)),
    # Table 5's last row is table 3's P4x+1x; figure 4 is after P3x (section 4.3).
    ("table5:mask_head", "pretrain", (352 * K, 64, 0.08, [], SMALL)),
    ("table5:backbone", "pretrain", (352 * K, 64, 0.08, [], SMALL)),
    ("table3:p4x_1x", "pretrain", (352 * K, 64, 0.08, [], SMALL)),
    ("figure4:passes_24", "pretrain", (264 * K, 64, 0.08, [], SMALL)),
    # Table 10's 3x is 264k steps (the author; its cost column).
    ("table10:scratch_640", "train", (264 * K, 64, 0.08, [176, 242], (640, 640))),
    ("table1:scratch_bn_4x", "train", (352 * K, 16, 0.02, [234.667, 322.667], FULL)),
    ("table3:p4x_2x", "finetune", (176 * K, 16, 0.02, [117.333, 161.333], FULL)),
    ("table6:scratch_syncbn_3x", "train", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("table9:direct", "pretrain", (60 * K, 64, 0.08, [], SMALL)),
    ("table9:direct", "finetune", (30 * K, 16, 0.04, [20, 27.5], FULL)),
    ("voc_r50_direct", "pretrain", (93 * K, 64, 0.08, [], SMALL)),
    ("voc_r50_direct", "finetune", (12_400, 16, 0.01, [9.3], (600, 1000))),
    ("voc:r50_imagenet", "train", (12_400, 16, 0.01, [9.3], (600, 1000))),
    ("presets:stitcher", "pretrain", (88 * K, 64, 0.08, [], (400, 666))),
]


@pytest.mark.parametrize(("name", "phase", "expected"), RECIPES)
def test_recipes_are_those_of_the_papers(name: str, phase: str, expected: tuple[object, ...]):
    found = numbers(config_of(name).phases[phase])
    *others, drops, plan = found
    assert others == pytest.approx(expected[:3])
    assert drops == pytest.approx(expected[3], abs=1e-3)
    assert plan == expected[4]


def test_weight_decay_and_momentum_are_those_of_the_papers():
    for name in set(CONFIG_NAMES) - {"quickstart", "small_direct", "small_scratch"}:
        for phase in config_of(name).phases.values():
            decay = 4e-5 if name == "r50_lsj_scratch" else 1e-4
            of_adamw = 0.1 if name.startswith(("vitdet", "eva02", "dinov3")) else 0.05
            expected = (decay, 0.9) if phase.optimizer == "sgd" else (of_adamw, 0.9)
            assert (phase.weight_decay, phase.momentum) == expected, name


def test_large_scale_jitter_is_detectron2s():
    # 184,375 steps of 64 images, drops at 163,889 and 177,546, twice and four times as long.
    for name, times in (("passes_100", 1), ("passes_200", 2), ("passes_400", 4)):
        phase = config_of(f"lsj:{name}").phases["train"]
        steps = in_steps(phase, 184_375 / 100)
        assert (steps.steps, phase.images_per_step, phase.lr) == (184_375 * times, 64, 0.1)
        expected = [163_889 * times, 177_546 * times]
        assert drop_points(steps) == pytest.approx(expected, rel=3e-4)
        assert (phase.resize.kind, phase.resize.size) == ("jitter", 1024)
        assert phase.resize.jitter_range == (0.1, 2.0)


def test_normalization_and_heads_are_those_of_the_papers():
    gn, syncbn, direct = (
        config_of(name) for name in ("r50_gn_scratch", "r50_syncbn_scratch", "r50_direct")
    )
    assert (gn.model.norm, gn.model.norm_scope, gn.model.box_head) == ("gn", None, "4conv1fc")
    assert (syncbn.model.norm, syncbn.model.norm_scope) == ("bn", "all")
    assert syncbn.phases["train"].norm_mode == "sync"
    assert (direct.model.norm, direct.model.norm_scope) == ("bn", None)
    assert direct.model.box_head == "4conv1fc"
    modes = {name: (p.norm_mode, p.freeze_stages) for name, p in direct.phases.items()}
    assert modes == {"pretrain": ("live", 0), "finetune": ("fixed", 2)}
    # The baselines of paper 2 are mmdetection's own: 2fc, BN with fixed statistics.
    baseline = config_of("r50_imagenet")
    assert baseline.model.box_head == "2fc"
    assert baseline.phases["train"].norm_mode == "affine"
    for name in ("table8:cascade_direct", "table8:cascade_imagenet"):
        model = config_of(name).model
        assert (model.box_head, model.cascade.gradients) == ("2fc", "mmdet")
        assert (model.roi.box_loss, model.roi.box_beta) == ("smooth_l1", 1.0)
        assert model.rpn.box_beta == pytest.approx(1 / 9, abs=1e-4)
    modes = {name: run.config.phases for name, run in sweep_of("table2")[1].items()}
    assert {n: next(reversed(p.values())).norm_mode for n, p in modes.items()} == {
        "direct_fixed": "fixed",
        "direct_affine": "affine",
        "direct_sync": "sync",
        "imagenet_affine": "affine",
        "imagenet_fixed": "fixed",
        "imagenet_sync": "sync",
    }


def test_sizes_of_images_that_vary_are_those_of_the_papers():
    ranges = {
        "augmentation:r50_random_9x": (640, 800),
        "x152_gn_late_cascade": (640, 800),
        "keypoint_r50_gn": (640, 800),
        "vgg16_scratch": (640, 800),
        "r50_gn_scratch": None,
        "less_data:random_1k": (512, 800),
        "less_data:random_35k_default": None,
    }
    for name, expected in ranges.items():
        assert config_of(name).phases["train"].resize.size_range == expected, name
    several = [640, 672, 704, 736, 768, 800]
    for name in sweep_of("table6")[1]:
        assert list(config_of(f"table6:{name}").phases.values())[-1].resize.sizes == several
    assert config_of("presets:paper").phases["pretrain"].resize.variant == "paper"
    assert config_of("r50_direct").phases["pretrain"].resize.scale_range == (0.8, 1.2)


def test_less_data_is_as_much_as_the_papers_say():
    images = {
        name: run.config.data.train.subset.images for name, run in sweep_of("less_data")[1].items()
    }
    assert set(images.values()) == {35 * K, 10 * K, 3500, 1 * K}
    assert images["imagenet_3_5k"] == 3500
    for name, run in sweep_of("less_data")[1].items():
        is_default = name.endswith("default")
        assert run.config.phases["train"].decay_factor == (0.1 if is_default else 0.02), name
    assert config_of("table9:direct").data.train.subset.images == 11_727  # of 117,266


@pytest.mark.parametrize(
    ("sweep", "prefixes"),
    [
        ("figure1", ["random", "imagenet"]),
        ("figure1_r101", ["random", "imagenet"]),
        ("syncbn", ["r50_random", "r50_imagenet", "r101_random", "r101_imagenet"]),
    ],
)
def test_all_lengths_of_figure_1_begin_in_the_longest(sweep: str, prefixes: list[str]):
    runs = sweep_of(sweep)[1]
    assert list(runs) == [f"{prefix}_{n}x" for prefix in prefixes for n in (6, 5, 4, 3, 2)]
    for prefix in prefixes:
        assert runs[f"{prefix}_6x"].config.checkpoint.at == [
            f"train-{n}" for n in (120_000, 210_000, 300_000, 390_000)
        ]
        for n in (5, 4, 3, 2):
            run = runs[f"{prefix}_{n}x"]
            assert run.config.phases["train"].steps == n * 90 * K
            assert (
                run.config.resume == f"runs/{sweep}/{prefix}_6x/checkpoints/train-{n * 90 - 60}000"
            )
            depth = "resnet101" if "r101" in f"{sweep}{prefix}" else "resnet50"
            assert run.config.model.backbone == depth


def test_the_tables_have_every_cell():
    assert list(sweep_of("table1")[1])[:16] == [
        f"size_{size}_batch_{batch}" for size in (224, 320, 448, 640) for batch in (2, 4, 8, 16)
    ]
    assert {f"p{n}x_{m}x" for n in (1, 2, 3, 4) for m in (1, 2)} <= set(sweep_of("table3")[1])
    passes = {run.config.phases["finetune"].passes for run in sweep_of("figure4")[1].values()}
    assert passes == {6, *range(9, 16), 18, 24}
    parts = [run.config.phases for run in sweep_of("table5")[1].values()][:5]
    assert [p["finetune"].start_from.parts for p in parts] == [
        None,
        ["backbone", "fpn", "rpn", "box_head"],
        ["backbone", "fpn", "rpn"],
        ["backbone", "fpn"],
        ["backbone"],
    ]


DETECTRON = [
    "r50_gn_scratch", "r50_gn_imagenet", "r50_syncbn_scratch", "r50_gn_cascade",
    "x152_gn_late_cascade", "keypoint_r50_gn", "vgg16_scratch", "voc_r101_gn",
    "augmentation:r101_imagenet_6x", "less_data:random_1k", "figure1:random_5x",
    "syncbn:r101_imagenet_2x",
]  # fmt: skip
"""Paper 1's runs, which Detectron trained."""


@pytest.mark.parametrize("name", DETECTRON)
def test_losses_anchors_and_biases_of_paper_1_are_detectrons(name: str):
    # detectron/core/config.py and modeling/: RPN smooth L1 with beta 1/9, box head with 1; straddle
    # threshold 0; an object's best anchor whatever it overlaps; biases at twice the rate, without
    # decay, and GN's parameters without; RoIAlign with 2x2 points; crowds are not filtered.
    config = config_of(name)
    rpn, roi = config.model.rpn, config.model.roi
    assert (rpn.low_quality_iou, rpn.border) == (0.0, 0)
    assert rpn.box_beta == pytest.approx(1 / 9, abs=1e-4)
    assert (roi.box_loss, roi.box_beta) == ("smooth_l1", 1.0)
    assert (roi.sampling_ratio, roi.crowd_coverage) == (2, None)
    for phase in config.phases.values():
        found = (phase.decay_norms, phase.decay_biases, phase.bias_lr_factor)
        assert found == (False, False, 2.0)
        is_varied = phase.resize.size_range is not None
        assert phase.resize.draw == ("image" if is_varied else "step")


RELEASED = [
    "r50_direct",
    "r50_imagenet",
    "table3:scratch_syncbn_6x",
    "table6:scratch_syncbn_3x",
    "table10:scratch_640",
    "table8:faster_direct",
    "table1:scratch_bn_4x",
    "voc_r50_direct",
]


@pytest.mark.parametrize("name", RELEASED)
def test_losses_and_anchors_of_paper_2_are_those_of_the_released_code(name: str):
    # configs/_base_/models of mmdetection 2.13: L1 losses; min_pos_iou 0.3, allowed_border -1;
    # nms_pre 2000, max_per_img 1000; ignore_iof_thr -1; one learning rate for all.
    config = config_of(name)
    rpn, roi = proposal_limits(config.model.rpn, config.model.detector), config.model.roi
    assert (rpn.low_quality_iou, rpn.border, rpn.box_beta) == (0.3, None, 0.0)
    assert (rpn.train_candidates, rpn.train_proposals) == (2000, 1000)
    assert (roi.box_loss, roi.crowd_coverage) == ("l1", None)
    for phase in config.phases.values():
        assert (phase.decay_biases, phase.bias_lr_factor) == (True, 1.0)


def test_cascades_of_paper_2_leave_out_anchors_that_cross_the_border():
    # cascade_rcnn_r50_fpn.py: allowed_border 0, max_per_img 2000, min_pos_iou 0.3.
    for name in ("table8:cascade_direct", "table8:cascade_imagenet"):
        model = config_of(name).model
        rpn = proposal_limits(model.rpn, model.detector)
        assert (rpn.border, rpn.low_quality_iou) == (0, 0.3)
        assert (rpn.train_candidates, rpn.train_proposals) == (2000, 2000)


def test_syncbn_of_paper_2_is_in_the_backbone_only_and_of_paper_1_everywhere():
    # Paper 2, section 4.2: "the same network architecture"; table 7.
    for name in ("table3:scratch_syncbn_6x", "table6:scratch_syncbn_3x", "table10:scratch_640"):
        config = config_of(name)
        assert (config.model.norm, config.model.norm_scope) == ("bn", "backbone"), name
        assert config.phases["train"].norm_mode == "sync"
    for name in ("r50_syncbn_scratch", "syncbn:r50_random_6x", "syncbn:r101_imagenet_2x"):
        assert config_of(name).model.norm_scope == "all", name


def test_norms_are_decayed_where_the_released_code_does():
    # schedule_1x.py has no paramwise_cfg; the pre-training has norm_decay_mult=0.
    for name, phase, expected in (
        ("r50_imagenet", "train", True),
        ("table2:imagenet_affine", "train", True),
        ("table2:imagenet_sync", "train", True),
        ("table2:direct_affine", "finetune", True),
        ("table2:direct_sync", "finetune", True),
        ("table2:direct_fixed", "finetune", False),
        ("table2:imagenet_fixed", "train", False),
        ("r50_direct", "pretrain", False),
        ("table2:direct_affine", "pretrain", False),
        ("table8:retinanet_imagenet", "train", True),
        ("swin_t_imagenet", "train", False),
    ):
        assert config_of(name).phases[phase].decay_norms == expected, name


def test_keypoints_are_trained_as_paper_1_says():
    # 4conv1fc with GN as the baseline; Detectron: 2000 candidates a level, images without a
    # labeled keypoint left out, fewer than 20 keypoints not learned from. detectron2: 1500.
    config = config_of("keypoint_r50_gn")
    model = config.model
    assert (model.box_head, model.norm) == ("4conv1fc", "gn")
    assert (model.rpn.train_candidates, model.rpn.train_proposals) == (2000, 1500)
    assert (config.data.train.min_keypoints, model.keypoint.min_visible) == (1, 20)


def test_detectron2s_jitter_samples_and_matches_as_detectron2():
    model = config_of("r50_lsj_scratch").model
    assert (model.roi.sampling_ratio, model.rpn.low_quality_iou, model.rpn.border) == (0, 0.0, None)


def test_several_scales_are_drawn_for_each_image():
    for name in sweep_of("table6")[1]:
        assert list(config_of(f"table6:{name}").phases.values())[-1].resize.draw == "image"


def test_what_follows_later_practice_is_said_at_the_top():
    for name in [name for name in (*DETECTRON, *RELEASED) if ":" not in name]:
        text = (CONFIGS / f"{name}.yaml").read_text()
        assert "# Later practice, not the paper's: bf16" in text, name
    for name in ("r50_gn_cascade", "x152_gn_late_cascade"):
        assert "class-agnostic" in (CONFIGS / f"{name}.yaml").read_text()
