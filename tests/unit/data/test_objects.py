"""Objects move as their image does: boxes, masks and keypoints, cut, shifted and put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bigdet.data.examples.objects import (
    Wanted,
    check_annotations,
    clip,
    join,
    keypoint_order,
    no_objects,
    objects_in_view,
    shift,
    tighten,
)
from bigdet.data.examples.views import View, whole_view
from bigdet.data.format.manifest import Category

WITH_MASKS = Wanted(masks=True)


def annotation(bbox, segmentation=None, label=0, iscrowd=0, number=1):
    found = {"id": number, "label": label, "bbox": bbox, "area": 1.0, "iscrowd": iscrowd}
    return found if segmentation is None else {**found, "segmentation": segmentation}


def rectangle(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def on_canvas(objects, i, size):
    """The whole mask of an object."""
    canvas = np.zeros(size, dtype=np.uint8)
    x, y = objects.mask_origins[i]
    height, width = objects.masks[i].shape
    canvas[y : y + height, x : x + width] = objects.masks[i]
    return canvas


def test_objects_without_area_in_the_crop_are_dropped_and_counted():
    view = View((100, 100), (100, 100), (50, 0), (100, 50), is_flipped=False)
    annotations = [
        annotation([10, 10, 40, 10], label=1),  # ends where the crop begins
        annotation([10, 10, 40.5, 10], label=2),  # half a pixel in view: no least size
        annotation([60, 10, 0, 10], label=3),  # has no area at all
        annotation([60, 10, 10, 10], label=4, iscrowd=1),
    ]
    objects = objects_in_view(annotations, view, Wanted())
    assert objects.labels.tolist() == [2, 4]
    assert objects.is_crowd.tolist() == [False, True]
    assert objects.num_dropped == 2
    assert objects.masks is None
    np.testing.assert_allclose(objects.boxes, [[0, 10, 0.5, 20], [10, 10, 20, 20]])


def test_an_image_without_objects_has_none_of_every_shape():
    view = whole_view((40, 50), (50, 80))
    for objects in (objects_in_view([], view, WITH_MASKS), no_objects()):
        assert objects.boxes.shape == (0, 4)
        assert objects.boxes.dtype == np.float32
        assert objects.labels.shape == objects.is_crowd.shape == (0,)
        assert objects.mask_origins.shape == (0, 2)
    assert objects_in_view([], view, WITH_MASKS).masks == []


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
    objects = objects_in_view([annotation([20, 40, 40, 40], segmentation)], view, WITH_MASKS)
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
        objects = objects_in_view([annotation(box, segmentation)], view, WITH_MASKS)
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
    objects = objects_in_view([annotation([0, 0, 10, 4], parts)], view, WITH_MASKS)
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
    objects = objects_in_view(annotations, view, WITH_MASKS)
    assert [mask.shape for mask in objects.masks] == [(0, 0), (0, 0), (0, 0), (5, 5)]
    assert objects.masks[3].all()


def test_a_crop_of_a_mask_has_at_least_one_pixel_on_the_canvas():
    annotations = [annotation([4.2, 4.2, 0.1, 0.1], rectangle(4.2, 4.2, 0.1, 0.1))]
    annotations.append(annotation([9.9, 9.9, 0.1, 0.1], rectangle(9.9, 9.9, 0.1, 0.1)))
    objects = objects_in_view(annotations, whole_view((10, 10), (10, 10)), WITH_MASKS)
    assert objects.mask_origins.tolist() == [[4, 4], [9, 9]]
    assert [mask.shape for mask in objects.masks] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [5, 5], "counts": [25]}, "abc", [[1, 2, 3, 4, 5, 6, 7]], {"counts": []}],
)
def test_a_segmentation_of_another_kind_or_size_is_refused(segmentation):
    bad = annotation([1, 1, 5, 5], segmentation, number=7)
    with pytest.raises(ValueError, match=r"annotation 7 .*polygons nor RLE of size"):
        check_annotations([bad], (10, 10), WITH_MASKS)
    check_annotations([bad], (10, 10), Wanted())
    check_annotations([{**bad, "iscrowd": 1}], (10, 10), WITH_MASKS)


def person(*keypoints):
    return {**annotation([0, 0, 10, 20]), "keypoints": [*keypoints]}


def people(pairs):
    return Category(1, "person", keypoints=["nose", "left", "right"], flip_pairs=pairs)


def test_keypoints_move_with_the_image_and_change_sides_in_a_flip():
    wanted = Wanted(keypoint_order=keypoint_order([people([[1, 2]])]))
    found = [person(4, 9, 2, 1, 2, 1, 0, 0, 0), annotation([0, 0, 10, 20])]
    view = View((20, 10), (40, 20), (0, 0), (40, 20), is_flipped=False)
    objects = objects_in_view(found, view, wanted)
    # Pixel 4 has its center at 4.5, at double size at 9; the second object has none.
    expected = np.array([[[9, 19, 2], [3, 5, 1], [0, 0, 0]], np.zeros((3, 3))])
    np.testing.assert_array_equal(objects.keypoints, expected)
    assert objects.keypoints.dtype == np.float32
    flipped = objects_in_view(found, replace(view, is_flipped=True), wanted)
    # Mirrored at 20 columns; what was the left one is the right one.
    np.testing.assert_array_equal(flipped.keypoints[0], [[11, 19, 2], [0, 0, 0], [17, 5, 1]])
    assert objects_in_view(found, view, Wanted()).keypoints is None
    assert objects_in_view([], view, wanted).keypoints.shape == (0, 3, 3)


def test_keypoints_out_of_the_crop_are_not_labeled():
    wanted = Wanted(keypoint_order=keypoint_order([people([])]))
    view = View((20, 10), (20, 10), (4, 0), (20, 6), is_flipped=False)
    objects = objects_in_view([person(3, 9, 2, 4, 2, 1, 9, 5, 2)], view, wanted)
    np.testing.assert_array_equal(objects.keypoints[0], [[0, 0, 0], [0.5, 2.5, 1], [5.5, 5.5, 2]])


def test_keypoints_of_another_number_are_refused():
    wanted = Wanted(keypoint_order=np.arange(3))
    with pytest.raises(ValueError, match="annotation 1 with 6 numbers for 3 keypoints"):
        check_annotations([person(1, 1, 2, 3, 3, 2)], (20, 10), wanted)
    check_annotations([person(*range(9)), annotation([0, 0, 1, 1])], (20, 10), wanted)


def test_keypoints_are_those_of_the_categories():
    plain = Category(2, "chair")
    np.testing.assert_array_equal(keypoint_order([plain, people([[1, 2]])]), [0, 2, 1])
    with pytest.raises(ValueError, match="have none"):
        keypoint_order([plain])
    with pytest.raises(ValueError, match="have different ones"):
        keypoint_order([people([]), people([[1, 2]])])


def cut_objects():
    """An L of which the crop shows the foot, and an object whose mask is not in the crop."""
    letter = [[0, 0, 4, 0, 4, 16, 12, 16, 12, 20, 0, 20]]
    far = [[0, 0, 3, 0, 3, 3, 0, 3]]
    return [annotation([0, 0, 12, 20], letter), annotation([0, 0, 12, 20], far)]


def test_a_cut_box_shrinks_to_what_is_left_of_its_mask():
    view = View((20, 20), (20, 20), (4, 4), (16, 16), is_flipped=False)
    loose = objects_in_view(cut_objects(), view, WITH_MASKS)
    np.testing.assert_array_equal(loose.boxes, [[0, 0, 8, 16]] * 2)
    tight = objects_in_view(cut_objects(), view, Wanted(masks=True, tight_boxes=True))
    # Of the L the rows 16..20 are left, at 12..16; of the other nothing.
    np.testing.assert_array_equal(tight.boxes, [[0, 12, 8, 16]])
    assert tight.num_dropped == 1
    assert len(tight.masks) == 1
    # What the crop does not cut keeps the annotated box, also around a smaller mask.
    whole = objects_in_view(
        cut_objects(), whole_view((20, 20), (20, 20)), Wanted(masks=True, tight_boxes=True)
    )
    np.testing.assert_array_equal(whole.boxes, [[0, 0, 12, 20]] * 2)


def test_only_chosen_boxes_with_a_mask_are_tightened():
    found = objects_in_view(
        [annotation([0, 0, 12, 20], cut_objects()[0]["segmentation"]), annotation([0, 0, 9, 9])],
        whole_view((20, 20), (20, 20)),
        WITH_MASKS,
    )
    found.masks[0][:16] = 0
    same = tighten(found, np.array([False, True]))
    np.testing.assert_array_equal(same.boxes, found.boxes)
    np.testing.assert_array_equal(
        tighten(found, np.array([True, True])).boxes, [[0, 16, 12, 20], [0, 0, 9, 9]]
    )


def test_objects_are_shifted_cut_and_joined():
    wanted = Wanted(masks=True, keypoint_order=np.arange(3))
    sample = person(4, 9, 2, 1, 2, 1, 0, 0, 0)
    sample["segmentation"] = rectangle(0, 0, 10, 20)
    whole = objects_in_view([sample], whole_view((20, 10), (10, 20)), wanted)
    moved = shift(whole, 5, 3)
    np.testing.assert_array_equal(moved.boxes, [[5, 3, 15, 23]])
    np.testing.assert_array_equal(moved.mask_origins, [[5, 3]])
    np.testing.assert_array_equal(moved.keypoints[0], [[9.5, 12.5, 2], [6.5, 5.5, 1], [0, 0, 0]])
    cut = clip(moved, (10, 9))  # rows below 10 and columns beyond 9 are gone
    np.testing.assert_array_equal(cut.boxes, [[5, 3, 9, 10]])
    assert cut.masks[0].shape == (7, 4)
    np.testing.assert_array_equal(cut.keypoints[0], [[0, 0, 0], [6.5, 5.5, 1], [0, 0, 0]])
    gone = clip(moved, (3, 30))
    assert len(gone) == 0
    assert gone.num_dropped == 1
    both = join([whole, gone, moved])
    np.testing.assert_array_equal(both.boxes, [[0, 0, 10, 20], [5, 3, 15, 23]])
    assert [mask.shape for mask in both.masks] == [(20, 10)] * 2
    assert both.num_dropped == 1
    assert both.keypoints.shape == (2, 3, 3)
