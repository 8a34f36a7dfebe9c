"""Views: where boxes and pixels land; crops keep a box; nothing draws from a global generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bigdet.config.resize import ResizeConfig
from bigdet.data.examples import views as views_module
from bigdet.data.examples.views import (
    View,
    Views,
    draw_size,
    draw_view,
    resize_of_step,
    whole_view,
)
from bigdet.ops.random import Words

DIRECT = ResizeConfig(kind="direct", size=100)
SHORT_SIDE = ResizeConfig(kind="short_side", size=50, cap=80)


def annotation(bbox, iscrowd=0):
    return {"bbox": bbox, "iscrowd": iscrowd}


def record(height, width, *annotations):
    return {
        "image_id": 1,
        "file_name": "",
        "height": height,
        "width": width,
        "annotations": list(annotations),
    }


def move_boxes(view, boxes):
    views, which = Views([view]), np.zeros(len(boxes), dtype=np.int64)
    return views.clip_boxes(views.move_boxes(boxes, which), which)


def test_boxes_are_scaled_shifted_flipped_and_clipped():
    # 200x100 (h x w) at half size is 100x50; the crop begins at (10, 20) and is 30 wide, 40 high.
    view = View((200, 100), (100, 50), (10, 20), (40, 30), is_flipped=False)
    boxes = np.array([[30.0, 60.0, 20.0, 40.0], [0.0, 0.0, 100.0, 200.0]])  # xywh
    # (30..50, 60..100) / 2 = (15..25, 30..50), minus the corner (5..15, 10..30).
    expected = [[5, 10, 15, 30], [0, 0, 30, 40]]
    np.testing.assert_allclose(move_boxes(view, boxes), expected)
    flipped = View((200, 100), (100, 50), (10, 20), (40, 30), is_flipped=True)
    np.testing.assert_allclose(move_boxes(flipped, boxes), [[15, 10, 25, 30], [0, 0, 30, 40]])


def test_boxes_follow_the_rounded_size_of_the_image():
    # 427x640 becomes 800x1199, not 1199.06: a box of the whole image stays the whole image.
    view = whole_view((427, 640), (800, 1333))
    np.testing.assert_allclose(move_boxes(view, np.array([[0, 0, 640, 427]])), [[0, 0, 1199, 800]])


@pytest.mark.parametrize("is_flipped", [False, True])
def test_the_image_shows_what_the_view_says(is_flipped):
    image = torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    seen = View((20, 30), (20, 30), (4, 5), (10, 12), is_flipped).move_image(image)
    expected = image[:, 5:15, 4:16]
    torch.testing.assert_close(seen, expected.flip(2) if is_flipped else expected)


def test_short_side_shows_the_whole_image():
    view = draw_view(record(100, 125), SHORT_SIDE, 0.0, Words("a"))
    assert view == View((100, 125), (50, 62), (0, 0), (50, 62), is_flipped=False)


def test_direct_scales_the_long_side_and_crops_what_hangs_over():
    views = [draw_view(record(60, 120), DIRECT, 0.5, Words(key)) for key in range(300)]
    long_sides = np.array([view.scaled_size[1] for view in views])
    assert long_sides.min() >= 80
    assert long_sides.max() <= 120
    assert abs(long_sides.mean() - 100) < 5 * 40 / 12**0.5 / 300**0.5  # uniform on 80..120
    for view in views:
        height, width = view.scaled_size
        assert height == 60 * width // 120
        assert view.size == (min(height, 100), min(width, 100))
        assert 0 <= view.origin[0] <= max(0, width - 100)
        assert view.origin[1] == 0
    assert 0.4 < np.mean([view.is_flipped for view in views]) < 0.6
    room = [view for view in views if view.scaled_size[1] > 110]
    assert min(view.origin[0] for view in room) < 2
    assert min(view.scaled_size[1] - 100 - view.origin[0] for view in room) < 2


@pytest.mark.parametrize(("flip", "expected"), [(0.0, False), (1.0, True)])
def test_flips_are_as_probable_as_said(flip, expected):
    views = [draw_view(record(60, 120), DIRECT, flip, Words(key)) for key in range(20)]
    assert all(view.is_flipped is expected for view in views)


def test_a_crop_that_shows_no_box_is_drawn_again():
    # At twice the size 100 of 200 columns are seen. The box, columns 0..30, is in 3 of 10 crops.
    twice = ResizeConfig(kind="direct", size=100, scale_range=(2.0, 2.0))
    sample = record(50, 100, annotation([0, 10, 15, 10]))
    views = [draw_view(sample, twice, 0.0, Words(key)) for key in range(100)]
    assert all(view.origin[0] < 30 for view in views)
    assert len({view.origin[0] for view in views}) > 20  # random still


def test_after_ten_tries_the_crop_is_centered_on_a_box(monkeypatch):
    monkeypatch.setattr(views_module, "CROP_TRIES", 0)
    twice = ResizeConfig(kind="direct", size=100, scale_range=(2.0, 2.0))
    middle = record(50, 100, annotation([60, 10, 10, 10]))  # columns 120..140: center 130
    assert draw_view(middle, twice, 0.0, Words(0)).origin == (80, 0)
    corner = record(50, 100, annotation([0, 10, 10, 10]))
    assert draw_view(corner, twice, 0.0, Words(0)).origin == (0, 0)


def test_crops_need_not_show_a_crowd_or_a_box_without_area():
    twice = ResizeConfig(kind="direct", size=100, scale_range=(2.0, 2.0))
    sample = record(50, 100, annotation([0, 10, 1, 10], iscrowd=1), annotation([0, 10, 0, 10]))
    views = [draw_view(sample, twice, 0.0, Words(key)) for key in range(50)]
    assert max(view.origin[0] for view in views) > 50


def test_a_view_is_a_function_of_its_words_alone():
    sample = record(60, 120, annotation([0, 10, 15, 10]))
    one, two = (draw_view(sample, DIRECT, 0.5, Words("a", 1)) for _ in range(2))
    assert one == two
    assert one != draw_view(sample, DIRECT, 0.5, Words("a", 2))


def test_defaults_draw_the_same_views_as_ever():
    # Pinned: checkpoints rely on the words and on the order in which they are drawn.
    sample = record(480, 640, annotation([600, 10, 30, 40]))
    direct = ResizeConfig(kind="direct", size=448)
    expected = {
        0: View((480, 640), (315, 421), (0, 0), (315, 421), is_flipped=True),
        1: View((480, 640), (270, 360), (0, 0), (270, 360), is_flipped=False),
        3: View((480, 640), (363, 484), (17, 0), (363, 448), is_flipped=False),
    }
    for row, view in expected.items():
        assert draw_view(sample, direct, 0.5, Words("augmentation", 0, "train", 0, row)) == view
    short_side = ResizeConfig(kind="short_side", size=800)
    view = draw_view(sample, short_side, 0.5, Words("augmentation", 0, "train", 0, 0))
    assert view == View((480, 640), (800, 1066), (0, 0), (800, 1066), is_flipped=True)


def test_an_enlarged_image_is_flipped_as_a_shrunk_one():
    image = torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    for size in ((41, 67), (13, 19)):
        plain = View((20, 30), size, (0, 0), size, is_flipped=False)
        flipped = replace(plain, is_flipped=True).move_image(image)
        assert torch.equal(flipped, plain.move_image(image).flip(2))


def test_a_window_is_scaled_alone():
    # Columns 20..50 and rows 10..35 at double size.
    view = View((100, 200), (50, 60), (0, 0), (50, 60), False, window=(20, 10, 30, 25))
    box = np.array([[30.0, 15.0, 5.0, 10.0]])
    np.testing.assert_allclose(move_boxes(view, box), [[20, 10, 30, 30]])
    x, y = view.stored_points(np.array([20, 10]), np.array([22, 12]))  # back again
    np.testing.assert_allclose(x, [30.25, 30.75])
    np.testing.assert_allclose(y, [15.25, 15.75])
    flipped = replace(view, is_flipped=True)
    np.testing.assert_allclose(move_boxes(flipped, box), [[30, 10, 40, 30]])
    image = torch.arange(100 * 200).reshape(1, 100, 200).expand(3, -1, -1).to(torch.uint8)
    same_size = replace(view, scaled_size=(25, 30), size=(25, 30))
    torch.testing.assert_close(same_size.move_image(image), image[:, 10:35, 20:50])


def test_paper_resizes_to_a_square_whatever_the_aspect_ratio():
    paper = ResizeConfig(kind="direct", size=100, variant="paper")
    seen = [draw_view(record(60, 120), paper, 0.5, Words(key)) for key in range(100)]
    sides = {view.scaled_size for view in seen}
    assert all(height == width and 80 <= width <= 120 for height, width in sides)
    assert len(sides) > 20
    for view in seen:
        assert view.size == (min(view.scaled_size[0], 100),) * 2
        assert max(view.origin) <= max(0, view.scaled_size[0] - 100)
    # Columns stretched: 120 to 90, rows 60 to 90.
    view = View((60, 120), (90, 90), (0, 0), (90, 90), False)
    np.testing.assert_allclose(move_boxes(view, np.array([[12, 6, 40, 20]])), [[9, 9, 39, 39]])


def test_stitcher_divides_the_normal_size():
    stitcher = ResizeConfig(kind="stitcher", size=800)
    # 800 x 1066 and 800 x 1199, halved.
    assert draw_view(record(480, 640), stitcher, 0.0, Words(0)).size == (400, 533)
    assert draw_view(record(427, 640), stitcher, 0.0, Words(0)).size == (400, 599)
    thirds = ResizeConfig(kind="stitcher", size=600, cap=900, divide_by=3)
    assert draw_view(record(100, 400), thirds, 0.0, Words(0)).size == (75, 300)


def test_jitter_scales_from_a_tenth_to_twice_and_enlarges_only_what_is_seen():
    jitter = ResizeConfig(kind="jitter", size=128)
    sample = record(60, 120, annotation([0, 0, 120, 60]))
    seen = [draw_view(sample, jitter, 0.5, Words(key)) for key in range(300)]
    for view in seen:
        assert max(view.size) <= 128
        if view.window is not None:
            x, y, width, height = view.window
            assert view.size[1] == 128
            assert 0 <= x <= 120 - width
            assert 0 <= y <= 60 - height
            # One scale for x and y but for the rounding to stored pixels.
            assert abs(view.scale[0] / view.scale[1] - 1) < 0.02
    scales = np.array([view.scale[0] for view in seen]) * 120 / 128
    assert scales.min() < 0.15
    assert scales.max() > 1.9
    assert abs(scales.mean() - 1.05) < 5 * 1.9 / 12**0.5 / 300**0.5  # uniform on 0.1..2
    assert 100 < sum(view.window is not None for view in seen) < 200  # factors above 1


def test_jitter_shows_a_box_if_there_is_one():
    jitter = ResizeConfig(kind="jitter", size=128, jitter_range=(4.0, 4.0))
    sample = record(64, 128, annotation([100, 50, 4, 4]))
    for key in range(50):
        view = draw_view(sample, jitter, 0.5, Words(key))
        assert view.window[2:] == (32, 32)
        box = move_boxes(view, np.array([[100.0, 50.0, 4.0, 4.0]]))[0]
        assert (box[2:] > box[:2]).all()


def test_the_short_side_of_a_step_is_drawn_for_all_its_lanes():
    listed = ResizeConfig(kind="short_side", size=800, sizes=[640, 672, 800])
    drawn = [resize_of_step(listed, 0, "train", step) for step in range(300)]
    counts = [sum(resize.size == size for resize in drawn) for size in (640, 672, 800)]
    assert sum(counts) == 300
    assert min(counts) > 60
    assert {resize.cap for resize in drawn} == {1333}  # that of `size`
    assert resize_of_step(listed, 0, "train", 7) == drawn[7]
    ranged = ResizeConfig(kind="short_side", size=800, cap=1440, size_range=(640, 864))
    sizes = [resize_of_step(ranged, 0, "train", step).size for step in range(2000)]
    assert min(sizes) == 640
    assert max(sizes) == 864
    assert resize_of_step(DIRECT, 0, "train", 1) == DIRECT


def test_the_short_side_of_an_image_is_drawn_for_it_alone_where_asked_for():
    each = ResizeConfig(kind="short_side", size=800, size_range=(640, 800), draw="image")
    assert resize_of_step(each, 0, "train", 7) == each
    drawn = [draw_size(each, 0, "train", 0, row) for row in range(1000)]
    sizes = [resize.size for resize in drawn]
    assert (min(sizes), max(sizes)) == (640, 800)
    assert abs(sum(sizes) / 1000 - 720) < 6  # four deviations of the mean of a uniform draw
    assert {resize.cap for resize in drawn} == {1333}
    assert draw_size(each, 0, "train", 0, 5) == drawn[5]
    assert draw_size(each, 0, "train", 1, 5) != drawn[5]  # another pass
    by_step = resize_of_step(replace(each, draw="step"), 0, "train", 7)
    assert draw_size(by_step, 0, "train", 0, 5) == by_step
