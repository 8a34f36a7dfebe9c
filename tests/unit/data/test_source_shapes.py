from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources import shapes
from bigdet.data.making.sources.shapes import Shape, annotate, draw_image, make_shapes


def bitmap_of(annotation: dict[str, Any], height: int, width: int) -> NDArray[np.uint8]:
    mask = annotation["segmentation"]
    if isinstance(mask, list):
        mask = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    bitmap: NDArray[np.uint8] = coco_mask.decode(mask)
    return bitmap


def square() -> Shape:
    """A square of 10 pixels with its corner at x 4, y 2, in an image of 20 x 30."""
    outline = np.array([[4.0, 2.0], [14.0, 2.0], [14.0, 12.0], [4.0, 12.0]])
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[2:12, 4:14] = 1
    return Shape(1, outline, mask)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[NDArray[np.uint8], list[dict[str, Any]]]]:
    return [draw_image("train", 0, number, 128) for number in range(60)]


def test_an_object_in_full_view_is_a_polygon() -> None:
    shape = square()
    assert annotate(shape, shape.mask) == {
        "id": 0,
        "label": 1,
        "bbox": [4.0, 2.0, 10.0, 10.0],
        "area": 100,
        "iscrowd": 0,
        "segmentation": [[4.0, 2.0, 14.0, 2.0, 14.0, 12.0, 4.0, 12.0]],
    }


def test_box_and_mask_of_a_hidden_object_are_those_of_its_visible_part() -> None:
    shape = square()
    visible = shape.mask.copy()
    visible[:, :7] = 0  # the left part is hidden: columns 7 to 13 are left
    annotation = annotate(shape, visible)
    assert annotation is not None
    assert annotation["bbox"] == [7, 2, 7, 10]
    assert annotation["area"] == 70
    assert (coco_mask.decode(annotation["segmentation"]) == visible).all()


@pytest.mark.parametrize("last_visible_row", [2, 4])  # 0 and 20 of 100 pixels are left
def test_an_object_that_is_mostly_hidden_is_not_annotated(last_visible_row: int) -> None:
    shape = square()
    visible = shape.mask.copy()
    visible[last_visible_row:] = 0
    assert annotate(shape, visible) is None


def test_an_object_that_leaves_the_image_is_described_inside_of_it() -> None:
    outline = square().outline - [7.0, 0.0]  # x from -3 to 7
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[2:12, :7] = 1
    annotation = annotate(Shape(1, outline, mask), mask)
    assert annotation is not None
    assert annotation["bbox"] == [0, 2, 7, 10]
    assert isinstance(annotation["segmentation"], dict)


def test_every_mask_fills_its_box_and_has_its_area(
    drawn: list[tuple[NDArray[np.uint8], list[dict[str, Any]]]],
) -> None:
    num_objects = 0
    for pixels, objects in drawn:
        for annotation in objects:
            bitmap = bitmap_of(annotation, *pixels.shape[:2])
            rows, columns = bitmap.nonzero()
            x, y, w, h = annotation["bbox"]
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # A corner between two pixels reaches beyond the last pixel that counts as inside.
            np.testing.assert_allclose(edges, [x, y, x + w, y + h], atol=2.5)
            assert bitmap.sum() == annotation["area"] >= shapes.MIN_PIXELS
            num_objects += 1
    assert num_objects > 100


def test_the_masks_of_an_image_do_not_overlap(
    drawn: list[tuple[NDArray[np.uint8], list[dict[str, Any]]]],
) -> None:
    for pixels, objects in drawn:
        if objects:
            masks = [bitmap_of(annotation, *pixels.shape[:2]) for annotation in objects]
            assert np.sum(masks, axis=0).max() == 1


def test_the_color_changes_across_the_edge_of_an_object() -> None:
    contrast = []
    for number in range(40):
        pixels, objects = draw_image("train", 1, number, 128)
        for annotation in objects:
            bitmap = bitmap_of(annotation, *pixels.shape[:2]).astype(bool)
            inside = pixels[bitmap].mean(axis=0)
            contrast.append(np.abs(inside - pixels[~bitmap].mean(axis=0)).sum())
    assert np.mean(np.array(contrast) > 60) > 0.9


def test_the_set_has_all_classes_both_kinds_of_masks_and_an_image_without_objects() -> None:
    drawn = [draw_image("train", 0, number, 64)[1] for number in range(150)]
    objects = [annotation for annotations in drawn for annotation in annotations]
    assert {annotation["label"] for annotation in objects} == {0, 1, 2, 3}
    assert {type(annotation["segmentation"]) for annotation in objects} == {list, dict}
    assert [] in drawn
    assert max(len(annotations) for annotations in drawn) == shapes.MAX_OBJECTS


def test_an_image_depends_on_split_seed_and_number_alone(tmp_path: Path) -> None:
    make_shapes(tmp_path / "six", split="train", images=6, size=64)
    make_shapes(tmp_path / "four", split="train", images=4, size=64)
    make_shapes(tmp_path / "val", split="val", images=4, size=64)
    make_shapes(tmp_path / "seed", split="train", images=4, seed=1, size=64)
    six, four, val, seed = (ShardSet(tmp_path / name) for name in ("six", "four", "val", "seed"))
    for row in range(4):
        assert four.read(row).image_bytes == six.read(row).image_bytes
        assert four.record(row) == six.record(row)
        assert four.read(row).image_bytes != val.read(row).image_bytes
        assert four.read(row).image_bytes != seed.read(row).image_bytes


def test_made_shards_pass_the_check(shapes_shards: Path) -> None:
    for split, num_images in (("train", 16), ("val", 8)):
        shards = ShardSet(shapes_shards / split)
        assert len(shards) == num_images
        assert [category.name for category in shards.categories] == shapes.CLASSES
        assert max(shards.index["width"].max(), shards.index["height"].max()) == 128
        assert list(check_shards(shapes_shards / split)) == []
        ids = [a["id"] for row in range(num_images) for a in shards.record(row)["annotations"]]
        assert ids == list(range(1, len(ids) + 1))


def test_images_too_small_for_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: 47 pixels"):
        make_shapes(tmp_path / "tiny", split="train", images=4, size=47)
    assert not (tmp_path / "tiny").exists()
