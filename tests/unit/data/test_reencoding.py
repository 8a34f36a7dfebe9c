from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from pycocotools import mask as coco_mask

from bigdet.data.examples.decode import decode_pixels
from bigdet.data.examples.objects import Wanted, objects_in_view
from bigdet.data.examples.views import whole_view
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.conversion import Making
from bigdet.data.making.reencoding import Reencoding, reencode, scale_annotation
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.shard_tar import SampleLog
from bigdet.data.making.sources.coco import convert_coco

BOX = {"id": 5, "label": 0, "bbox": [10, 20, 30, 40], "area": 900.0, "iscrowd": 0}


def sample(height: int, width: int, *annotations: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 200  # dark left, light right
    about = {"image_id": 1, "file_name": "a.jpg", "height": height, "width": width}
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=95)
    return data, {**about, "annotations": list(annotations)}


def test_all_that_refers_to_pixels_is_scaled_by_each_sides_own_factor() -> None:
    annotation = {
        **BOX,
        "segmentation": [[10, 20, 40, 20, 40, 60]],
        "keypoints": [10, 20, 2, 0, 0, 0],
    }
    # From 100 x 200 to 50 x 150: y by a half, x by three quarters.
    assert scale_annotation(annotation, (100, 200), (50, 150)) == {
        **BOX,
        "bbox": [7.5, 10, 22.5, 20],
        "area": 337.5,
        "segmentation": [[7.5, 10, 30, 10, 30, 30]],
        "keypoints": [7.375, 9.75, 2, 0, 0, 0],  # centers of pixels: 10.5 x 3/4 and 20.5 / 2
    }


@pytest.mark.parametrize("point", [(100, 200), (0.5, 479), (639, 0)])
def test_a_keypoint_is_seen_at_the_same_place_in_both_sizes(point: tuple[float, float]) -> None:
    wanted = Wanted(keypoint_order=np.array([0]))
    whole = {**BOX, "bbox": [0, 0, 640, 480], "keypoints": [*point, 2]}
    small = scale_annotation(whole, (480, 640), (240, 320))
    expected, found = (
        objects_in_view([each], whole_view(size, (224, 224)), wanted).keypoints
        for each, size in ((whole, (480, 640)), (small, (240, 320)))
    )
    # At 0 of the large image it would be at -0.25 of the small one, but stays at 0: 0.175 pixels.
    np.testing.assert_allclose(found, expected, atol=1e-3 if 0 not in point else 0.176)


def test_a_run_length_mask_is_sampled_at_the_new_pixels() -> None:
    bitmap = np.zeros((100, 200), dtype=np.uint8, order="F")
    bitmap[20:60, 10:40] = 1
    rle = coco_mask.encode(bitmap)
    mask = {"size": [100, 200], "counts": rle["counts"].decode()}
    scaled = scale_annotation({**BOX, "segmentation": mask}, (100, 200), (50, 100))
    small = np.zeros((50, 100), dtype=np.uint8)
    small[10:30, 5:20] = 1
    assert (coco_mask.decode(scaled["segmentation"]) == small).all()
    bitmap[:] = 0
    bitmap[0, 0] = 1  # smaller than a pixel of an image of a tenth, and not at its center
    mask["counts"] = coco_mask.encode(bitmap)["counts"].decode()
    gone = scale_annotation({**BOX, "segmentation": mask}, (100, 200), (10, 20))
    assert "segmentation" not in gone


def test_a_large_image_is_made_smaller_as_jpeg_without_subsampled_colors() -> None:
    data, record = sample(480, 640, BOX, {**BOX, "id": 6, "bbox": [3, 3, 0.012, 9]})
    log = SampleLog()
    made, smaller = reencode(data, decode_pixels(data), record, Reencoding(320), log)
    assert (smaller["height"], smaller["width"]) == (240, 320)
    assert simplejpeg.decode_jpeg_header(made) == (240, 320, "YCbCr", "444")
    pixels = simplejpeg.decode_jpeg(made)
    assert pixels[:, :150].max() < 10
    assert abs(int(pixels[:, 170:].min()) - 200) < 10
    assert [entry["bbox"] for entry in smaller["annotations"]] == [[5, 10, 15, 20]]
    reason = "annotation dropped: box has no area at the smaller size"
    assert log.lines == [{"changed": reason, "image_id": 1, "annotation_id": 6}]


def test_an_image_that_is_small_already_keeps_its_bytes() -> None:
    data, record = sample(100, 64, BOX)
    assert reencode(data, decode_pixels(data), record, Reencoding(100), SampleLog()) == (
        data,
        record,
    )


@pytest.mark.parametrize(("long_side", "quality"), [(0, 95), (448, 0), (448, 101)])
def test_sizes_and_qualities_that_are_none_are_errors(long_side: int, quality: int) -> None:
    with pytest.raises(ShardError, match="expected pixels, at least 1, and 1 to 100"):
        Reencoding(long_side, quality)


def test_real_images_get_smaller_with_outlines_that_still_fit_their_boxes(
    coco_dir: Path, tmp_path: Path
) -> None:
    file = coco_dir / "annotations" / "instances_val2017.json"
    making = Making(5, reencoding=Reencoding(448))
    manifest = convert_coco(coco_dir / "val2017", file, tmp_path, making=making)
    assert manifest is not None
    assert (manifest.images, manifest.instances) == (192, 1525)
    assert manifest.options["long_side"] == 448
    assert manifest.options["quality"] == 95
    assert list(check_shards(tmp_path)) == []
    shards = ShardSet(tmp_path)
    assert np.maximum(shards.index["width"], shards.index["height"]).max() == 448
    whole = sum(path.stat().st_size for path in (coco_dir / "val2017").iterdir())
    assert shards.index["image_size"].sum() < 0.6 * whole
    num_masks = 0
    for row in range(0, len(shards), 4):
        record = shards.record(row)
        for annotation in record["annotations"]:
            mask = annotation["segmentation"]
            if annotation["iscrowd"]:
                continue
            points = np.concatenate(mask).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            # COCO's boxes are the extents of the outlines, but for tips that were drawn later.
            np.testing.assert_allclose([*low, *high - low], annotation["bbox"], atol=2)
            num_masks += 1
    assert num_masks > 300
