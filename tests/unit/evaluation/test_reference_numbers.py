"""Real COCO ground truth, through shards, against numbers that pycocotools gave without them."""

import argparse
import json
from types import SimpleNamespace

import pytest
from pycocotools.coco import COCO

from bigdet.benchmarks import evaluate as benchmark_evaluate
from bigdet.benchmarks.evaluate import coco_ground_truth
from bigdet.data.format.shard_set import Category, ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.evaluation.coco_metrics import METRICS, measure
from bigdet.evaluation.detections import read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections
from tests.unit.evaluation.reference_scores import pycocotools_stats


@pytest.fixture(scope="module")
def coco_val(coco_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "val"
    annotations = coco_dir / "annotations" / "instances_val2017.json"
    convert_coco(coco_dir / "val2017", annotations, folder)
    return ShardSet(folder)


@pytest.fixture(scope="module")
def references(coco_dir):
    folder = coco_dir.parent / "eval_refs"
    if not folder.is_dir():
        pytest.skip(f"no reference results in {folder}")
    return folder


@pytest.fixture(scope="module")
def expected(references):
    return json.loads((references / "expected.json").read_text())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_jittered_detections_score_what_pycocotools_says(references, expected, coco_val, kind):
    results = json.loads((references / "coco_val_jitter" / f"{kind}_results.json").read_text())
    truth = read_ground_truth(coco_val, kind == "segm", False)
    measured = measure(truth, read_detections(results, truth, (kind,)), kind)
    assert measured.stats() == expected[f"coco_val_jitter/{kind}"]  # all 12, to the last digit
    by_id = expected[f"coco_val_jitter/{kind}_per_category_AP"]
    names = {category.name: by_id[str(category.id)] for category in coco_val.categories}
    metrics = evaluate_detections(coco_val, results, (kind,))
    assert metrics["per_class"][kind] == names
    assert list(metrics[kind]) == list(METRICS)


def test_jittered_keypoints_score_what_pycocotools_says(references, expected, coco_dir, tmp_path):
    annotations = coco_dir / "annotations" / "person_keypoints_val2017.json"
    convert_coco(coco_dir / "val2017", annotations, tmp_path / "people")
    results = json.loads((references / "coco_val_jitter" / "keypoints_results.json").read_text())
    truth = read_ground_truth(ShardSet(tmp_path / "people"), False, True)
    measured = measure(truth, read_detections(results, truth, ("keypoints",)), "keypoints")
    assert measured.stats() == expected["coco_val_jitter/keypoints"]


def test_keypoints_of_an_image_full_of_people_score_what_pycocotools_says(
    references, expected, make_shards
):
    folder = references / "coco_keypoints_1img"
    source = json.loads((folder / "gt_dataset.json").read_text())
    person = Category(1, "person", keypoints=[str(n) for n in range(17)])
    annotations = [{**a, "label": 0} for a in source["annotations"]]
    results = json.loads((folder / "dt_dataset.json").read_text())
    results = results["annotations"] if isinstance(results, dict) else results
    for result in results:
        result["image_id"] = 7  # the only image of make_shards
    truth = read_ground_truth(make_shards([annotations], [person]), False, True)
    measured = measure(truth, read_detections(results, truth, ("keypoints",)), "keypoints")
    assert measured.stats() == expected["coco_keypoints_1img/keypoints"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_error_split_is_that_of_tidecv(references, coco_val, kind):
    # tidecv 1.0.1 on the same files, in percent. Its recalls are n / 100, COCO's are rounded
    # otherwise, which moves an AP by 0.01 where a recall is met exactly.
    names = ("classification", "localization", "both", "duplicate", "background", "missed")
    counts, gains, special = {
        "bbox": (
            (135, 204, 302, 83, 346, 260),
            (12.190, 9.259, 1.844, 0.725, 1.906, 10.549),
            (47.727, 14.835, 24.489),
        ),
        "segm": (
            (112, 290, 45, 70, 53, 290),
            (11.787, 15.164, 0.901, 0.881, 0.377, 11.066),
            (45.459, 12.041, 29.690),
        ),
    }[kind]
    results = json.loads((references / "coco_val_jitter" / f"{kind}_results.json").read_text())
    errors = evaluate_detections(coco_val, results, (kind,))["analysis"][kind]["errors"]
    assert errors["count"] == dict(zip(names, counts, strict=True))
    in_percent = {name: 100 * gain for name, gain in errors["dAP"].items()}
    assert in_percent == pytest.approx(dict(zip(names, gains, strict=True)), abs=0.02)
    assert [100 * number for number in errors["special"].values()] == pytest.approx(
        special, abs=0.02
    )


def test_ground_truth_as_detections_scores_one(coco_val):
    truth = coco_ground_truth(coco_val)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    encoder = COCO()
    encoder.imgs = {number: {"height": h, "width": w} for number, (h, w) in sizes.items()}
    results = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "score": 1.0,
            "segmentation": encoder.annToRLE(annotation),
        }
        for annotation in truth["annotations"]
        if not annotation["iscrowd"]
    ]
    assert len(results) == 1525  # 1541 annotations, 16 of them crowds
    metrics = evaluate_detections(coco_val, results, ("bbox", "segm"))
    assert metrics["bbox"] == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert metrics["segm"] == pytest.approx(dict.fromkeys(METRICS, 1.0))


@pytest.mark.parametrize("boxes", [False, True])
def test_benchmark_compares_with_pycocotools_on_made_detections(coco_val, boxes):
    arguments = argparse.Namespace(
        images=3, detections=40, seed=0, classes=None, rounds=1, peers="pycocotools", boxes=boxes
    )
    shards = SimpleNamespace(shards=str(coco_val.folder))
    data = SimpleNamespace(val=shards, cache=None)
    found = benchmark_evaluate.run(SimpleNamespace(data=data), arguments)  # asserts equal numbers
    assert (found["images"], found["detections"]) == (3, 120)
    assert list(found["numbers"]) == (["bbox"] if boxes else ["bbox", "segm"])
    assert all(0 < numbers["AP"] < 1 for numbers in found["numbers"].values())
    cpu_seconds = found["cpu_seconds"]
    assert found["cpu_ratio"] == {"pycocotools": cpu_seconds["pycocotools"] / cpu_seconds["bigdet"]}


def test_benchmark_refuses_peers_that_are_not_there():
    with pytest.raises(ValueError, match="--peers: found 'cocoapi', expected some of hotcoco, "):
        benchmark_evaluate.chosen_peers("pycocotools,cocoapi")
    arguments = argparse.Namespace(classes=365, peers="pycocotools")
    with pytest.raises(ValueError, match="--peers: with --classes only bigdet runs"):
        benchmark_evaluate.run(SimpleNamespace(), arguments)


def test_made_boxes_of_many_classes_have_the_numbers_of_pycocotools(tmp_path):
    arguments = argparse.Namespace(images=30, detections=40, seed=0, classes=365)
    benchmark_evaluate.make_boxes(tmp_path, arguments)
    truth = coco_ground_truth(ShardSet(tmp_path / "shards"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert (len(results), len(truth["categories"])) == (1200, 365)
    stats, _ = pycocotools_stats(truth, results, "bbox")
    assert benchmark_evaluate.score_boxes(tmp_path) == {
        name: stats[place] for name, place in METRICS.items()
    }
    assert 0.1 < stats[0] < 0.9
