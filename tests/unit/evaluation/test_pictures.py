"""Which images are drawn, and that all is drawn where it belongs."""

import json

import numpy as np
import pytest

from bigdet.evaluation.detections import read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.telling_images import (
    Verdict,
    draw_results,
    draw_truth,
    judge_images,
    pick,
    read_pixels,
    write_pictures,
)
from bigdet.run_dir import RunDir
from tests.unit.evaluation.cats_and_dogs import CAT, CATEGORIES, DOG, found, truth

IMAGES = [
    [truth(CAT), truth(DOG, 1)],  # 7: the cat right, the dog with too low a score
    [truth(CAT)],  # 8: the cat taken for a dog
    [truth(CAT, iscrowd=1)],  # 9: a detection in a crowd is not wrong
    [],  # 10: one detection on nothing
    [],  # 11: nothing there, nothing found
    [truth(DOG, 1)],  # 12: right, and a duplicate
]
RESULTS = [
    found(1, CAT, 0.9),
    found(2, DOG, 0.49),
    found(2, CAT, 0.8, 8),
    found(1, CAT, 0.9, 9),
    found(1, CAT, 0.6, 10),
    found(2, DOG, 0.9, 12),
    found(2, DOG, 0.7, 12),
]


def test_verdicts_count_what_a_picture_shows(make_shards):
    scene = read_ground_truth(make_shards(IMAGES, CATEGORIES), False, False)
    verdicts = judge_images(scene, read_detections(RESULTS, scene, ["bbox"]))
    assert verdicts == [
        Verdict(7, num_right=1, num_missed=1, num_wrong=0),
        Verdict(8, num_right=0, num_missed=1, num_wrong=1),
        Verdict(10, num_right=0, num_missed=0, num_wrong=1),
        Verdict(12, num_right=1, num_missed=0, num_wrong=1),
    ]
    assert verdicts[0].f1 == pytest.approx(2 / 3)  # precision 1, recall 1/2


def test_the_worst_have_most_mistakes_and_the_best_most_objects():
    verdicts = [
        Verdict(1, 1, 0, 0),
        Verdict(2, 0, 1, 0),
        Verdict(3, 5, 0, 0),
        Verdict(4, 0, 2, 2),
        Verdict(5, 1, 1, 0),
    ]
    assert [(among, each.image_id) for among, each in pick(verdicts, 5)] == [
        ("worst", 4),
        ("worst", 2),
        ("worst", 5),
        ("best", 3),
        ("best", 1),
    ]
    assert [each.image_id for _, each in pick(verdicts, 1)] == [4]
    assert pick([], 8) == []


def test_pictures_are_written_and_listed(make_shards, tmp_path):
    shards, run_dir = make_shards(IMAGES, CATEGORIES), RunDir(tmp_path / "run")
    for _ in range(2):  # a second time after a stop: no other pictures stay
        write_pictures(shards, RESULTS, ("bbox",), 2, run_dir, "train")
    listed = json.loads(run_dir.picture_list("train").read_text())
    assert [(entry["among"], entry["image_id"]) for entry in listed] == [("worst", 8), ("best", 7)]
    written = {path.name for path in run_dir.pictures.glob("*.jpg")}
    assert written == {entry["found"] for entry in listed}
    assert all((run_dir.pictures / entry["truth"]).is_file() for entry in listed)


def test_masks_and_boxes_lie_on_their_objects(make_shards):
    square = truth(DOG, 1) | {"segmentation": [[50, 50, 70, 50, 70, 70, 50, 70]]}
    shards = make_shards([[square]], CATEGORIES)
    pixels, scene = read_pixels(shards, 0), read_ground_truth(shards, True, False)
    mask = {"size": [100, 100], "counts": scene.masks[0].decode()}
    result = found(2, DOG, 0.9) | {"segmentation": mask}
    for picture in (draw_truth(pixels, scene, 7), draw_results(pixels, [result], shards)):
        colored = np.ptp(np.asarray(picture).astype(int), axis=2) > 20  # what is not gray
        assert colored[410:550, 410:550].all()  # the image is enlarged 8 times
        colored[340:580, 390:700] = False  # object and label
        assert not colored.any()
