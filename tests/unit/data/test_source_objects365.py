from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.coco import convert_coco, convert_objects365
from bigdet.data.making.sources.file_names import find_files


def write_image(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg(np.full((height, width, 3), 120, dtype=np.uint8)))


@pytest.mark.parametrize("on_disk", ["images/v1/patch8", "v1/patch8", "patch8", ""])
def test_files_are_found_by_the_end_of_their_names(tmp_path: Path, on_disk: str) -> None:
    write_image(tmp_path / on_disk / "x.jpg", 4, 4)
    found = find_files(tmp_path, ["images/v1/patch8/x.jpg", "images/v1/patch8/y.jpg"])
    assert found.paths == [f"{on_disk}/x.jpg".strip("/"), "images/v1/patch8/y.jpg"]
    assert (found.file_bytes > 0).tolist() == [True, False]


def test_the_layout_of_the_release_is_read(coco_dir: Path, tmp_path: Path) -> None:
    """Images of the right sizes are made up; two of the four are truly absent from the archives."""
    layout = coco_dir.parent / "objects365_layout"
    file = layout / "zhiyuan_objv2_sample.json"
    content: dict[str, Any] = json.loads(file.read_text())
    assert "info" not in content
    absent = json.loads((layout / "known_bad_files.json").read_text())["missing_on_disk"]
    for image in content["images"]:
        name = image["file_name"]
        if name not in absent:
            path = tmp_path / "train" / Path(*Path(name).parts[2:])  # without images/v1
            write_image(path, image["height"], image["width"])
    convert_objects365(tmp_path / "train", file, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert shards.index["image_id"].tolist() == [23118, 420917]
    assert shards.manifest.source == "objects365"
    assert shards.manifest.skipped == {"file missing": 2}
    categories = json.loads((layout / "categories_v2.json").read_text())
    assert [c.id for c in shards.categories] == list(range(1, 366))
    by_id = {category["id"]: category["name"] for category in categories}
    assert all(category.name == by_id[category.id] for category in shards.categories)
    assert {"Cigar/Cigarette ", "Moniter/TV"} <= {category.name for category in shards.categories}
    record = shards.record(1)
    assert record["file_name"] == "images/v1/patch8/objects365_v1_00420917.jpg"
    (annotation,) = record["annotations"]
    assert (annotation["id"], annotation["label"]) == (51, 83)  # category 84
    assert len(shards.record(0)["annotations"]) == 6
    assert list(check_shards(tmp_path / "out")) == []
    assert shards.manifest.changed == {}
    other = convert_coco(tmp_path / "train", file, tmp_path / "other")
    assert other is not None  # of other sources it is said where the files were found
    assert other.changed == {"file found by leaving out the front of the path": 2}
