"""Segmentations to bitmaps, by hand and against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from bigdet.data.examples.masks import rasterize_polygons, sample_rle
from bigdet.ops.random import Words


def rasterize(*polygons_and_sizes):
    polygons = [np.array(polygon, dtype=float).reshape(-1, 2) for polygon, _ in polygons_and_sizes]
    return rasterize_polygons(
        np.concatenate([np.zeros((0, 2)), *polygons]),
        np.array([len(polygon) for polygon in polygons], dtype=np.int64),
        np.array([size for _, size in polygons_and_sizes], dtype=np.int64).reshape(-1, 2),
    )


def test_a_rectangle_covers_the_pixels_whose_centers_it_holds():
    # x from 1 to 3.6: centers 1.5, 2.5, 3.5. y from 0.6 to 2: the center 1.5 alone.
    (mask,) = rasterize(([1, 0.6, 3.6, 0.6, 3.6, 2, 1, 2], (3, 5)))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_triangle_of_either_turn(is_reversed):
    corners = [0, 4, 4, 0, 0, 0] if is_reversed else [0, 0, 4, 0, 0, 4]
    (mask,) = rasterize((corners, (4, 4)))
    # Centers on the long side, x + y = 4, are out, as a lower edge does not belong to its shape.
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_what_lies_outside_the_crop_is_cut_off():
    (all_of_it,) = rasterize(([-50, -50, 50, -50, 50, 50, -50, 50], (3, 9)))
    assert all_of_it.all()
    for away in ([20, 0, 30, 0, 30, 9, 20, 9], [0, 20, 9, 20, 9, 30], [-9, -9, -2, -9, -9, -2]):
        (nothing,) = rasterize((away, (3, 9)))
        assert not nothing.any()


def test_a_figure_of_eight_covers_both_loops():
    # Its diagonals are y = x + 0.25 and y = 4.25 - x. Columns 0 and 3: centers from 0.75 to 3.75,
    # columns 1 and 2: from 1.75 to 2.75.
    (eight,) = rasterize(([0, 0.25, 4, 4.25, 4, 0.25, 0, 4.25], (5, 4)))
    np.testing.assert_array_equal(
        eight, [[0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]
    )


def test_what_is_gone_around_twice_is_a_hole():
    (ring,) = rasterize(([0, 0, 4, 0, 4, 4, 0, 4, 0, 0, 1, 1, 3, 1, 3, 3, 1, 3, 1, 1], (4, 4)))
    np.testing.assert_array_equal(ring, [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])


def test_polygons_do_not_disturb_each_other():
    shapes = [
        ([1, 1, 6, 2, 3, 7], (8, 9)),
        ([0, 0, 2, 0, 2, 2, 0, 2], (2, 2)),
        ([0, 0, 9, 9, 0, 9], (3, 17)),
    ]
    alone = [rasterize(shape)[0] for shape in shapes]
    for one, other in zip(rasterize(*shapes), alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_line_covers_nothing_and_no_polygons_give_no_masks():
    assert not rasterize(([1, 1, 5, 5], (6, 6)))[0].any()
    assert rasterize() == []


def test_random_polygons_agree_with_pycocotools_but_for_their_borders():
    draws = Words("polygons")
    num_different = num_pixels = border = 0
    for _ in range(60):
        angles = np.sort([draws.uniform(0, 2 * np.pi) for _ in range(12)])
        radii = np.array([draws.uniform(10, 40) for _ in range(12)])
        corners = np.stack([45 + radii * np.cos(angles), 40 + radii * np.sin(angles)], axis=1)
        (mask,) = rasterize((corners, (80, 90)))
        expected = coco_mask.decode(coco_mask.frPyObjects([corners.reshape(-1).tolist()], 80, 90))
        num_different += int((mask != expected[..., 0]).sum())
        num_pixels += int(mask.sum()) - int(expected.sum())
        border += np.abs(corners - np.roll(corners, 1, axis=0)).sum()
    # pycocotools rounds corners to a fifth of a pixel: 0.1 pixel off at most, along the border.
    assert num_different < 0.1 * border
    assert abs(num_pixels) < 0.01 * border  # neither thicker nor thinner


def test_rle_is_sampled_at_points():
    bitmap = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)
    compressed = coco_mask.encode(np.asfortranarray(bitmap))
    plain = {"size": [2, 3], "counts": [2, 1, 1, 2]}  # down the columns: 00, 10, 11
    for rle in (compressed, plain):
        found = sample_rle(rle, np.array([0.5, 1.5, 2.5]), np.array([0.5, 1.5]))
        np.testing.assert_array_equal(found, bitmap)
        twice = sample_rle(rle, (np.arange(6) + 0.5) / 2, (np.arange(4) + 0.5) / 2)
        np.testing.assert_array_equal(twice, bitmap.repeat(2, axis=0).repeat(2, axis=1))


def test_rounding_at_the_far_edge_stays_inside_the_stored_mask():
    rle = {"size": [2, 2], "counts": [0, 4]}
    assert sample_rle(rle, np.array([2.0]), np.array([2.0])).tolist() == [[1]]
