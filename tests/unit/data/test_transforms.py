"""Images of a group mixed: pasted objects hide others, mosaics keep objects on their pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from bigdet.config.augment import AugmentConfig
from bigdet.config.resize import ResizeConfig
from bigdet.data.examples.objects import Objects, Wanted
from bigdet.data.examples.transforms import Example, Scene, change_colors, make_examples, paste
from bigdet.data.examples.views import draw_view
from bigdet.ops.random import Words

WITH_MASKS = Wanted(masks=True)
SHORT_SIDE = ResizeConfig(kind="short_side", size=60, cap=90)


def objects(boxes, masks, origins, keypoints=None):
    count = len(boxes)
    return Objects(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.arange(count, dtype=np.int64),
        is_crowd=np.zeros(count, dtype=np.bool_),
        mask_origins=np.array(origins, dtype=np.int64).reshape(-1, 2),
        masks=masks,
        num_dropped=0,
        keypoints=keypoints,
    )


def example(value, found, size=(20, 30)):
    image = torch.full((*size, 3), value, dtype=torch.uint8).permute(2, 0, 1)
    return Example(image, size, value, 1.0, found)


class Always:
    """Words that paste every object."""

    def uniform(self, low, high):
        return low


def full(height, width):
    return np.ones((height, width), dtype=np.uint8)


def test_pasted_objects_hide_what_is_below():
    # Below: A at rows 0..10, columns 0..10; B at rows 12..14, columns 12..14; C has no mask.
    below = objects(
        [[0, 0, 10, 10], [12, 12, 14, 14], [0, 0, 30, 20]],
        [full(10, 10), full(2, 2), np.zeros((0, 0), np.uint8)],
        [[0, 0], [12, 12], [0, 0]],
        keypoints=np.array([[[2.5, 2.5, 2]], [[12.5, 12.5, 2]], [[0, 0, 0]]], dtype=np.float32),
    )
    # Above: D covers the right half of A and all of B; E has no mask and stays behind.
    above = objects(
        [[5, 0, 16, 16], [0, 0, 4, 4]],
        [full(16, 11), np.zeros((0, 0), np.uint8)],
        [[5, 0], [0, 0]],
        keypoints=np.array([[[6.5, 6.5, 2]], [[1, 1, 2]]], dtype=np.float32),
    )
    mixed = paste(example(1, below), example(2, above), Always())
    found = mixed.objects
    np.testing.assert_array_equal(
        found.boxes,
        [[0, 0, 5, 10], [0, 0, 30, 20], [5, 0, 16, 16]],  # A, C, D
    )
    assert found.num_dropped == 1  # B
    np.testing.assert_array_equal(found.labels, [0, 2, 0])
    assert found.masks[0][:, :5].all()
    assert not found.masks[0][:, 5:].any()
    assert (mixed.image[:, :16, 5:16] == 2).all()
    assert (mixed.image == 2).sum() == 3 * 16 * 11
    np.testing.assert_array_equal(found.keypoints[:, 0, 2], [2, 0, 2])
    assert mixed.image_id == 1


def test_a_hidden_keypoint_is_labeled_but_not_visible():
    points = np.array([[[2.5, 2.5, 2], [8.5, 8.5, 2], [9.5, 9.5, 1]]], dtype=np.float32)
    below = objects([[0, 0, 10, 10]], [full(10, 10)], [[0, 0]], points)
    above = objects([[5, 5, 10, 10]], [full(5, 5)], [[5, 5]], np.zeros((1, 3, 3), np.float32))
    mixed = paste(example(1, below), example(2, above), Always())
    np.testing.assert_array_equal(mixed.objects.keypoints[0, :, 2], [2, 1, 1])
    assert below.keypoints[0, 1, 2] == 2  # the example itself is unchanged
    assert below.masks[0].all()


def test_what_is_pasted_is_cut_at_the_image_below():
    below = example(1, objects([], [], []), size=(10, 12))
    above = example(
        2,
        objects([[8, 8, 20, 20], [15, 0, 20, 5]], [full(12, 12), full(5, 5)], [[8, 8], [15, 0]]),
        size=(20, 30),
    )
    mixed = paste(below, above, Always())
    np.testing.assert_array_equal(mixed.objects.boxes, [[8, 8, 12, 10]])
    assert mixed.objects.masks[0].shape == (2, 4)
    assert mixed.objects.num_dropped == 0  # nothing of the image's own
    assert mixed.image.shape == (3, 10, 12)
    nothing = paste(below, example(2, objects([], [], [])), Always())
    torch.testing.assert_close(nothing.image, below.image)


def test_an_object_of_which_no_pixel_is_on_the_image_below_is_not_pasted():
    # Its box reaches into the image of 10 rows, its mask only has rows 12 to 14.
    mask = np.zeros((10, 4), np.uint8)
    mask[7:] = 1
    above = example(2, objects([[3, 5, 7, 15]], [mask], [[3, 5]]))
    below = example(1, objects([], [], []), size=(10, 12))
    mixed = paste(below, above, Always())
    assert len(mixed.objects) == 0
    assert (mixed.image == 1).all()
    assert len(paste(example(1, objects([], [], [])), above, Always()).objects) == 1


def scene(number, height=60, width=90, resize=SHORT_SIDE):
    """An image of value 40 x number with one bright rectangle, which is its object."""
    image = torch.full((height, width, 3), 10 * number, dtype=torch.uint8).permute(2, 0, 1)
    image[:, 20:40, 30:60] = 200 + number
    box = [30, 20, 30, 20]
    polygon = [[30, 20, 60, 20, 60, 40, 30, 40]]
    found = {"id": number, "label": number, "bbox": box, "iscrowd": 0, "segmentation": polygon}
    record = {"image_id": number, "height": height, "width": width, "annotations": [found]}
    view = draw_view(record, resize, 0.5, Words("view", number))
    return Scene(image, record, view, 1.0, key=(number,))


@pytest.mark.parametrize(
    "resize",
    [
        SHORT_SIDE,
        ResizeConfig(kind="direct", size=96),
        ResizeConfig(kind="jitter", size=96, jitter_range=(1.5, 2.0)),
    ],
    ids=lambda resize: resize.kind,
)
def test_a_mosaic_keeps_objects_on_their_pixels(resize):
    canvas = None if resize.kind == "short_side" else (96, 96)
    scenes = [scene(number, resize=resize) for number in range(6)]
    augment = AugmentConfig(mosaic=1.0)
    for number, one in enumerate(make_examples(scenes, augment, canvas, WITH_MASKS)):
        assert one.image_id == number
        size = canvas or scenes[number].view.size
        assert one.image.shape == (3, *size)
        found = one.objects
        assert 4 >= len(set(found.labels.tolist())) == len(found) >= 1
        for i, label in enumerate(found.labels.tolist()):
            x, y = found.mask_origins[i]
            height, width = found.masks[i].shape
            inside = one.image[:, y : y + height, x : x + width].numpy()
            shown = inside[:, found.masks[i] > 0]
            # Edges are blended by the resize; what is far from them has the object's own value.
            assert np.median(shown) == 200 + label
            assert found.boxes[i, 0] >= 0
            assert (found.boxes[i, 2:] <= size[::-1]).all()
    first = make_examples([scene(n, resize=resize) for n in range(6)], augment, canvas, WITH_MASKS)
    second = make_examples([scene(n, resize=resize) for n in range(6)], augment, canvas, WITH_MASKS)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.image, other.image)
        np.testing.assert_array_equal(one.objects.boxes, other.objects.boxes)


def test_a_mosaic_shows_its_own_image_and_three_others():
    scenes = [scene(number) for number in range(4)]
    for one in make_examples(scenes, AugmentConfig(mosaic=1.0), None, WITH_MASKS):
        assert sorted(one.objects.labels.tolist()) == [0, 1, 2, 3]
        assert one.objects.labels[0] == one.image_id  # top left


def test_copy_paste_takes_objects_of_another_image_of_the_group():
    scenes = [scene(number) for number in range(3)]
    alone = make_examples(scenes, AugmentConfig(), None, WITH_MASKS)
    mixed = make_examples(scenes, AugmentConfig(copy_paste=1.0), None, WITH_MASKS)
    changed = 0
    for one, before in zip(mixed, alone, strict=True):
        others = [label for label in one.objects.labels.tolist() if label != one.image_id]
        assert len(others) <= 1
        changed += not torch.equal(one.image, before.image)
    assert changed >= 1


def test_nothing_is_mixed_by_default_and_no_word_is_drawn():
    scenes = [replace(scene(number), key=None) for number in range(3)]
    for one, own in zip(
        make_examples(scenes, AugmentConfig(), None, WITH_MASKS), scenes, strict=True
    ):
        torch.testing.assert_close(one.image, own.view.move_image(own.image))


@pytest.mark.parametrize(
    "factors", [(0.7, 1.0, 1.0), (1.0, 1.4, 1.0), (1.0, 1.0, 0.6), (0.9, 0.8, 1.3)]
)
def test_colors_change_as_torchvision_changes_them(factors):
    # Values in the middle, so that nothing is clipped on the way.
    image = torch.randint(90, 160, (3, 12, 17), generator=torch.Generator().manual_seed(0))
    expected = image.float() / 255
    expected = functional.adjust_brightness(expected, factors[0])
    expected = functional.adjust_contrast(expected, factors[1])
    expected = functional.adjust_saturation(expected, factors[2]) * 255
    found = change_colors(image.to(torch.uint8), *factors)
    assert found.dtype == torch.uint8
    # torchvision's luma has weights of four digits, which do not sum up to 1.
    assert (found.float() - expected).abs().max() < 0.6


def test_colors_are_clipped_and_may_stay():
    image = torch.tensor([[[0, 250, 128]]] * 3, dtype=torch.uint8)
    torch.testing.assert_close(change_colors(image, 1.0, 1.0, 1.0), image)
    assert change_colors(image, 1.4, 1.0, 1.0)[0].tolist() == [[0, 255, 179]]


def test_colors_alone_change_no_geometry():
    scenes = [scene(number) for number in range(4)]
    alone = make_examples(scenes, AugmentConfig(), None, WITH_MASKS)
    jittered = make_examples(scenes, AugmentConfig(color_jitter=1.0), None, WITH_MASKS)
    for one, before in zip(jittered, alone, strict=True):
        assert not torch.equal(one.image, before.image)
        np.testing.assert_array_equal(one.objects.boxes, before.objects.boxes)
