"""Small shard sets of images that no two of are alike."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter

HEIGHT, WIDTH = 24, 32
Change = dict[int, Any]


def noise_jpeg(seed: int) -> bytes:
    """An image that compresses badly, 1.4 KB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def record_of(image_id: int) -> dict[str, Any]:
    box = [2.0, 3.0, 10.0 + image_id % 7, 12.0]
    annotation = {"id": image_id, "label": image_id % 2, "bbox": box, "area": 100.0, "iscrowd": 0}
    about = {"image_id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT}
    return {**about, "width": WIDTH, "annotations": [annotation]}


def write_set(
    folder: Path, *, num_shards: int, per_shard: int, images: Change | None = None, seed: int = 0
) -> ShardSet:
    """Write shards of equally many images; ``images`` replaces the bytes of some rows."""
    with ShardWriter(
        folder,
        name="small",
        source="test",
        categories=[Category(1, "cat"), Category(2, "dog")],
        options={},
    ) as writer:
        for row in range(num_shards * per_shard):
            writer._limit = 0 if row % per_shard == 0 else 10**12  # bytes: begin a tar, or continue
            image = (images or {}).get(row) or noise_jpeg(seed + row)
            writer.add(image, record_of(row + 1))
    shards = ShardSet(folder)
    assert [shard.samples for shard in shards.manifest.shards] == [per_shard] * num_shards
    return shards


def forget_hashes(folder: Path) -> None:
    """Make a set one of a version before manifest and index had hashes."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["sha256"], values["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(values))
