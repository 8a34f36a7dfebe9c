"""Results and detections of a data set whose image ids are strings."""

import io
import json
import logging

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bigdet.cli.inputs import list_inputs
from bigdet.cli.score_file import warn_of_nothing, with_own_ids
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.evaluate import write_detections
from bigdet.evaluation.detections import ResultsError, load_results
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections

BOX = [10, 10, 40, 40]


def make(folder, *ids):
    """Two gray images of 100 x 100 pixels, with an object each."""
    buffer = io.BytesIO()
    Image.new("RGB", (100, 100), (90, 90, 90)).save(buffer, "jpeg")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number, image_id in enumerate(ids):
        (folder / f"images/{number}.jpg").write_bytes(buffer.getvalue())
        images.append({"id": image_id, "file_name": f"{number}.jpg", "height": 100, "width": 100})
        about = {"id": number + 1, "image_id": image_id, "category_id": 5, "iscrowd": 0}
        annotations.append(about | {"bbox": BOX, "area": 1600})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 5, "name": "a"}]
    (folder / "a.json").write_text(json.dumps(content))
    convert_coco(folder / "images", folder / "a.json", folder / "shards")
    return ShardSet(folder / "shards")


def found(image_id, score=0.9):
    return {"image_id": image_id, "category_id": 5, "bbox": BOX, "score": score}


@pytest.mark.parametrize("ids", [("2299", "0031"), ("x/b.png", "a")])
def test_results_name_images_as_the_annotations_do(tmp_path, ids):
    shards = make(tmp_path, *ids)
    assert evaluate_detections(shards, [found(one) for one in ids], ("bbox",))["bbox"]["AP"] == 1.0
    # One of two objects found: precision 1 up to a recall of 0.5, at 51 of 101 places.
    half = evaluate_detections(shards, [found(ids[0])], ("bbox",))
    assert half["bbox"]["AP"] == pytest.approx(51 / 101)
    with pytest.raises(ResultsError, match='image_id is "b", which none of the 2 images'):
        evaluate_detections(shards, [found("b")], ("bbox",))


def test_results_of_numbers_mixed_with_names_are_of_the_images_with_these_ids(tmp_path):
    shards = make(tmp_path, "a", 2, 1)  # numbered 1, 2, 3
    results = list(with_own_ids([found(1), found(2.0), found("a")], shards))
    assert [result["image_id"] for result in results] == ["1", "2", "a"]
    truth = read_ground_truth(shards, False, False)
    assert truth.source_ids == {"a": 1, "2": 2, "1": 3}


def test_results_of_numbers_are_places_where_all_ids_are_names(tmp_path):
    shards = make(tmp_path, "a", "0002")
    results = [found(1), found(2), {"image_id": [1]}]
    assert list(with_own_ids(results, shards)) == results


def test_detections_are_written_for_the_original_annotations(tmp_path):
    shards = make(tmp_path, "x/b.png", "a")
    source_ids = read_ground_truth(shards, False, False).source_ids
    assert source_ids == {"x/b.png": 1, "a": 2}
    file = tmp_path / "found.json"
    write_detections(file, [found(1), found(2, 0.8)], source_ids)
    results = list(load_results(file))
    assert [result["image_id"] for result in results] == ["x/b.png", "a"]
    truth = COCO(str(tmp_path / "a.json"))
    scored = COCOeval(truth, truth.loadRes(str(file)), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    assert scored.stats[0] == evaluate_detections(shards, results, ("bbox",))["bbox"]["AP"] == 1.0
    inputs, _ = list_inputs([str(tmp_path / "shards")])
    assert [(one.image_id, one.source_id) for one in inputs] == [(1, "x/b.png"), (2, "a")]


def test_numbers_stay_numbers(tmp_path):
    shards = make(tmp_path, 3, 8)
    assert read_ground_truth(shards, False, False).source_ids == {}
    write_detections(tmp_path / "found.json", [found(8)])
    assert json.loads((tmp_path / "found.json").read_text()) == [found(8)]
    assert [one.source_id for one in list_inputs([str(tmp_path / "shards")])[0]] == [None, None]


def test_a_set_with_nothing_to_find_is_reported(make_shards, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_nothing(
            make_shards([[{"id": 1, "label": 0, "bbox": BOX, "area": 1, "iscrowd": 1}]])
        )
    assert "has no object to find, only 1 crowd regions, so every AP is empty" in caplog.text
