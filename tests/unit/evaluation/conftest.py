import io

import pytest
from PIL import Image

from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter

CATEGORIES = [Category(17, "cat"), Category(3, "car")]  # ids neither dense nor sorted


@pytest.fixture
def make_shards(tmp_path):
    """Returns a function (list of lists of annotations) -> ShardSet of 100x100 gray images."""

    def make(images, categories=CATEGORIES):
        buffer = io.BytesIO()
        Image.new("RGB", (100, 100), (90, 90, 90)).save(buffer, "jpeg")
        about = {"name": "test", "source": "shapes", "categories": categories, "options": {}}
        with ShardWriter(tmp_path / "shards", **about) as writer:
            for number, annotations in enumerate(images):
                record = {"image_id": 7 + number, "file_name": f"{number}.jpg", "height": 100}
                writer.add(buffer.getvalue(), record | {"width": 100, "annotations": annotations})
        return ShardSet(tmp_path / "shards")

    return make
