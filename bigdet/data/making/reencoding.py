"""Images made smaller once, with all that refers to their pixels, for training at low resolution.

Small JPEGs are read and decoded several times as fast. Coordinates are scaled by the two sides'
own factors, as whole pixels change the aspect ratio a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.data.examples.masks import sample_rle
from bigdet.data.format.manifest import ShardError
from bigdet.data.making.annotations import MIN_SIDE
from bigdet.data.making.shard_tar import SampleLog

DECIMALS = 3  # of coordinates
BYTES_PER_PIXEL = 0.6  # for COCO's images at quality 95 and 4:4:4; used to plan the shards

Json = dict[str, Any]


@dataclass(frozen=True)
class Reencoding:
    """How images are made smaller.

    Attributes:
        long_side: pixels; images that are not larger keep their bytes.
        quality: of the JPEGs, 1..100; their colors are not subsampled (4:4:4).
    """

    long_side: int
    quality: int = 95

    def __post_init__(self) -> None:
        if self.long_side < 1 or not 1 <= self.quality <= 100:
            raise ShardError(
                f"long side {self.long_side}, quality {self.quality}: expected pixels, at least 1, "
                "and 1 to 100."
            )

    def estimate_bytes(
        self,
        file_bytes: NDArray[np.int64],
        pixels: NDArray[np.int64],
        long_sides: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return the estimated bytes of images of these sizes, ``(N,)``."""
        scales = self.long_side / np.maximum(long_sides, 1)
        made = (pixels * scales**2 * BYTES_PER_PIXEL).astype(np.int64)
        return np.where((scales < 1) & (file_bytes > 0), made, file_bytes)


def reencode(
    image_bytes: bytes, pixels: NDArray[np.uint8], record: Json, how: Reencoding, log: SampleLog
) -> tuple[bytes, Json]:
    """Return image and record of a sample, smaller.

    ``pixels``, ``(H, W, 3)`` uint8, are those of ``image_bytes``. Annotations of which nothing is
    left are noted in the log.
    """
    height, width = record["height"], record["width"]
    if max(height, width) <= how.long_side:
        return image_bytes, record
    # Here, because images that keep their bytes are converted without torch.
    import torch

    from bigdet.ops.resize import resize_image
    from bigdet.ops.sizes import eval_size

    size = eval_size(height, width, how.long_side, how.long_side)
    smaller = resize_image(torch.from_numpy(pixels).permute(2, 0, 1), size)
    resized = smaller.permute(1, 2, 0).contiguous().numpy()  # (h, w, 3)
    data: bytes = simplejpeg.encode_jpeg(resized, quality=how.quality, colorsubsampling="444")
    annotations = []
    for annotation in record["annotations"]:
        scaled = scale_annotation(annotation, (height, width), size)
        about = {"image_id": record["image_id"], "annotation_id": annotation["id"]}
        if min(scaled["bbox"][2:]) < MIN_SIDE:
            log.change("annotation dropped: box has no area at the smaller size", **about)
            continue
        if "segmentation" in annotation and "segmentation" not in scaled:
            log.change("mask dropped: no pixel of it is left at the smaller size", **about)
        annotations.append(scaled)
    return data, {**record, "height": size[0], "width": size[1], "annotations": annotations}


def scale_annotation(annotation: Json, old_size: tuple[int, int], size: tuple[int, int]) -> Json:
    """Return an annotation of an image that was resized from a height and width to others.

    A mask of which no pixel is left is dropped.
    """
    y_scale, x_scale = size[0] / old_size[0], size[1] / old_size[1]
    x, y, w, h = annotation["bbox"]
    scaled = {
        **annotation,
        "bbox": [
            round(value, DECIMALS) for value in (x * x_scale, y * y_scale, w * x_scale, h * y_scale)
        ],
        "area": round(annotation["area"] * x_scale * y_scale, DECIMALS),
    }
    mask = scaled.pop("segmentation", None)
    if isinstance(mask, list):
        scaled["segmentation"] = [
            [
                round(value * (y_scale if place % 2 else x_scale), DECIMALS)
                for place, value in enumerate(polygon)
            ]
            for polygon in mask
        ]
    elif mask is not None and (runs := _scale_runs(mask, (x_scale, y_scale), size)) is not None:
        scaled["segmentation"] = runs
    if "keypoints" in annotation:
        scaled["keypoints"] = _scale_keypoints(annotation["keypoints"], (x_scale, y_scale))
    return scaled


def _scale_keypoints(keypoints: list[float], scales: tuple[float, float]) -> list[float]:
    """Return x, y, visibility of each keypoint, flat; those that are not labeled stay.

    COCO counts pixels here, so 0 is the center of the first one; nothing is below it.
    """
    scaled: list[float] = []
    for *point, visibility in zip(keypoints[::3], keypoints[1::3], keypoints[2::3], strict=True):
        if visibility:
            point = [
                max(0, round((value + 0.5) * scale - 0.5, DECIMALS))
                for value, scale in zip(point, scales, strict=True)
            ]
        scaled += [*point, visibility]
    return scaled


def _scale_runs(mask: Json, scales: tuple[float, float], size: tuple[int, int]) -> Json | None:
    """Return an RLE sampled at the centers of the new pixels."""
    columns = np.arange(0.5, size[1]) / scales[0]
    rows = np.arange(0.5, size[0]) / scales[1]
    bitmap = np.asfortranarray(sample_rle(mask, columns, rows))
    if not bitmap.any():
        return None
    return {"size": list(size), "counts": coco_mask.encode(bitmap)["counts"].decode("ascii")}
