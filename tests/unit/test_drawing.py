from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from bigdet.pictures.drawing import MIN_LONG_SIDE, _LabelWriter, class_color, draw, draw_detections
from bigdet.structures import Detections

GRAY = 100


CATEGORIES = [{"name": "cat"}, {"name": "dog"}]
PEOPLE = [{"name": "person", "skeleton": [[0, 1], [1, 2]]}]


def gray(height, width):
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def test_small_image_is_enlarged_to_the_long_side_that_text_needs():
    picture = draw(gray(64, 128), np.zeros((0, 4)), [], [])
    assert picture.size == (MIN_LONG_SIDE, MIN_LONG_SIDE // 2)


def test_large_image_keeps_its_size_and_without_objects_its_pixels():
    image = gray(600, 900)
    picture = draw(image, [], [], [], [], [])
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_box_is_drawn_along_its_edges_in_the_color_of_its_class():
    picture = np.asarray(draw(gray(900, 900), [[200, 300, 500, 600]], ["cat"], [3]))
    color = class_color(3)
    for y, x in [(300, 350), (600, 350), (450, 200), (450, 500), (300, 200), (600, 500)]:
        assert tuple(picture[y, x]) == color
    assert tuple(picture[450, 350]) == (GRAY, GRAY, GRAY)  # inside: untouched
    assert tuple(picture[620, 350]) == (GRAY, GRAY, GRAY)  # outside


def test_mask_is_translucent_inside_and_solid_on_its_outline_at_its_enlarged_place():
    mask = np.zeros((80, 80), dtype=bool)
    mask[20:60, 30:50] = True  # enlarged 10 times: rows 200 to 600, columns 300 to 500
    picture = np.asarray(draw(gray(80, 80), [[30, 20, 50, 60]], ["x"], [0], masks=[mask]))
    assert picture.shape == (800, 800, 3)
    # 0.4 of the color over 0.6 of the gray below
    expected = 0.4 * np.array(class_color(0)) + 0.6 * GRAY
    np.testing.assert_allclose(picture[400, 400], expected, atol=2)
    painted = (picture != GRAY).any(axis=2)
    assert painted[203:597, 303:497].all()
    assert not painted[:, :295].any()
    assert not painted[:, 510:].any()


def test_mask_at_the_border_of_the_image_and_empty_mask_are_drawn():
    full, empty = np.ones((50, 70), dtype=bool), np.zeros((50, 70), dtype=bool)
    boxes = [[0, 0, 70, 50], [5, 5, 5, 5], [1, 1, 9, 9]]
    picture = draw(gray(50, 70), boxes, ["a", "b", "c"], [0, 1, 2], masks=[full, empty, None])
    painted = (np.asarray(picture) != GRAY).any(axis=2)
    assert painted.mean() > 0.99  # an antialiased pixel of the text may happen to be gray


def test_name_at_the_top_right_corner_stays_inside_the_picture():
    box = [[880, 0, 899, 20]]
    with_name = np.asarray(draw(gray(900, 900), box, ["traffic light"], [1], [0.5]))
    without = np.asarray(draw(gray(900, 900), box, [""], [1]))
    changed = (with_name != without).any(axis=2)
    assert changed.sum() > 1000  # a filled label of about 100 x 18 pixels
    assert (with_name == np.array(class_color(1))).all(axis=2).sum() > 800


def test_text_wider_than_the_picture_is_cut():
    picture = draw(gray(800, 100), [[10, 100, 90, 200]], ["a very long name " * 4], [0])
    assert picture.size == (100, 800)
    painted = (np.asarray(picture) != GRAY).any(axis=2)
    assert painted.sum(axis=1).max() <= 0.9 * 100 + 6  # the limit of a text and its margins


def test_names_of_equal_boxes_do_not_cover_each_other():
    boxes = [[300, 300, 500, 500]] * 3
    picture = np.asarray(draw(gray(900, 900), boxes, ["one", "two", "six"], [0, 1, 2]))
    filled = [(picture == np.array(class_color(label))).all(axis=2).sum() for label in (0, 1)]
    alone = np.asarray(draw(gray(900, 900), boxes[:1], ["one"], [0]))
    area = (alone == np.array(class_color(0))).all(axis=2).sum() - 2 * 4 * 200  # less the outline
    assert min(filled) > 0.5 * area


def test_names_that_would_cover_others_are_left_out_but_for_the_first_of_each_class():
    # 40 cats one upon another, and two dogs among them, of which the second is the surer one.
    labels, scores = [0] * 20 + [1, 1] + [0] * 20, [0.9] + [0.5] * 20 + [0.6] + [0.5] * 20
    boxes = [[400, 400, 460, 430]] * 42
    written = []
    write = _LabelWriter.write

    def spy(writer, text, *rest, **options):
        count = len(writer.taken)
        write(writer, text, *rest, **options)
        written.append((text, writer.taken[count:]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_LabelWriter, "write", spy)
        draw(
            gray(900, 900),
            boxes,
            ["cat" if label == 0 else "dog" for label in labels],
            labels,
            scores,
        )
    assert len(written) == 42
    shown = [(text, places[0]) for text, places in written if places]
    assert [text for text, _ in shown[:2]] == ["cat 0.90", "dog 0.60"]
    assert 4 <= len(shown) <= 18  # so many places there are
    for (_, one), (_, other) in combinations(shown, 2):
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        area = (one[2] - one[0]) * (one[3] - one[1])
        assert max(width, 0) * max(height, 0) <= 0.5 / 3 * area  # a sixth, as MOST_HIDDEN says


def test_lines_go_around_a_tiny_object():
    box, mask = [[400, 300, 405, 304]], np.zeros((900, 900), dtype=bool)
    mask[300:304, 400:405] = True
    picture = np.asarray(draw(gray(900, 900), box, [""], [3], masks=[mask]))
    color = class_color(3)
    assert (picture[298, 398:408] == color).all()  # two pixels beyond the edges
    assert (picture[306, 398:408] == color).all()
    inside = 0.4 * np.array(color) + 0.6 * GRAY  # the mask, without an outline
    np.testing.assert_allclose(picture[301:303, 401:404], np.tile(inside, (2, 3, 1)), atol=2)


def test_class_colors_are_stable_and_differ_between_80_classes():
    colors = [class_color(label) for label in range(80)]
    assert colors == [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    differences = [np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colors)]
    assert min(differences) > 150


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (2000, 1500)])
def test_any_image_size_and_boxes_beyond_it_are_drawn(size):
    height, width = size
    box = [[-5.0, -5.0, width + 5.0, height + 5.0]]
    picture = draw(gray(height, width), box, ["person"], [0], [0.99], [np.ones(size, dtype=bool)])
    assert max(picture.size) == max(MIN_LONG_SIDE, height, width)


def test_detections_above_the_threshold_are_drawn_with_their_masks():
    detections = Detections(
        boxes=torch.tensor([[100.0, 100.0, 300.0, 300.0], [500.0, 500.0, 700.0, 700.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 0]),
        masks=torch.ones(2, 28, 28),
    )
    picture = np.asarray(draw_detections(gray(800, 800), detections, CATEGORIES, 0.5))
    expected = 0.4 * np.array(class_color(1)) + 0.6 * GRAY  # inside the first mask
    np.testing.assert_allclose(picture[200, 200], expected, atol=2)
    assert (picture[450:750, 450:750] == GRAY).all()


def test_image_without_detections_is_drawn_as_it_is():
    nothing = Detections(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28)
    )
    picture = np.asarray(draw_detections(gray(800, 800), nothing, CATEGORIES, 0.5))
    assert (picture == GRAY).all()


def test_keypoints_are_drawn_where_the_model_is_sure_and_joined_as_the_skeleton_says():
    # Three points on a line at y = 200; the last one's peak is too low to be shown.
    points = [[200.0, 200.0, 3.0], [300.0, 200.0, 2.5], [400.0, 200.0, 1.0]]
    detections = Detections(
        boxes=torch.tensor([[100.0, 100.0, 500.0, 300.0]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([0]),
        keypoints=torch.tensor([points]),
    )
    picture = np.asarray(draw_detections(gray(800, 800), detections, PEOPLE, 0.5))
    assert (picture[200, 200] == 255).all()
    assert (picture[200, 300] == 255).all()
    assert (picture[200, 250] == class_color(0)).all()  # the first line of the skeleton
    assert (picture[200, 350] == GRAY).all()
    assert (picture[200, 400] == GRAY).all()
