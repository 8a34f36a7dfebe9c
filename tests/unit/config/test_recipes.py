"""The shipped configs and sweeps have the papers' numbers, written here from the papers alone."""

from __future__ import annotations

import pytest

from bigdet.config.derived import drop_points, in_steps, plan_of
from bigdet.config.schema import PhaseConfig
from bigdet.training.optim import scaled_lr
from tests.shipped import CONFIG_NAMES, config_of, sweep_of

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
    ("less_data:random_10k", "train", (220 * K, 16, 0.04, [146.667, 201.667], FULL)),
    ("less_data:imagenet_10k", "train", (60 * K, 16, 0.04, [40, 55], FULL)),
    ("voc_r101_gn", "train", (144 * K, 16, 0.02, [96, 132], FULL)),
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
    ("table1:size_224_batch_2", "pretrain", (1056 * K, 16, 0.02, [], (224, 224))),
    ("table1:size_640_batch_4", "pretrain", (528 * K, 32, 0.04, [], (640, 640))),
    ("table1:size_448_batch_8", "pretrain", (264 * K, 64, 0.08, [], SMALL)),
    ("table1:scratch_bn_4x", "train", (352 * K, 16, 0.02, [234.667, 322.667], FULL)),
    ("table3:p4x_2x", "finetune", (176 * K, 16, 0.02, [117.333, 161.333], FULL)),
    ("table6:scratch_syncbn_3x", "train", (270 * K, 16, 0.02, [210, 250], FULL)),
    ("table9:direct", "pretrain", (60 * K, 64, 0.08, [], SMALL)),
    ("table9:direct", "finetune", (30 * K, 16, 0.04, [20, 27.5], FULL)),
    ("voc_r50_direct", "pretrain", (93 * K, 64, 0.08, [], SMALL)),
    ("voc_r50_direct", "finetune", (12_400, 16, 0.01, [9.3], (600, 1000))),
    ("voc:r50_imagenet", "train", (12_400, 16, 0.01, [9.3], (600, 1000))),
    ("presets:stitcher", "pretrain", (88 * K, 64, 0.08, [], (400, 666))),
]  # fmt: skip


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
            expected = (decay, 0.9) if phase.optimizer == "sgd" else (0.05, 0.9)
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
        "direct_fixed": "fixed", "direct_affine": "affine", "direct_sync": "sync",
        "imagenet_affine": "affine", "imagenet_fixed": "fixed", "imagenet_sync": "sync",
    }  # fmt: skip


def test_sizes_of_images_that_vary_are_those_of_the_papers():
    ranges = {
        "augmentation:r50_random_9x": (640, 800), "x152_gn_late_cascade": (640, 800),
        "keypoint_r50_gn": (640, 800), "vgg16_scratch": (640, 800), "r50_gn_scratch": None,
        "less_data:random_1k": (512, 800), "less_data:random_35k_default": None,
    }  # fmt: skip
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


@pytest.mark.parametrize(("sweep", "prefixes"), [
    ("figure1", ["random", "imagenet"]), ("figure1_r101", ["random", "imagenet"]),
    ("syncbn", ["r50_random", "r50_imagenet", "r101_random", "r101_imagenet"]),
])  # fmt: skip
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
    assert list(sweep_of("table1")[1])[:12] == [
        f"size_{size}_batch_{batch}" for size in (224, 320, 448, 640) for batch in (2, 4, 8)
    ]
    assert {f"p{n}x_{m}x" for n in (1, 2, 3, 4) for m in (1, 2)} <= set(sweep_of("table3")[1])
    passes = {run.config.phases["finetune"].passes for run in sweep_of("figure4")[1].values()}
    assert passes == set(range(9, 16))
    parts = [run.config.phases for run in sweep_of("table5")[1].values()][:5]
    assert [p["finetune"].start_from.parts for p in parts] == [
        None, ["backbone", "fpn", "rpn", "box_head"], ["backbone", "fpn", "rpn"],
        ["backbone", "fpn"], ["backbone"],
    ]  # fmt: skip
