"""Random scenes: our numbers are pycocotools' own to the last bit."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from bigdet.benchmarks.evaluate import coco_ground_truth, pycocotools_stats
from bigdet.data.shards import Category
from bigdet.evaluation.coco_metrics import measure
from bigdet.evaluation.detections import read_detections
from bigdet.evaluation.ground_truth import read_ground_truth

POINTS = [f"point {n}" for n in range(17)]
CATEGORIES = [Category(17, "person", keypoints=POINTS), Category(3, "car"), Category(8, "cat")]


def random_box(random):
    size = random.choice([6, 20, 70], p=[0.3, 0.4, 0.3]) * random.uniform(0.7, 1.3, 2)
    corner = random.uniform(0, 100 - np.minimum(size, 99))
    return [*corner.round(1).tolist(), *np.minimum(size, 99 - corner).round(1).tolist()]


def run_lengths(box):
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x + width / 3, y + height]
    rle = coco_mask.merge(coco_mask.frPyObjects([corners], 100, 100))
    return {"size": [100, 100], "counts": rle["counts"].decode()}


def random_points(random, box):
    x, y, width, height = box
    places = random.uniform([x, y], [x + width, y + height], (17, 2)).round(1)
    seen = random.choice([0, 1, 2], 17, p=[0.5, 0.2, 0.3]) * (random.random() > 0.2)
    return np.concatenate([places * (seen > 0)[:, None], seen[:, None]], axis=1).ravel().tolist()


def random_scene(seed, num_images=12):
    """Returns annotations of images, and results with ties, duplicates and wrong classes."""
    random = np.random.default_rng(seed)
    images, results = [], []
    for image in range(num_images):
        annotations = []
        for number in range(random.integers(0, 7)):
            box, label = random_box(random), int(random.integers(3))
            annotation = {"id": number, "label": label, "bbox": box, "area": box[2] * box[3] * 0.8}
            annotation["iscrowd"] = int(random.random() < 0.15)
            if random.random() < 0.9:
                annotation["segmentation"] = run_lengths(box)
            if label == 0 and random.random() < 0.9:
                annotation["keypoints"] = random_points(random, box)
            annotations.append(annotation)
        images.append(annotations)
        count = 150 if image == 3 else int(random.integers(0, 25))  # 150: more than count
        for _ in range(count):
            near = annotations and random.random() < 0.7
            source = annotations[random.integers(len(annotations))] if near else None
            box = random_box(random) if source is None else list(source["bbox"])
            if random.random() < 0.8:
                moved = np.array(box) + random.normal(0, 0.1, 4) * max(box[2:])
                box = [*moved[:2].clip(0, 90).tolist(), *moved[2:].clip(1, 99).tolist()]
            label = source["label"] if near and random.random() < 0.8 else int(random.integers(3))
            if image == 3:
                label = 1
            points = np.array(random_points(random, box)).reshape(17, 3)
            if near and "keypoints" in source:
                points[:, :2] = np.array(source["keypoints"]).reshape(17, 3)[:, :2]
                points += random.normal(0, max(box[2:]) * 0.05, (17, 3))
            results.append(
                {
                    "image_id": 7 + image,
                    "category_id": CATEGORIES[label].id,
                    "score": round(random.random(), 1),  # many are equal
                    "bbox": box,
                    "segmentation": run_lengths(np.minimum(box, [90, 90, 99, 99]).tolist()),
                    "keypoints": points.ravel().tolist(),
                }
            )
    random.shuffle(results)
    return images, results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_numbers_are_those_of_pycocotools(make_shards, kind, seed):
    images, results = random_scene(seed)
    shards = make_shards(images, CATEGORIES)
    truth = read_ground_truth(shards, True, True)
    measured = measure(truth, read_detections(results, truth, ("bbox", "segm", "keypoints")), kind)

    reference = coco_ground_truth(shards)
    if kind == "keypoints":  # its files list no other categories
        reference["categories"] = reference["categories"][:1]
        reference["annotations"] = [a for a in reference["annotations"] if a["category_id"] == 17]
        results = [result for result in results if result["category_id"] == 17]
    stats, class_aps = pycocotools_stats(reference, results, kind)
    assert measured.stats() == stats
    assert sum(number is not None and 0 < number < 1 for number in stats) > 4
    by_id = {truth.categories[k].id: ap for k, ap in measured.class_aps().items()}
    assert by_id == class_aps


def test_numbers_without_detections_are_zero(make_shards):
    images, _ = random_scene(0)
    truth = read_ground_truth(make_shards(images, CATEGORIES), False, False)
    stats = measure(truth, read_detections([], truth, ("bbox",)), "bbox").stats()
    assert [number for number in stats if number is not None] == [0.0] * 10  # none is large
