from bigdet.config.derived import largest_plan, plan_of
from bigdet.config.schema import ResizeConfig


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
