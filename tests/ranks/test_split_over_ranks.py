"""A split over several ranks: the results of one process, and failures that all ranks share."""

import io

import pytest
import torch
from PIL import Image

from bigdet import distributed
from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.evaluation.split import Passes, predict_split
from tests.spawn import run_ranks
from tests.unit.evaluation.oracle import Oracle

CPU = torch.device("cpu")


@pytest.fixture
def seven_images(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 60), (90, 90, 90)).save(buffer, "jpeg")
    about = {"name": "test", "source": "shapes", "categories": [Category(17, "cat")], "options": {}}
    with ShardWriter(tmp_path / "shards", **about) as writer:
        for number in range(7):
            box = {"id": 1, "label": 0, "bbox": [10 * number, 5, 20, 30], "area": 600, "iscrowd": 0}
            record = {"image_id": 100 - number, "file_name": "x.jpg", "height": 60, "width": 100}
            writer.add(buffer.getvalue(), record | {"annotations": [box]})
    return tmp_path / "shards"


def on_one_rank(folder):
    shards = ShardSet(folder)
    oracle = Oracle(shards)
    return list(predict_split(oracle, shards, Passes((60, 100), 2), CPU)), oracle.passes


def shared_message(folder):
    try:
        on_one_rank(folder)
    except distributed.SharedError as error:
        return str(error)
    return None


def test_three_ranks_give_the_results_of_one_with_equally_many_passes(seven_images, tmp_path):
    expected, passes = on_one_rank(seven_images)
    assert [result["image_id"] for result in expected] == list(range(94, 101))
    assert passes == 4
    (first, *passes_of_others) = run_ranks(on_one_rank, 3, tmp_path, seven_images)
    assert first == (expected, 2)  # 7 images, by twos, on 3 ranks
    assert passes_of_others == [([], 2), ([], 2)]


def test_image_damaged_on_one_rank_is_raised_on_all_and_nobody_hangs(seven_images, tmp_path):
    shards = ShardSet(seven_images)
    with open(shards.path(5), "r+b") as file:
        file.seek(int(shards.index[5]["image_offset"]) + 100)
        file.write(b"damage")
    messages = run_ranks(shared_message, 2, tmp_path, seven_images)
    assert messages[0] == messages[1]
    assert shards.key(5) in messages[0]
