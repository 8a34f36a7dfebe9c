"""A group survives being packed flat, with and without objects and masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bigdet.data.examples.collate import num_dropped, pack, unpack
from bigdet.data.examples.objects import Objects, no_objects
from bigdet.data.examples.transforms import Example
from bigdet.ops.sizes import canvas_size


def objects(*boxes, masks=None, num_dropped=0):
    count = len(boxes)
    return Objects(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.arange(count, dtype=np.int64) + 5,
        is_crowd=np.arange(count) == 1,
        mask_origins=np.arange(2 * count, dtype=np.int64).reshape(-1, 2),
        masks=masks,
        num_dropped=num_dropped,
    )


def example(height, width, found, image_id=1, weight=1.0):
    image = torch.randint(1, 256, (3, height, width), generator=torch.Generator().manual_seed(1))
    return Example(image.to(torch.uint8), (2 * height, 2 * width), image_id, weight, found)


def test_everything_comes_out_as_it_went_in():
    masks = [
        np.ones((2, 3), np.uint8),
        np.zeros((0, 0), np.uint8),
        np.asfortranarray([[0, 1], [1, 1]]),
    ]
    masks[2] = masks[2].astype(np.uint8)
    first = example(30, 40, objects([1, 2, 3, 4], [5, 6, 7, 8], masks=masks[:2], num_dropped=2), 11)
    empty = example(50, 20, objects(masks=[]), 12, weight=0.0)
    third = example(10, 70, objects([2, 2, 4.5, 4], masks=masks[2:], num_dropped=1), 13)
    packed = pack([first, empty, third], canvas=None, seed=2**63 - 1, notes=["a note"])
    assert num_dropped(packed) == 3
    assert packed.notes == ["a note"]
    batch = unpack(packed)
    assert batch.seed == 2**63 - 1
    assert batch.images.shape == (3, 3, 64, 96)  # 50 and 70, rounded up to 32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for i, one in enumerate((first, empty, third)):
        height, width = one.image.shape[1:]
        torch.testing.assert_close(batch.images[i, :, :height, :width], one.image)
        assert batch.images[i].sum() == one.image.sum()  # the rest is zero
    assert batch.image_sizes.tolist() == [[30, 40], [50, 20], [10, 70]]
    assert batch.original_sizes.tolist() == [[60, 80], [100, 40], [20, 140]]
    assert batch.image_ids.tolist() == [11, 12, 13]
    assert batch.weights.tolist() == [1.0, 0.0, 1.0]
    targets = batch.targets
    assert targets.offsets.tolist() == [0, 2, 2, 3]
    assert targets.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 4.5, 4]]
    assert targets.labels.tolist() == [5, 6, 5]
    assert targets.is_crowd.tolist() == [False, True, False]
    assert targets.is_crowd.dtype == torch.bool
    assert targets.masks is not None
    assert targets.masks.offsets.tolist() == [0, 6, 6, 10]
    assert targets.masks.sizes.tolist() == [[2, 3], [0, 0], [2, 2]]
    assert targets.masks.origins.tolist() == [[0, 1], [2, 3], [0, 1]]
    assert targets.masks.bits.tolist() == [1] * 6 + [0, 1, 1, 1]  # row by row


@pytest.mark.parametrize("masks", [None, []])
def test_a_group_without_any_object_has_empty_targets(masks):
    batch = unpack(pack([example(30, 40, objects(masks=masks))] * 2, canvas=(64, 64), seed=0))
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.targets.boxes.shape == (0, 4)
    assert batch.targets.offsets.tolist() == [0, 0, 0]
    if masks is None:
        assert batch.targets.masks is None
    else:
        assert batch.targets.masks is not None
        assert batch.targets.masks.offsets.tolist() == [0]
        assert batch.targets.masks.sizes.shape == (0, 2)


def test_evaluation_has_no_targets():
    batch = unpack(pack([example(32, 32, no_objects())], canvas=None, seed=0))
    assert batch.images.shape == (1, 3, 32, 32)
    assert batch.targets.masks is None
    assert batch.targets.labels.shape == (0,)


def test_the_canvas_is_as_small_as_multiples_of_32_allow():
    assert canvas_size([(800, 1066), (800, 600)]) == (800, 1088)  # 1066 to 34 x 32
    assert canvas_size([(666, 1333)]) == (672, 1344)
    assert canvas_size([(1, 1)]) == (32, 32)


def test_keypoints_travel_with_their_objects():
    points = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    two = replace(
        objects([1, 2, 3, 4], [5, 6, 7, 8], masks=[np.ones((1, 1), np.uint8)] * 2), keypoints=points
    )
    none = replace(objects(masks=[]), keypoints=np.zeros((0, 4, 3), np.float32))
    batch = unpack(pack([example(30, 40, none), example(30, 40, two)], canvas=None, seed=0))
    assert batch.targets.keypoints.dtype == torch.float32
    np.testing.assert_array_equal(batch.targets.keypoints, points)
    assert batch.targets.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    empty = unpack(pack([example(30, 40, none)], canvas=None, seed=0))
    assert empty.targets.keypoints.shape == (0, 4, 3)
    moved = batch.to(torch.device("cpu"))
    torch.testing.assert_close(moved.targets.keypoints, batch.targets.keypoints)
