"""Real COCO ground truth, through shards, against numbers that pycocotools gave without them."""

import json

import pytest
from pycocotools.coco import COCO

from bigdet.data.shards import ShardSet
from bigdet.data.sources.coco import convert_coco
from bigdet.evaluation.coco_metrics import METRICS
from bigdet.evaluation.scoring import evaluate_detections
from tools.benchmark_evaluate import coco_ground_truth


@pytest.fixture(scope="module")
def coco_val(coco_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "val"
    annotations = coco_dir / "annotations" / "instances_val2017.json"
    convert_coco(coco_dir / "val2017", annotations, folder)
    return ShardSet(folder)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_jittered_detections_score_what_pycocotools_says(coco_dir, coco_val, kind):
    references = coco_dir.parent / "eval_refs"
    if not references.is_dir():
        pytest.skip(f"no reference results in {references}")
    expected = json.loads((references / "expected.json").read_text())
    results = json.loads((references / "coco_val_jitter" / f"{kind}_results.json").read_text())
    metrics = evaluate_detections(coco_val, results, (kind,))
    for name, place in METRICS.items():
        assert metrics[kind][name] == pytest.approx(
            expected[f"coco_val_jitter/{kind}"][place], abs=1e-12
        ), name
    by_id = expected[f"coco_val_jitter/{kind}_per_category_AP"]
    names = {category.name: by_id[str(category.id)] for category in coco_val.categories}
    assert metrics["per_class"][kind] == pytest.approx(names, abs=1e-12)


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
