"""Random scenes: our numbers are pycocotools' own to the last bit."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bigdet.benchmarks.evaluate import coco_ground_truth
from bigdet.data.format.shard_set import Category
from bigdet.evaluation.analysis import analyze
from bigdet.evaluation.coco_metrics import measure
from bigdet.evaluation.detections import read_detections
from bigdet.evaluation.error_types import find_cover
from bigdet.evaluation.ground_truth import read_ground_truth
from tests.unit.evaluation.reference_scores import pycocotools_stats, truth_of

POINTS = [f"point {n}" for n in range(17)]
CATEGORIES = [Category(17, "person", keypoints=POINTS), Category(3, "car"), Category(8, "cat")]


def random_box(random):
    size = random.choice([6, 20, 70], p=[0.3, 0.4, 0.3]) * random.uniform(0.7, 1.3, 2)
    corner = random.uniform(0, 100 - np.minimum(size, 99))
    return [*corner.round(1).tolist(), *np.minimum(size, 99 - corner).round(1).tolist()]


def found_box(random, source):
    """The box of an annotation, or of nothing that is there; mostly moved a little."""
    box = random_box(random) if source is None else list(source["bbox"])
    if random.random() < 0.8:
        moved = np.array(box) + random.normal(0, 0.1, 4) * max(box[2:])
        box = [*moved[:2].clip(0, 90).tolist(), *moved[2:].clip(1, 99).tolist()]
    return box


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
            box = found_box(random, source)
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


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_overlaps_that_the_analysis_computes_give_the_same_numbers(make_shards, kind):
    images, results = random_scene(1)
    truth = read_ground_truth(make_shards(images, CATEGORIES), True, True)
    for some in (results, [r for r in results if r["image_id"] != 10]):  # it has 150 detections
        found = read_detections(some, truth, ("bbox", "segm", "keypoints"))
        assert (find_cover(truth, found, kind).same_class is None) == (some is results)
        measured, expected = analyze(truth, found, kind)[0], measure(truth, found, kind)
        assert (measured.precision == expected.precision).all()
        assert (measured.recall == expected.recall).all()


def test_numbers_without_detections_are_zero(make_shards):
    images, _ = random_scene(0)
    truth = read_ground_truth(make_shards(images, CATEGORIES), False, False)
    stats = measure(truth, read_detections([], truth, ("bbox",)), "bbox").stats()
    assert [number for number in stats if number is not None] == [0.0] * 10  # none is large


def polygons(box):
    """Two parts: the left half of a box, and a triangle in the right one."""
    x, y, width, height = box
    left = [x, y, x + width / 2, y, x + width / 2, y + height, x, y + height]
    return [left, [x + width * 0.6, y, x + width, y, x + width, y + height]]


def other_form(result, form):
    """A result as other programs write it; the form in words."""
    box = np.minimum(result["bbox"], [90, 90, 99, 99]).tolist()
    changed = {key: result[key] for key in ("image_id", "category_id", "score", "bbox")}
    if form == "polygons":
        return changed | {"segmentation": polygons(box)}
    if form == "floats":
        changed |= {"image_id": float(result["image_id"]), "category_id": result["category_id"] / 1}
        mask = result["segmentation"]
        return changed | {"segmentation": mask | {"size": [100.0, 100.0]}}
    bitmap = coco_mask.decode(result["segmentation"]).reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bitmap])))  # where 0 and 1 take turns
    counts = np.diff(np.concatenate([[0], edges, [bitmap.size]])).tolist()
    return changed | {"segmentation": {"size": [100, 100], "counts": counts}}


@pytest.mark.parametrize("form", ["polygons", "run lengths", "floats"])
def test_masks_of_other_programs_have_the_ap_of_pycocotools(make_shards, form):
    """All but the area ranges: pycocotools takes the box's area for the mask's."""
    images, results = random_scene(5)
    shards = make_shards(images, CATEGORIES)
    truth = read_ground_truth(shards, True, False)
    results = [other_form(result, form) for result in results]
    measured = measure(truth, read_detections(results, truth, ("bbox", "segm")), "segm")
    stats = pycocotools_of_file(coco_ground_truth(shards), results, "segm")
    assert measured.stats()[:3] == stats[:3]
    assert measured.stats()[6:9] == stats[6:9]
    assert 0 < stats[0] < 1


SCORED = ("image_id", "category_id", "score")
AREAS = [  # what the results have, and what the first one lacks of it
    (("bbox", "segmentation"), ""),
    (("bbox", "segmentation"), "segmentation"),
    (("bbox", "segmentation"), "bbox"),
    (("segmentation",), ""),
]


@pytest.mark.parametrize(("keys", "lacks"), AREAS)
def test_areas_of_a_file_are_those_of_pycocotools(make_shards, keys, lacks):
    images, results = random_scene(6)
    shards = make_shards(images, CATEGORIES)
    truth = read_ground_truth(shards, True, False)
    results = [{key: result[key] for key in (*SCORED, *keys)} for result in results]
    results[0].pop(lacks, None)
    found = read_detections(results, truth, ("bbox", "segm"), one_area=True)
    for kind in ("bbox", "segm"):
        stats = pycocotools_of_file(coco_ground_truth(shards), results, kind)
        assert measure(truth, found, kind).stats() == stats
        assert 0 < stats[0] < 1


@pytest.mark.parametrize("keys", [("keypoints",), ("bbox", "keypoints")])
def test_areas_of_a_file_of_keypoints_are_those_of_pycocotools(make_shards, keys):
    images, results = random_scene(3)
    shards = make_shards(images, CATEGORIES)
    truth = read_ground_truth(shards, False, True)
    results = [r for r in results if r["category_id"] == 17]
    results = [{key: result[key] for key in (*SCORED, *keys)} for result in results]
    kinds = ("bbox", "keypoints") if "bbox" in keys else ("keypoints",)
    found = read_detections(results, truth, kinds, one_area=True)
    reference = coco_ground_truth(shards)
    reference["categories"] = reference["categories"][:1]
    reference["annotations"] = [a for a in reference["annotations"] if a["category_id"] == 17]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluated(reference, results, "keypoints", (20,))
        evaluation.summarize()
    stats = [None if number < 0 else number for number in evaluation.stats.tolist()]
    assert measure(truth, found, "keypoints").stats() == stats


@pytest.mark.parametrize("limit", [10, 37, 300])
def test_numbers_of_another_limit_are_those_of_pycocotools_maxdets(make_shards, limit):
    """One image has 150 detections of a class; stats[0] of pycocotools knows 100 alone."""
    images, results = random_scene(2)
    shards = make_shards(images, CATEGORIES)
    truth = read_ground_truth(shards, True, False)
    found = read_detections(results, truth, ("bbox", "segm"))
    for kind in ("bbox", "segm"):
        measured = measure(truth, found, kind, limit)
        keys = ("image_id", "category_id", "score", "segmentation" if kind == "segm" else "bbox")
        cut = [{key: result[key] for key in keys} for result in results]
        evaluation = evaluated(coco_ground_truth(shards), cut, kind, (1, 10, limit))
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        assert (measured.precision == precision[..., -1]).all()
        assert (measured.recall == recall).all()
    if limit != 300:
        other = measure(truth, found, "segm")  # 100
        assert (measured.precision != other.precision).any()


def evaluated(reference, results, kind, limits):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = [truth_of(annotation, kind) for annotation in reference["annotations"]]
        truth.dataset = reference | {"annotations": annotations}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def pycocotools_of_file(reference, results, kind):
    """Give ``COCOeval.stats`` of results as they are in a file; None for its -1."""
    evaluation = evaluated(reference, results, kind, (1, 10, 100))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return [None if number < 0 else float(number) for number in evaluation.stats]
