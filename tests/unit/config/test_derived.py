from pathlib import Path

import pytest

from bigdet.config.heads import RoiConfig
from bigdet.config.load import load_config
from bigdet.config.model import ModelConfig, is_class_agnostic
from bigdet.config.phase import PhaseConfig, PhaseModelConfig, in_steps
from bigdet.config.resize import ResizeConfig, largest_plan, plan_of
from bigdet.config.run import RunConfig, imported_cost, phase_model, start_parts
from bigdet.config.start import StartFromConfig

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("options", "steps_per_unit", "steps", "drops"),
    [
        # Paper 2's fine-tuning: 12 passes of 7330 steps, drops after 8 and 11.
        ({"passes": 12, "drops": [8, 11]}, 7330, 87_960, [58_640, 80_630]),
        ({"passes": 1.1}, 10, 11, None),
        ({"passes": 0.01}, 10, 1, None),
        # Paper 1's 2x is 2.88 million images: 180k steps of 16, 45k of 64.
        ({"images": 2_880_000, "drops": [-960_000, -320_000]}, 1 / 64, 45_000, [30_000, 40_000]),
        ({"steps": 540_000, "drops": [-60_000, 530_000]}, 1, 540_000, [480_000, 530_000]),
    ],
)
def test_lengths_and_drops_become_steps(options, steps_per_unit, steps, drops):
    phase = in_steps(PhaseConfig(images_per_gpu=2, lr=1.0, **options), steps_per_unit)
    assert (phase.steps, phase.drops) == (steps, drops)
    assert phase.passes is phase.images is None


def test_a_stated_cost_stays_with_the_weights():
    cost = ["phases.pretrain.start_from.source=timm", "phases.pretrain.start_from.cost.images=10"]
    config = load_config(CONFIG, [*cost, "phases.pretrain.start_from.cost.gpu_seconds=2.5"])
    assert imported_cost(config, "pretrain") == {"images": 10, "gpu_seconds": 2.5}
    assert imported_cost(config, "finetune") == {"images": 10, "gpu_seconds": 2.5}
    anew = ["phases.finetune.start_from.source=random", "phases.finetune.norm_mode=live"]
    config = load_config(CONFIG, [*cost, *anew])
    assert imported_cost(config, "finetune") == {}
    config = load_config(
        CONFIG,
        [
            "phases.pretrain.start_from.source=timm",
            "phases.pretrain.start_from.cost.preset=imagenet",
        ],
    )
    # 1.28M images x 100 passes, 1 object each, 224 x 224 pixels
    assert imported_cost(config, "finetune") == {
        "images": 128e6,
        "instances": 128e6,
        "pixels": 128e6 * 50_176,
    }


def test_the_cap_is_in_proportion_unless_given():
    assert plan_of(ResizeConfig(kind="short_side", size=800)) == (800, 1333)
    assert plan_of(ResizeConfig(kind="short_side", size=400)) == (400, 666)  # 666.5, to even
    assert plan_of(ResizeConfig(kind="short_side", size=600, cap=1000)) == (600, 1000)


def test_squares_bring_the_long_side_to_the_size():
    assert plan_of(ResizeConfig(kind="direct", size=448)) == (448, 448)
    assert plan_of(ResizeConfig(kind="jitter", size=1024)) == (1024, 1024)


def test_stitcher_is_the_normal_size_divided():
    assert plan_of(ResizeConfig(kind="stitcher", size=800)) == (400, 666)
    assert plan_of(ResizeConfig(kind="stitcher", size=800, cap=1200, divide_by=4)) == (200, 300)


def test_the_largest_size_of_training_is_known_where_it_varies():
    resize = ResizeConfig(kind="short_side", size=800, cap=1400, sizes=[640, 864])
    assert largest_plan(resize) == (864, 1400)
    assert largest_plan(ResizeConfig(kind="short_side", size=800, size_range=(100, 200)))[0] == 800
    assert largest_plan(ResizeConfig(kind="direct", size=448)) == (448, 448)


def run_of(detector, second, source=None, **roi):
    start = StartFromConfig(source=source)
    phases = {
        "train": PhaseConfig(),
        "more": PhaseConfig(model=PhaseModelConfig(detector=second), start_from=start),
    }
    model = ModelConfig(detector=detector, backbone="resnet10", roi=RoiConfig(**roi))
    return RunConfig(model=model, phases=phases)


def test_a_cascade_is_class_agnostic_unless_it_comes_after_a_class_specific_detector():
    late = run_of("mask_rcnn", "cascade_mask_rcnn")
    assert phase_model(late, "train") is late.model
    model = phase_model(late, "more")
    assert model.detector == "cascade_mask_rcnn"
    assert not is_class_agnostic(model)
    assert is_class_agnostic(ModelConfig(detector="cascade_rcnn", backbone="resnet10"))
    agnostic = run_of("mask_rcnn", "cascade_mask_rcnn", class_agnostic=True)
    assert all(is_class_agnostic(phase_model(agnostic, name)) for name in ("train", "more"))


def test_a_phase_loads_what_the_phase_before_has():
    shared = ["backbone", "fpn", "rpn", "box_head"]
    assert start_parts(run_of("faster_rcnn", "mask_rcnn"), "train") == []
    assert start_parts(run_of("faster_rcnn", "mask_rcnn"), "more") == shared
    assert start_parts(run_of("mask_rcnn", "faster_rcnn"), "more") == shared
    assert start_parts(run_of("mask_rcnn", None), "more") == [*shared, "mask_head"]
    assert start_parts(run_of("mask_rcnn", None, source="timm"), "more") == ["backbone"]
    assert start_parts(run_of("faster_rcnn", "mask_rcnn", source="runs/x"), "more") == [
        *shared,
        "mask_head",
    ]
