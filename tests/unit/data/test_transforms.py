"""Image, boxes and masks move together; crops keep a box; nothing draws from a global generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bigdet.config.schema import ResizeConfig
from bigdet.data import transforms
from bigdet.data.transforms import View, draw_view, no_objects, objects_in_view, whole_view
from bigdet.ops.random import Words

DIRECT = ResizeConfig(kind="direct", size=100)
SHORT_SIDE = ResizeConfig(kind="short_side", size=50, cap=80)


def annotation(bbox, segmentation=None, label=0, iscrowd=0, number=1):
    found = {"id": number, "label": label, "bbox": bbox, "area": 1.0, "iscrowd": iscrowd}
    return found if segmentation is None else {**found, "segmentation": segmentation}


def rectangle(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def record(height, width, *annotations):
    return {
        "image_id": 1, "file_name": "", "height": height, "width": width,
        "annotations": list(annotations),
    }  # fmt: skip


def on_canvas(objects, i, size):
    """The whole mask of an object."""
    canvas = np.zeros(size, dtype=np.uint8)
    x, y = objects.mask_origins[i]
    height, width = objects.masks[i].shape
    canvas[y : y + height, x : x + width] = objects.masks[i]
    return canvas


def test_boxes_are_scaled_shifted_flipped_and_clipped():
    # 200x100 (h x w) at half size is 100x50; the crop begins at (10, 20) and is 30 wide, 40 high.
    view = View((200, 100), (100, 50), (10, 20), (40, 30), is_flipped=False)
    boxes = np.array([[30.0, 60.0, 20.0, 40.0], [0.0, 0.0, 100.0, 200.0]])  # xywh
    # (30..50, 60..100) / 2 = (15..25, 30..50), minus the corner (5..15, 10..30).
    expected = [[5, 10, 15, 30], [0, 0, 30, 40]]
    np.testing.assert_allclose(view.move_boxes(boxes), expected)
    flipped = View((200, 100), (100, 50), (10, 20), (40, 30), is_flipped=True)
    np.testing.assert_allclose(flipped.move_boxes(boxes), [[15, 10, 25, 30], [0, 0, 30, 40]])


def test_boxes_follow_the_rounded_size_of_the_image():
    # 427x640 becomes 800x1199, not 1199.06: a box of the whole image stays the whole image.
    view = whole_view((427, 640), (800, 1333))
    np.testing.assert_allclose(view.move_boxes(np.array([[0, 0, 640, 427]])), [[0, 0, 1199, 800]])


@pytest.mark.parametrize("is_flipped", [False, True])
def test_the_image_shows_what_the_view_says(is_flipped):
    image = torch.randint(0, 256, (3, 20, 30), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    seen = View((20, 30), (20, 30), (4, 5), (10, 12), is_flipped).move_image(image)
    expected = image[:, 5:15, 4:16]
    torch.testing.assert_close(seen, expected.flip(2) if is_flipped else expected)


def test_objects_without_area_in_the_crop_are_dropped_and_counted():
    view = View((100, 100), (100, 100), (50, 0), (100, 50), is_flipped=False)
    annotations = [
        annotation([10, 10, 40, 10], label=1),  # ends where the crop begins
        annotation([10, 10, 40.5, 10], label=2),  # half a pixel in view: no least size
        annotation([60, 10, 0, 10], label=3),  # has no area at all
        annotation([60, 10, 10, 10], label=4, iscrowd=1),
    ]
    objects = objects_in_view(annotations, view, with_masks=False)
    assert objects.labels.tolist() == [2, 4]
    assert objects.is_crowd.tolist() == [False, True]
    assert objects.num_dropped == 2
    assert objects.masks is None
    np.testing.assert_allclose(objects.boxes, [[0, 10, 0.5, 20], [10, 10, 20, 20]])


def test_an_image_without_objects_has_none_of_every_shape():
    view = whole_view((40, 50), (50, 80))
    for objects in (objects_in_view([], view, with_masks=True), no_objects()):
        assert objects.boxes.shape == (0, 4)
        assert objects.boxes.dtype == np.float32
        assert objects.labels.shape == objects.is_crowd.shape == (0,)
        assert objects.mask_origins.shape == (0, 2)
    assert objects_in_view([], view, with_masks=True).masks == []


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("as_rle", [False, True])
def test_masks_cover_the_pixels_of_their_object(is_flipped, as_rle):
    # A rectangle that is its box: 20..60 x 40..80 of 100x100, at double size 40..120 x 80..160.
    # Crop from (30, 20), 100 wide, 110 high: x 10..90, y 60..110 (cut off); flipped: x 10..90.
    segmentation = rectangle(20, 40, 40, 40)
    if as_rle:
        bitmap = np.zeros((100, 100), dtype=np.uint8, order="F")
        bitmap[40:80, 20:60] = 1
        segmentation = coco_mask.encode(bitmap)
    view = View((100, 100), (200, 200), (30, 20), (110, 100), is_flipped)
    objects = objects_in_view([annotation([20, 40, 40, 40], segmentation)], view, with_masks=True)
    np.testing.assert_array_equal(objects.mask_origins, [[10, 60]])
    assert objects.masks[0].shape == (50, 80)
    assert objects.masks[0].all()


@pytest.mark.parametrize("is_flipped", [False, True])
def test_masks_move_as_the_image_does(is_flipped):
    # The object is white on black: in the view, its mask is where the image is white.
    polygon = [20, 10, 70, 25, 62, 60, 33, 71, 25, 40]
    bitmap = coco_mask.decode(coco_mask.frPyObjects([polygon], 80, 90))[..., 0]
    box = [20, 10, 50, 61]
    image = torch.from_numpy(bitmap * np.uint8(255)).expand(3, -1, -1)
    view = View((80, 90), (120, 135), (18, 9), (100, 110), is_flipped)
    white = (view.move_image(image)[0] >= 128).numpy()
    for segmentation in ([polygon], coco_mask.encode(np.asfortranarray(bitmap))):
        objects = objects_in_view([annotation(box, segmentation)], view, with_masks=True)
        mask = on_canvas(objects, 0, view.size)
        iou = (mask & white).sum() / (mask | white).sum()
        assert iou > 0.98  # a pixel too far to one side would make 0.97


def test_an_object_of_several_parts_is_all_of_them():
    parts = [
        *rectangle(0, 0, 6, 4),
        *rectangle(4, 0, 6, 4),
        [1, 1, 2, 2],
    ]  # the last covers nothing
    view = whole_view((10, 10), (10, 10))
    objects = objects_in_view([annotation([0, 0, 10, 4], parts)], view, with_masks=True)
    assert objects.masks[0].shape == (4, 10)
    assert objects.masks[0].all()  # also where two parts overlap


def test_crowds_and_objects_without_segmentation_carry_no_mask():
    rle = {"size": [10, 10], "counts": [0, 100]}
    annotations = [
        annotation([1, 1, 5, 5], rle, iscrowd=1),
        annotation([1, 1, 5, 5]),
        annotation([1, 1, 5, 5], []),
        annotation([2, 2, 5, 5], rectangle(2, 2, 5, 5)),
    ]
    view = whole_view((10, 10), (10, 10))
    objects = objects_in_view(annotations, view, with_masks=True)
    assert [mask.shape for mask in objects.masks] == [(0, 0), (0, 0), (0, 0), (5, 5)]
    assert objects.masks[3].all()


def test_a_crop_of_a_mask_has_at_least_one_pixel_on_the_canvas():
    annotations = [annotation([4.2, 4.2, 0.1, 0.1], rectangle(4.2, 4.2, 0.1, 0.1))]
    annotations.append(annotation([9.9, 9.9, 0.1, 0.1], rectangle(9.9, 9.9, 0.1, 0.1)))
    objects = objects_in_view(annotations, whole_view((10, 10), (10, 10)), with_masks=True)
    assert objects.mask_origins.tolist() == [[4, 4], [9, 9]]
    assert [mask.shape for mask in objects.masks] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [5, 5], "counts": [25]}, "abc", [[1, 2, 3, 4, 5, 6, 7]], {"counts": []}],
)
def test_a_segmentation_of_another_kind_or_size_is_refused(segmentation):
    view = whole_view((10, 10), (10, 10))
    with pytest.raises(ValueError, match=r"annotation 7 .*polygons nor RLE of size"):
        objects_in_view([annotation([1, 1, 5, 5], segmentation, number=7)], view, with_masks=True)


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
    monkeypatch.setattr(transforms, "CROP_TRIES", 0)
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
