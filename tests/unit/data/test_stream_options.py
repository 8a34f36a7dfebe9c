"""What the stream gives by its options: sizes that vary, keypoints, images decoded smaller."""

from __future__ import annotations

import io
from itertools import islice

import pytest
import torch
from PIL import Image

from bigdet.config.resize import ResizeConfig
from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from tests.unit.data.streams import open_stream


@pytest.fixture
def people_shards(tmp_path):
    """Four gray images of 200 x 100 with a person of two keypoints and a chair."""
    person = Category(1, "person", keypoints=["left", "right"], flip_pairs=[[0, 1]])
    options = {"name": "people", "source": "coco", "categories": [person, Category(2, "chair")]}
    file = io.BytesIO()
    Image.new("RGB", (100, 200), "gray").save(file, "JPEG")
    with ShardWriter(tmp_path / "people", options={}, **options) as writer:
        for image_id in range(1, 5):
            found = [
                {
                    "id": 1,
                    "label": 0,
                    "bbox": [10, 20, 40, 60],
                    "area": 2400,
                    "iscrowd": 0,
                    "keypoints": [20, 30, 2, 40, 50, 1],
                },
                {"id": 2, "label": 1, "bbox": [5, 5, 9, 9], "area": 81, "iscrowd": 0},
            ]
            size = {"file_name": "x", "height": 200, "width": 100}
            writer.add(file.getvalue(), {"image_id": image_id, **size, "annotations": found})
    return ShardSet(tmp_path / "people")


def test_all_lanes_of_a_step_share_a_size_that_varies(people_shards):
    resize = ResizeConfig(kind="short_side", size=128, size_range=(32, 64))
    stream = open_stream(people_shards, resize=resize, images_per_gpu=1, images_per_step=4)
    sizes = [
        {tuple(stream.read_group(step, lane).image_sizes[0].tolist()) for lane in range(4)}
        for step in range(1, 9)
    ]
    assert all(len(found) == 1 for found in sizes)
    assert all(32 <= size[1] <= 64 and size[0] == 2 * size[1] for found in sizes for size in found)
    assert len(set.union(*sizes)) > 4


def test_two_shapes_are_all_that_a_model_sees(coco_dir, tmp_path):
    from bigdet.data.making.sources.coco import convert_coco

    convert_coco(
        coco_dir / "val2017", coco_dir / "annotations" / "instances_val2017.json", tmp_path / "val"
    )
    resize = ResizeConfig(kind="short_side", size=100, cap=150, pad_to="two_shapes")
    stream = open_stream(
        ShardSet(tmp_path / "val"), resize=resize, images_per_gpu=4, images_per_step=4
    )
    shapes = {}
    for step in range(1, 41):
        batch = stream.read_group(step, 0)
        height, width = batch.images.shape[-2:]
        heights, widths = batch.original_sizes.unbind(dim=1)
        kinds = shapes.setdefault((height, width), set())
        for own, stored in zip(
            batch.image_sizes.tolist(), batch.original_sizes.tolist(), strict=True
        ):
            is_same_way = (own[0] > own[1]) == (height > width) or stored[0] == stored[1]
            kinds.add(is_same_way)
            assert own[0] <= height
            assert own[1] <= width
            # As ever, or, where it lies across and is too long, as long as the canvas allows.
            assert min(own) == 100 or max(own) == (150 if is_same_way else 128)
        num_portrait, num_landscape = (heights > widths).sum(), (widths > heights).sum()
        assert (num_portrait > num_landscape) == (height > width)
    assert shapes == {(128, 160): {True, False}, (160, 128): {True, False}}


def test_keypoints_come_with_the_targets_where_they_are_wanted(people_shards):
    assert people_shards.categories[0].flip_pairs == [[0, 1]]  # by way of the manifest
    settings = {
        "resize": ResizeConfig(kind="short_side", size=50, cap=100),
        "images_per_gpu": 2,
        "images_per_step": 2,
        "with_keypoints": True,
    }
    batch = next(iter(open_stream(people_shards, **settings, flip=0.0)))
    # At half size: pixel 20, 30 has its center at 20.5 / 2, 30.5 / 2.
    expected = torch.tensor([[[10.25, 15.25, 2], [20.25, 25.25, 1]], [[0, 0, 0]] * 2])
    torch.testing.assert_close(batch.targets.keypoints, expected.repeat(2, 1, 1))
    flipped = next(iter(open_stream(people_shards, **settings, flip=1.0, workers=1)))
    expected = torch.tensor([[[29.75, 25.25, 1], [39.75, 15.25, 2]], [[0, 0, 0]] * 2])
    torch.testing.assert_close(flipped.targets.keypoints, expected.repeat(2, 1, 1))
    without = next(iter(open_stream(people_shards, **{**settings, "with_keypoints": False})))
    assert without.targets.keypoints is None


def test_keypoints_that_the_set_does_not_have_are_an_error(people_shards):
    people_shards.categories[0] = Category(1, "person")
    with pytest.raises(ValueError, match="have none"):
        open_stream(
            people_shards,
            resize=ResizeConfig(kind="direct", size=96),
            images_per_gpu=1,
            images_per_step=1,
            with_keypoints=True,
        )


def test_scaled_decoding_changes_pixels_a_little_and_nothing_else(coco_dir, tmp_path):
    from bigdet.data.making.sources.coco import convert_coco

    convert_coco(
        coco_dir / "val2017", coco_dir / "annotations" / "instances_val2017.json", tmp_path / "val"
    )
    shards = ShardSet(tmp_path / "val")
    settings = {
        "resize": ResizeConfig(kind="direct", size=160),
        "images_per_gpu": 4,
        "images_per_step": 4,
        "keep_empty": False,
    }
    whole = open_stream(shards, **settings).read_group(1, 0)
    scaled = open_stream(shards, **settings, scaled_decoding=True).read_group(1, 0)
    assert torch.equal(whole.targets.boxes, scaled.targets.boxes)
    assert torch.equal(whole.image_sizes, scaled.image_sizes)
    difference = (whole.images.float() - scaled.images.float()).abs()
    assert 0 < difference.mean() < 1.5


@pytest.mark.parametrize("kind", ["wrong_size", "undecodable"])
def test_scaled_decoding_notices_damage(people_shards, monkeypatch, kind):
    read = ShardSet.read

    def read_damaged(self, row):
        sample = read(self, row)
        if row != 2:
            return sample
        if kind == "wrong_size":
            sample.record["height"] += 1
            return sample
        return type(sample)(sample.image_bytes[:-60], sample.record)

    monkeypatch.setattr(ShardSet, "read", read_damaged)
    stream = open_stream(
        people_shards,
        resize=ResizeConfig(kind="short_side", size=20),
        images_per_gpu=1,
        images_per_step=1,
        max_damaged=1,
        scaled_decoding=True,
    )
    list(islice(stream, 4))
    assert stream.damaged == {kind: 1}
