from __future__ import annotations

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from bigdet.models.anchors import cell_anchors, grid_anchors, shape_anchors, within_border


def test_anchors_of_a_point_keep_the_area_and_have_the_ratio_of_height_to_width() -> None:
    # Area 32 x 32; of ratio 1/4 it is 64 wide and 16 high.
    expected = [[-32.0, -8.0, 32.0, 8.0], [-16.0, -16.0, 16.0, 16.0], [-8.0, -32.0, 8.0, 32.0]]
    assert cell_anchors(32, [0.25, 1.0, 4.0], rounded=False).tolist() == expected


def test_rounded_anchors_are_torchvisions() -> None:
    # 32 / sqrt(1/2) / 2 = 22.6 and 32 x sqrt(1/2) / 2 = 11.3.
    expected = [[-23.0, -11.0, 23.0, 11.0], [-16.0, -16.0, 16.0, 16.0], [-11.0, -23.0, 11.0, 23.0]]
    assert cell_anchors(32, [0.5, 1.0, 2.0], rounded=True).tolist() == expected


def test_the_grid_starts_at_the_origin_and_goes_along_rows() -> None:
    cell = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [-2.0, -1.0, 2.0, 1.0]])
    anchors = grid_anchors([(2, 2)], [(8, 4)], cell[None])
    expected = [
        [-1.0, -1.0, 1.0, 1.0],
        [-2.0, -1.0, 2.0, 1.0],
        [3.0, -1.0, 5.0, 1.0],  # 4 to the right
        [2.0, -1.0, 6.0, 1.0],
        [-1.0, 7.0, 1.0, 9.0],  # 8 down
        [-2.0, 7.0, 2.0, 9.0],
        [3.0, 7.0, 5.0, 9.0],
        [2.0, 7.0, 6.0, 9.0],
    ]
    assert anchors.tolist() == expected


def test_anchors_of_an_800_by_1344_canvas_are_as_many_as_published() -> None:
    # 3 x (200 x 336 + 100 x 168 + 50 x 84 + 25 x 42 + 13 x 21).
    strides = [4, 8, 16, 32, 64]
    sizes = [(-(-800 // s), -(-1344 // s)) for s in strides]
    cells = [cell_anchors(8 * s, [0.5, 1.0, 2.0], rounded=False) for s in strides]
    anchors = grid_anchors(sizes, [(s, s) for s in strides], torch.stack(cells))
    assert anchors.shape == (268_569, 4)


def test_anchors_of_several_sizes_go_by_ratio_first_as_torchvisions() -> None:
    generator = AnchorGenerator()
    expected = generator.generate_anchors((32, 64), (0.25, 1.0, 4.0)).double()
    assert torch.equal(shape_anchors([32, 64], [0.25, 1.0, 4.0], rounded=True), expected)
    # Size within ratio; without rounding the first two are exact.
    exact = shape_anchors([32, 64], [0.25, 1.0, 4.0], rounded=False)
    assert exact[:2].tolist() == [[-32.0, -8.0, 32.0, 8.0], [-64.0, -16.0, 64.0, 16.0]]


def test_anchors_that_cross_the_border_of_their_image_by_hand() -> None:
    # Images of 40 x 60 and 20 x 60 on one canvas. The first anchor is inside both, touching their
    # left and upper edges, the second reaches 4 pixels above, the third ends at y = 25.
    anchors = torch.tensor(
        [[0.0, 0.0, 8.0, 20.0], [10.0, -4.0, 18.0, 4.0], [50.0, 5.0, 60.0, 25.0]]
    )
    sizes = torch.tensor([[40, 60], [20, 60]])
    assert within_border(anchors, sizes, 0).tolist() == [[True, False, True], [True, False, False]]
    assert within_border(anchors, sizes, 4).tolist() == [[True, True, True], [True, True, False]]
    assert within_border(anchors, sizes, 5).all()
