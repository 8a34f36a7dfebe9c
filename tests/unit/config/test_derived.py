from bigdet.config.derived import (
    is_class_agnostic,
    largest_plan,
    phase_model,
    plan_of,
    start_parts,
)
from bigdet.config.schema import (
    ModelConfig,
    PhaseConfig,
    PhaseModelConfig,
    ResizeConfig,
    RoiConfig,
    RunConfig,
    StartFromConfig,
)


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
        *shared, "mask_head"
    ]  # fmt: skip
