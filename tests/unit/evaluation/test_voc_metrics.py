import json

import numpy as np
import pytest

from bigdet.data.format.shard_set import Category
from bigdet.evaluation.detections import read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections, metrics_table
from bigdet.evaluation.voc_metrics import measure_voc

OBJECT = [Category(1, "object")]


def truth(box, label=0, iscrowd=0):
    return {"id": 1, "label": label, "bbox": box, "area": box[2] * box[3], "iscrowd": iscrowd}


def found(box, score, image_id=7, category_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def voc_ap(shards, results, metric, threshold=0.5):
    known = read_ground_truth(shards, False, False)
    table = read_detections(results, known, ("bbox",))
    return measure_voc(known, table, metric, np.array([threshold]))


def test_published_example(coco_dir, make_shards):
    # 7 images, 15 objects, 24 detections at IoU 0.3, of rafaelpadilla/Object-Detection-Metrics. Its
    # boxes are inclusive pixels: one more in width and height with continuous edges.
    folder = coco_dir.parent / "eval_refs" / "voc_ap_toy"
    if not folder.is_dir():
        pytest.skip(f"no reference results in {folder}")
    expected = json.loads((folder.parent / "expected.json").read_text())["voc_ap_toy"]
    images, results = [], []
    for number, file in enumerate(sorted((folder / "groundtruths").iterdir())):
        lines = [line.split()[1:] for line in file.read_text().splitlines()]
        boxes = [[int(x), int(y), int(w) + 1, int(h) + 1] for x, y, w, h in lines]
        images.append([truth(box) for box in boxes])
        for line in (folder / "detections" / file.name).read_text().splitlines():
            score, x, y, width, height = line.split()[1:]
            box = [int(x), int(y), int(width) + 1, int(height) + 1]
            results.append(found(box, float(score), 7 + number))
    assert (sum(map(len, images)), len(results)) == (15, 24)
    shards = make_shards(images, OBJECT)
    eleven, every = expected["computed(+1 pixel IoU)"]
    assert voc_ap(shards, results, "voc07", 0.3) == [[pytest.approx(eleven, abs=1e-15)]]
    assert voc_ap(shards, results, "voc12", 0.3) == [[pytest.approx(every, abs=1e-15)]]


def test_half_of_the_objects_after_a_false_positive(make_shards):
    # Right, wrong, right of 4 objects: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 2/4.
    boxes = [[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10], [60, 0, 10, 10]]
    shards = make_shards([[truth(box) for box in boxes]], OBJECT)
    results = [found(boxes[0], 0.9), found([0, 50, 10, 10], 0.8), found(boxes[1], 0.7)]
    assert voc_ap(shards, results, "voc12") == [[pytest.approx(0.25 * 1 + 0.25 * 2 / 3)]]
    # At recalls 0, 0.1, 0.2: 1; at 0.3, 0.4, 0.5: 2/3; beyond: 0.
    assert voc_ap(shards, results, "voc07") == [[pytest.approx((3 * 1 + 3 * 2 / 3) / 11)]]


def test_second_detection_of_an_object_is_wrong_even_if_another_object_is_near(make_shards):
    # The second overlaps the first object most, which is taken: VOC does not look any further.
    boxes = [[0, 0, 20, 10], [2, 0, 20, 10]]
    shards = make_shards([[truth(box) for box in boxes]], OBJECT)
    results = [found([0, 0, 20, 10], 0.9), found([0, 0, 20, 10], 0.8)]
    assert voc_ap(shards, results, "voc12") == [[pytest.approx(0.5)]]


def test_difficult_objects_count_neither_as_found_nor_as_missed(make_shards):
    shards = make_shards([[truth([0, 0, 20, 10]), truth([50, 0, 20, 10], iscrowd=1)]], OBJECT)
    on_difficult = [found([50, 0, 20, 10], 0.9), found([50, 1, 20, 10], 0.8)]
    right = [found([0, 0, 20, 10], 0.5)]
    assert voc_ap(shards, on_difficult + right, "voc12") == [[1.0]]
    # Inside of the difficult object, but with an IoU of 0.25 only: unlike a crowd's, it is wrong.
    inside = [found([50, 0, 5, 10], 0.9)]
    assert voc_ap(shards, inside + right, "voc12") == [[pytest.approx(0.5)]]


def test_evaluation_reports_the_means_over_classes(make_shards):
    # cat: IoU 0.8 reaches 7 of 10 thresholds; car: never found; dog: no objects.
    categories = [Category(1, "cat"), Category(2, "car"), Category(3, "dog")]
    shards = make_shards([[truth([0, 0, 10, 10]), truth([50, 0, 20, 10], 1)]], categories)
    metrics = evaluate_detections(shards, [found([0, 0, 10, 8], 0.9)], ("bbox",), "voc12")
    assert metrics["bbox"] == pytest.approx({"AP": 0.35, "AP50": 0.5, "AP75": 0.5})
    assert metrics["per_class"] == {"bbox": {"cat": 1.0, "car": 0.0, "dog": None}}
    assert metrics["metric"] == "voc12"
    analysis = metrics["analysis"]["bbox"]
    assert analysis["by_iou"] == {f"{0.5 + 0.05 * n:.2f}": 0.5 if n < 7 else 0.0 for n in range(10)}
    of_class = {
        name: (one["AP"], one["AP50"], one["AP75"], one["objects"])
        for name, one in analysis["per_class"].items()
    }
    assert of_class == {
        "cat": (pytest.approx(0.7), 1.0, 1.0, 1),
        "car": (0.0, 0.0, 0.0, 1),
        "dog": (None, None, None, 0),
    }
    assert analysis["errors"]["count"]["missed"] == 1  # the car
    lines = metrics_table(metrics, per_class=True).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75"]
    assert lines[3].split() == ["box", "AP50"]
    nothing = evaluate_detections(shards, [], ("bbox",), "voc07")
    assert nothing["bbox"] == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
