"""A small data set in COCO's form under a temporary folder, for the tests of converters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.coco import convert_coco

HEIGHT, WIDTH = 6, 8
CATEGORIES = [
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    {"id": 2, "name": "bicycle"},
]


def image_of(image_id: int, **changes: Any) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH}
    return {"id": image_id, "file_name": f"{image_id}.jpg", **size, **changes}


def box_of(number: int, image_id: int = 1, **changes: Any) -> dict[str, Any]:
    about = {"id": number, "image_id": image_id, "category_id": 2, "iscrowd": 0}
    return {**about, "bbox": [1, 2, 3, 2], "area": 5.5, **changes}


class Trial:
    """A folder of images, an annotation file and a folder for the shards."""

    def __init__(self, root: Path) -> None:
        self.images, self.file, self.out = root / "images", root / "a.json", root / "out"
        self.images.mkdir()

    def picture(self, name: str, image_format: str = "JPEG", width: int = WIDTH) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (width, HEIGHT), (200, 100, 50)).save(file, image_format)
        (self.images / name).write_bytes(file.getvalue())
        return file.getvalue()

    def convert(self, images: list[Any], annotations: list[Any], **options: Any) -> ShardSet:
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        self.file.write_text(json.dumps(content))
        convert_coco(self.images, self.file, self.out, **options)
        return ShardSet(self.out)

    def log(self) -> list[dict[str, Any]]:
        lines = (self.out / "skipped.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def assert_nothing_is_left(self) -> None:
        assert not self.out.exists()
