"""Federated sets: our numbers are those of the ``lvis`` package.

Its last version, 0.5.3, needs a numpy before 1.24 and OpenCV, so it cannot run here: ``EXPECTED``
was computed once with it (with ``numpy.float`` put back) on ``random_scene`` as ``lvis_form`` has
it, ``LVISEval(truth, results, kind).run()``. It knows masks and boxes in one results file only with
the areas of the boxes, so the results for masks were given without boxes.
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from bigdet.data.format.shard_set import Category, ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.evaluation.coco_metrics import evaluation_kinds
from bigdet.evaluation.scoring import evaluate_detections
from tests.unit.evaluation.test_against_pycocotools import found_box, random_box, run_lengths

CATEGORIES = [
    Category(number, f"class {number}", frequency=frequency)
    for number, frequency in ((31, "f"), (4, "r"), (15, "c"), (9, "f"), (2, "c"), (6, "r"))
]
LABELS = range(len(CATEGORIES))
SIZES = {"height": 100, "width": 100}
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR300", "APr", "APc", "APf"]
EXPECTED = {
    ("bbox", 0): [
        0.1982712975681325,
        0.3784867371903077,
        0.14359112740567812,
        0.2601131691240949,
        0.2903567955696668,
        None,
        0.6537380952380952,
        0.08178687888938091,
        0.1792509145856577,
        0.2755338898899831,
    ],
    ("segm", 0): [
        0.18655437535608838,
        0.3784867371903077,
        0.15164423887373418,
        0.2609120180192106,
        0.28127569350341625,
        None,
        0.619,
        0.07497566651666951,
        0.1729729799530092,
        0.255925125178877,
    ],
    ("bbox", 1): [
        0.15144467218073335,
        0.2563617309134675,
        0.16728217375010312,
        0.07757441300803466,
        0.24987699783491862,
        None,
        0.47417094017094014,
        0.3979372937293729,
        0.12230407368157373,
        0.05733895990557319,
    ],
    ("segm", 1): [
        0.1506886508251607,
        0.2563617309134675,
        0.14712534493548937,
        0.08377114654446476,
        0.2339646684263021,
        None,
        0.4781282051282051,
        0.37731023102310224,
        0.12711399394428805,
        0.06095251760706254,
    ],
    ("bbox", 2): [
        0.21141811413926642,
        0.3847566474079936,
        0.18716062884435014,
        0.2184907520010131,
        0.2138446916120183,
        None,
        0.6106984126984126,
        0.10266349470550344,
        0.2185962899433748,
        0.2586172480520395,
    ],
    ("segm", 2): [
        0.22716573845220941,
        0.3819968742769802,
        0.18853691126897268,
        0.2185538898948279,
        0.25267868929750115,
        None,
        0.6275555555555556,
        0.09374431121829262,
        0.2516635771379796,
        0.2693786133833976,
    ],
}


def random_scene(seed, num_images=12):
    """Returns annotations of images, their lists of labels, and results with many equal scores."""
    random = np.random.default_rng(seed)
    images, lists, results = [], [], []
    for image in range(num_images):
        annotations = []
        for number in range(random.integers(0, 8)):
            box, label = random_box(random), int(random.integers(len(LABELS) - 1))
            annotations.append(
                {
                    "id": 1 + 10 * image + number,
                    "label": label,
                    "bbox": box,
                    "iscrowd": 0,
                    "area": box[2] * box[3] * 0.8,
                    "segmentation": run_lengths(box),
                }
            )
        present = {annotation["label"] for annotation in annotations}
        absent = [label for label in LABELS if label not in present and random.random() < 0.4]
        partial = [label for label in sorted(present) if random.random() < 0.3]
        lists.append({"negative_labels": absent, "not_exhaustive_labels": partial})
        images.append(annotations)
        for _ in range(400 if image == 3 else int(random.integers(0, 40))):  # 400: more than count
            near = annotations and random.random() < 0.7
            source = annotations[random.integers(len(annotations))] if near else None
            box = found_box(random, source)
            same = near and random.random() < 0.8
            label = source["label"] if same else int(random.integers(len(LABELS)))
            found = {"image_id": 7 + image, "category_id": CATEGORIES[label].id, "bbox": box}
            found["score"] = round(random.random(), 2)
            found["segmentation"] = run_lengths(np.minimum(box, [90, 90, 99, 99]).tolist())
            results.append(found)
    random.shuffle(results)
    return images, lists, results


def lvis_form(images, lists):
    """Returns the same as a file of LVIS."""
    ids = [category.id for category in CATEGORIES]
    names = ("neg_category_ids", "not_exhaustive_category_ids")
    return {
        "images": [
            {"id": 7 + number, **SIZES, "coco_url": f"http://host/val2017/{number}.jpg"}
            | {name: [ids[k] for k in own] for name, own in zip(names, two.values(), strict=True)}
            for number, two in enumerate(lists)
        ],
        "annotations": [
            {**annotation, "image_id": 7 + number, "category_id": ids[annotation["label"]]}
            for number, annotations in enumerate(images)
            for annotation in annotations
        ],
        "categories": [dataclasses.asdict(category) for category in CATEGORIES],
    }


@pytest.fixture
def convert(tmp_path):
    """Returns a function (LVIS's form) -> ShardSet of gray images."""

    def convert_form(content):
        (tmp_path / "images/val2017").mkdir(parents=True)
        for number in range(len(content["images"])):
            Image.new("RGB", (100, 100)).save(tmp_path / f"images/val2017/{number}.jpg")
        (tmp_path / "lvis.json").write_text(json.dumps(content))
        convert_coco(tmp_path / "images", tmp_path / "lvis.json", tmp_path / "shards")
        return ShardSet(tmp_path / "shards")

    return convert_form


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_lvis(convert, seed):
    images, lists, results = random_scene(seed)
    shards = convert(lvis_form(images, lists))
    assert shards.manifest.federated
    metrics = evaluate_detections(shards, results, ("bbox", "segm"))
    assert metrics["rule"] == "lvis"
    for kind in ("bbox", "segm"):
        expected = EXPECTED[kind, seed]
        assert list(metrics[kind]) == NAMES
        assert list(metrics[kind].values()) == pytest.approx(expected, abs=1e-12)


def test_only_what_was_looked_for_counts(convert):
    """The class is on image 0, known to be absent on 1, not looked for on 2, partly found on 3."""
    box = [10, 10, 40, 40]
    truth = {"id": 1, "label": 0, "bbox": box, "area": 1600, "iscrowd": 0}
    nothing = {"negative_labels": [], "not_exhaustive_labels": []}
    lists = [nothing, nothing | {"negative_labels": [0]}, nothing]
    lists.append(nothing | {"not_exhaustive_labels": [0]})
    shards = convert(lvis_form([[truth], [], [], [truth | {"id": 2}]], lists))

    def ap(*found):
        found = [{"category_id": 31, "score": 0.9} | one for one in found]
        metrics = evaluate_detections(shards, found, ("bbox",))
        return metrics["bbox"]["AP"], metrics["analysis"]["bbox"]["errors"]["special"]["AP50"]

    right = [{"image_id": 7, "bbox": box, "score": 0.5}, {"image_id": 10, "bbox": box}]
    assert ap(*right) == (1.0, 1.0)
    elsewhere = {"image_id": 9, "bbox": box}
    another = {"image_id": 10, "bbox": [60, 60, 30, 30], "score": 0.95}
    assert ap(*right, elsewhere, another) == (1.0, 1.0)
    # One wrong before the second right one: precision 1 to recall 0.5, 2 / 3 beyond it.
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert ap(*right, {"image_id": 8, "bbox": box, "score": 0.8}) == pytest.approx((expected,) * 2)


def test_other_rules_are_refused_for_a_federated_set(convert):
    shards = convert(lvis_form([[]], [{"negative_labels": [0], "not_exhaustive_labels": []}]))
    with pytest.raises(ValueError, match=r"evaluation\.metric: found voc12.* as in LVIS"):
        evaluation_kinds(shards, with_masks=True, with_keypoints=False, metric="voc12")
