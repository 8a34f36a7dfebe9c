import numpy as np
import pytest
from pycocotools import mask as coco_mask

from bigdet.data.format.manifest import Category
from bigdet.evaluation.coco_metrics import METRICS, evaluation_kinds
from bigdet.evaluation.scoring import evaluate_detections, metrics_table


def truth(label, box, number=1, **more):
    x, y, width, height = box
    corners = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    annotation = {"id": number, "label": label, "bbox": box, "area": width * height, "iscrowd": 0}
    return annotation | {"segmentation": corners} | more


def run_lengths(left, top, width, height):
    bitmap = np.zeros((100, 100), dtype=np.uint8, order="F")
    bitmap[top : top + height, left : left + width] = 1
    encoded = coco_mask.encode(bitmap)
    return {"size": [100, 100], "counts": encoded["counts"].decode()}


def found(category_id, box, score, image_id=7, mask=None):
    mask = run_lengths(*map(round, mask or box))
    result = {"image_id": image_id, "category_id": category_id, "bbox": box}
    return result | {"score": score, "segmentation": mask}


def test_perfect_detection_scores_one_and_what_has_no_objects_is_none(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40])], []])  # 1600 pixels: medium
    metrics = evaluate_detections(shards, [found(17, [10, 10, 40, 40], 0.9)], ("bbox", "segm"))
    expected = dict.fromkeys(METRICS, 1.0) | {"APs": None, "APl": None}
    assert metrics["bbox"] == pytest.approx(expected)
    assert metrics["segm"] == pytest.approx(expected)
    assert metrics["per_class"]["bbox"] == pytest.approx({"cat": 1.0, "car": None})


def test_overlap_of_062_counts_at_three_of_ten_thresholds(make_shards):
    # 24.8 of 40 pixels of height, the width equal: IoU 0.62 reaches 0.5, 0.55 and 0.6
    shards = make_shards([[truth(1, [10, 10, 40, 40])]])
    metrics = evaluate_detections(shards, [found(3, [10, 10, 40, 24.8], 0.9)], ("bbox",))
    assert metrics["bbox"]["AP"] == pytest.approx(0.3)
    assert metrics["bbox"]["AR100"] == pytest.approx(0.3)
    assert (metrics["bbox"]["AP50"], metrics["bbox"]["AP75"]) == (pytest.approx(1.0), 0.0)
    assert "segm" not in metrics
    assert list(metrics["per_class"]) == ["bbox"]


def test_no_detections_at_all_score_zero(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40])]])
    metrics = evaluate_detections(shards, [], ("bbox", "segm"))
    assert metrics["segm"] == dict.fromkeys(METRICS, 0.0) | {"APs": None, "APl": None}


def test_without_any_object_nothing_is_defined(make_shards):
    shards = make_shards([[], []])
    metrics = evaluate_detections(shards, [found(17, [1, 1, 9, 9], 0.5)], ("bbox",))
    assert metrics["bbox"] == dict.fromkeys(METRICS)
    assert metrics["per_class"]["bbox"] == {"cat": None, "car": None}


def test_label_order_of_the_manifest_not_the_order_of_ids_names_the_classes(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40]), truth(1, [50, 50, 30, 30], 2)]])
    metrics = evaluate_detections(shards, [found(3, [50, 50, 30, 30], 0.9)], ("bbox",))
    assert metrics["per_class"]["bbox"] == pytest.approx({"cat": 0.0, "car": 1.0})


def test_better_scored_false_positive_halves_ap(make_shards):
    # The object comes second, so precision is 1/2 at every recall.
    results = [found(17, [60, 60, 20, 20], 0.9), found(17, [10, 10, 40, 40], 0.8)]
    shards = make_shards([[truth(0, [10, 10, 40, 40])]])
    metrics = evaluate_detections(shards, results, ("bbox", "segm"))
    assert metrics["bbox"]["AP"] == pytest.approx(0.5)
    assert metrics["segm"]["AP"] == pytest.approx(0.5)


def test_detection_inside_a_crowd_is_not_a_false_positive(make_shards):
    counts = [60 * 100 + 55, 45] + [55, 45] * 39  # columns 60 to 99, rows 55 to 99, uncompressed
    runs = {"size": [100, 100], "counts": counts}
    crowd = truth(0, [60, 55, 40, 45], 2, segmentation=runs, iscrowd=1)
    results = [found(17, [60, 60, 20, 20], 0.9), found(17, [10, 10, 40, 40], 0.8)]
    shards = make_shards([[truth(0, [10, 10, 40, 40]), crowd]])
    metrics = evaluate_detections(shards, results, ("bbox", "segm"))
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)
    assert metrics["segm"]["AP"] == pytest.approx(1.0)


def test_size_of_a_detected_mask_is_its_area_and_not_its_box(make_shards):
    # A false positive of 10x10 mask pixels in a 40x40 box: small by its mask, so it halves APs.
    shards = make_shards([[truth(0, [10, 10, 20, 20])]])
    wrong = found(17, [50, 50, 40, 40], 0.9, mask=[50, 50, 10, 10])
    metrics = evaluate_detections(shards, [wrong, found(17, [10, 10, 20, 20], 0.8)], ("segm",))
    assert metrics["segm"]["APs"] == pytest.approx(0.5)


def test_area_of_the_record_decides_the_size_of_an_object(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40], area=500)]])  # thin: small in a medium box
    metrics = evaluate_detections(shards, [found(17, [10, 10, 40, 40], 0.8)], ("bbox",))
    assert metrics["bbox"]["APs"] == pytest.approx(1.0)
    assert metrics["bbox"]["APm"] is None


def test_annotation_id_zero_can_be_matched(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40], number=0)]])
    metrics = evaluate_detections(shards, [found(17, [10, 10, 40, 40], 0.8)], ("bbox",))
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)


def test_object_without_a_mask_is_ignored_in_mask_ap(make_shards):
    boxed = truth(0, [60, 60, 20, 20], 2)
    del boxed["segmentation"]
    shards = make_shards([[truth(0, [10, 10, 40, 40]), boxed]])
    results = [found(17, [60, 60, 20, 20], 0.9), found(17, [10, 10, 40, 40], 0.8)]
    metrics = evaluate_detections(shards, results, ("segm",))
    assert metrics["segm"]["AP"] == pytest.approx(1.0)
    assert metrics["segm"]["AR100"] == pytest.approx(1.0)


def test_masks_are_measured_where_both_model_and_data_have_them(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40])]])
    assert evaluation_kinds(shards, True, True) == ("bbox", "segm")
    assert evaluation_kinds(shards, False, False) == ("bbox",)


def test_masks_are_not_measured_on_data_of_boxes(make_shards):
    boxed = truth(0, [10, 10, 40, 40])
    del boxed["segmentation"]
    assert evaluation_kinds(make_shards([[boxed]]), True, True) == ("bbox",)


def test_pycocotools_prints_nothing(make_shards, capsys):
    evaluate_detections(make_shards([[truth(0, [1, 1, 9, 9])]]), [], ("bbox", "segm"))
    assert capsys.readouterr().out == ""


def test_table_has_a_line_per_kind_and_a_dash_for_what_is_undefined(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40])]])
    metrics = evaluate_detections(shards, [found(17, [10, 10, 40, 40], 0.9)], ("bbox", "segm"))
    lines = metrics_table(metrics, per_class=True).splitlines()
    assert lines[0].split() == list(METRICS)
    assert lines[1].split() == ["box", "1.000", "1.000", "1.000", "-", "1.000", "-", "1.000"]
    assert lines[2].split()[0] == "mask"
    assert [line.split() for line in lines[-2:]] == [["cat", "1.000", "1.000"], ["car", "-", "-"]]


def pose(x, y, step=1.0, visibility=2):
    """17 keypoints in a row."""
    return [number for place in range(17) for number in (x + step * place, y, visibility)]


def test_keypoints_are_measured_where_both_model_and_data_have_them(make_shards):
    shards = make_shards([[truth(0, [10, 10, 40, 40], keypoints=pose(12, 30))]], PEOPLE)
    assert evaluation_kinds(shards, False, True) == ("bbox", "keypoints")
    assert evaluation_kinds(shards, False, False) == ("bbox",)


PEOPLE = [Category(17, "cat", keypoints=[f"point {i}" for i in range(17)]), Category(3, "car")]


def test_keypoints_at_their_places_score_one_and_far_from_them_zero(make_shards):
    # 1600 square pixels: medium. The second cat has no labeled keypoint: whoever finds it is
    # neither right nor wrong. The car has none at all.
    annotations = [
        truth(0, [10, 10, 40, 40], keypoints=pose(12, 30)),
        truth(0, [60, 60, 30, 30], 2, keypoints=pose(0, 0, 0, 0)),
        truth(1, [50, 10, 30, 30], 3),
    ]
    shards = make_shards([annotations], PEOPLE)
    right = {**found(17, [10, 10, 40, 40], 0.9), "keypoints": pose(12, 30)}
    wrong = {**found(17, [10, 10, 40, 40], 0.9), "keypoints": pose(80, 90)}
    blank = {**found(17, [60, 60, 30, 30], 0.95), "keypoints": pose(62, 70)}
    metrics = evaluate_detections(shards, [right, blank], ("keypoints",))
    assert metrics["keypoints"] == pytest.approx(
        {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "APm": 1.0, "APl": None, "AR20": 1.0}
    )
    assert metrics["per_class"]["keypoints"] == {"cat": pytest.approx(1.0), "car": None}
    assert evaluate_detections(shards, [wrong], ("keypoints",))["keypoints"]["AP"] == 0.0
    assert metrics_table(metrics | {"bbox": metrics["keypoints"]}).splitlines()[2].split() == [
        "keypoint",
        "1.000",
        "1.000",
        "1.000",
        "1.000",
        "-",
        "1.000",
    ]


def test_other_numbers_of_keypoints_than_cocos_are_measured_too(make_shards):
    people = [Category(17, "cat", keypoints=["nose", "tail"])]
    points = [20.0, 20.0, 2, 40.0, 40.0, 2]
    shards = make_shards([[truth(0, [10, 10, 40, 40], keypoints=points)]], people)
    result = {**found(17, [10, 10, 40, 40], 0.9), "keypoints": points}
    metrics = evaluate_detections(shards, [result], ("keypoints",))
    assert metrics["keypoints"]["AP"] == pytest.approx(1.0)
    # Both points off by d with d^2 / (2 area (2 sigma)^2) = 0.5: OKS = exp(-0.5) = 0.607, which
    # reaches 3 of 10 thresholds: d^2 = 0.5 x 2 x 1600 x 0.01 = 16.
    moved = [24.0, 20.0, 2, 44.0, 40.0, 2]
    metrics = evaluate_detections(shards, [{**result, "keypoints": moved}], ("keypoints",))
    assert metrics["keypoints"]["AP"] == pytest.approx(0.3)


def test_segmentation_that_is_no_mask_of_its_image_is_an_error_that_names_the_sample(make_shards):
    broken = {"size": [100, 100], "counts": run_lengths(10, 10, 5, 5)["counts"][:-1]}
    shards = make_shards([[], [truth(0, [10, 10, 5, 5], segmentation=broken)]])
    with pytest.raises(ValueError, match=f"sample {shards.key(1)} has a segmentation that is no"):
        evaluate_detections(shards, [], ("segm",))


def test_classes_of_one_name_have_rows_of_their_own(make_shards):
    """Such sets are no longer made, but there are old ones."""
    box = [10, 10, 40, 40]
    same = [Category(4, "bolt"), Category(9, "bolt"), Category(2, "nut")]
    shards = make_shards([[truth(0, box), truth(1, [50, 50, 40, 40], 2)]], same)
    metrics = evaluate_detections(shards, [found(4, box, 0.9)], ("bbox",))
    expected = {"bolt (id 4)": 1.0, "bolt (id 9)": 0.0, "nut": None}
    assert metrics["per_class"]["bbox"] == pytest.approx(expected)
    analysis = metrics["analysis"]["bbox"]
    assert list(analysis["per_class"]) == ["bolt (id 4)", "bolt (id 9)", "nut"]
    assert ["bolt (id 4)", "bolt (id 4)", 1] in analysis["confusion"]["pairs"]
    voc = evaluate_detections(shards, [found(4, box, 0.9)], ("bbox",), "voc12")
    assert voc["per_class"]["bbox"] == pytest.approx(expected)
