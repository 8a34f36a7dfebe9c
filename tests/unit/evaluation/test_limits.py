"""How many detections per class and image count, and the warnings if they are too few."""

import dataclasses
import json
from pathlib import Path

import pytest

from bigdet.config.load import load_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import check_config
from bigdet.evaluate import main
from bigdet.evaluation.detection_limits import warn_at_start, warn_of_dense
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections, limit_note, metrics_table

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
NUM_OBJECTS = 120


def boxes():
    """120 boxes of 6x6 pixels that do not touch, in rows of 12."""
    return [[8 * (n % 12), 8 * (n // 12), 6, 6] for n in range(NUM_OBJECTS)]


@pytest.fixture
def dense(make_shards):
    """A set with an image of 120 objects of one class and one of the other, and one of three."""
    objects = [
        {"id": n, "label": 0, "bbox": box, "area": 36, "iscrowd": 0}
        for n, box in enumerate(boxes(), 1)
    ]
    return make_shards([[*objects, objects[0] | {"id": 500, "label": 1}], objects[:3]])


@pytest.fixture
def results():
    """Every object of class 0 of the first image is found, the later the less sure."""
    return [
        {"image_id": 7, "category_id": 17, "bbox": box, "score": 0.9 - n / 1000}
        for n, box in enumerate(boxes())
    ]


def test_objects_beyond_the_limit_can_be_found_with_a_higher_one(dense, results):
    # 123 objects of class 0, none of the image of three is found. With 100 detections recall is
    # 100 / 123 and precision 1 up to there: recalls 0.00 to 0.81 of the 101, so AP is 82 / 101.
    # With 300, 120 / 123 = 0.975...: 98 / 101. The other class is never found: half of both.
    kinds = ("bbox",)
    coco = evaluate_detections(dense, results, kinds)
    more = evaluate_detections(dense, results, kinds, max_detections=300)
    assert coco["bbox"]["AP"] == pytest.approx(82 / 101 / 2)
    assert coco["bbox"]["AR100"] == pytest.approx(100 / 123 / 2)
    assert more["bbox"]["AP"] == pytest.approx(98 / 101 / 2)
    assert more["bbox"]["AR300"] == pytest.approx(120 / 123 / 2)
    assert "AR100" not in more["bbox"]
    assert list(more["analysis"]["bbox"]["recall"]) == ["1", "10", "300"]
    assert coco["analysis"]["bbox"]["errors"]["count"]["missed"] == 24
    assert more["analysis"]["bbox"]["errors"]["count"]["missed"] == 4


def test_another_limit_than_cocos_is_named_in_the_numbers_and_in_the_table(dense, results):
    coco = evaluate_detections(dense, results, ("bbox",))
    assert "max_detections" not in coco
    assert limit_note(coco) == ""
    more = evaluate_detections(dense, results, ("bbox",), max_detections=300)
    assert more["max_detections"] == 300
    table = metrics_table(more, per_class=True)
    assert table.splitlines()[0].split()[-1] == "AR300"
    assert table.endswith("\n\nup to 300 detections per class and image counted")
    assert "counted" not in metrics_table(coco, per_class=True)


def test_more_objects_than_are_counted_are_reported_after_and_before(dense, results, caplog):
    expected = "an image has 120 objects of the class cat, but AP counts"
    config = load_config(CONFIG, ["evaluation.max_detections=110"])
    warn_at_start(config, [dense])
    few, many = (record.getMessage() for record in caplog.records)
    assert few.startswith("evaluation.max_detections is 110, but the model gives 100 detections")
    assert "model.roi.detections_per_image" in few
    assert f"{dense.address}: {expected} 110 detections: raise evaluation.max_detections" in many
    caplog.clear()
    evaluate_detections(dense, results, ("bbox",))
    assert f"{expected} 100" in caplog.text
    caplog.clear()
    warn_of_dense(read_ground_truth(dense, False, False), 120)
    warn_at_start(load_config(CONFIG, ["evaluation.metric=voc07"]), [dense])
    enough = ["evaluation.max_detections=120", "model.roi.detections_per_image=120"]
    warn_at_start(load_config(CONFIG, enough), [dense])
    assert not caplog.records


def test_a_file_of_detections_is_scored_with_another_limit(dense, results, tmp_path, monkeypatch):
    monkeypatch.setattr("bigdet.cli.score_file.setup_logging", lambda rank: None)
    (tmp_path / "found.json").write_text(json.dumps(results))
    words = [str(tmp_path / "found.json"), "--shards", str(dense.folder)]
    out = ["--out", str(tmp_path / "ap.json")]
    for more in (["--max-detections", "300"], ["evaluation.max_detections=300"]):
        assert main([*words, *more, *out]) == 0
        metrics = json.loads((tmp_path / "ap.json").read_text())
        assert metrics["bbox"]["AP"] == pytest.approx(98 / 101 / 2)
        assert metrics["max_detections"] == 300
    for word, message in (
        ("evaluation.max_detections=many", "found 'many', expected a number"),
        ("evaluation.max_detections=9", "found 9, expected 10 to 10000"),
        ("evaluation.every=3", "evaluation.every=3 would be ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*words, word])
    with pytest.raises(ConfigError, match="voc07 counts all detections"):
        main([*words, "--metric", "voc07", "--max-detections", "300"])


@pytest.mark.parametrize("value", [0, 9, 10_001])
def test_limits_out_of_range_are_refused(value):
    with pytest.raises(ConfigError, match=f"max_detections: found {value}, expected 10 to 10000"):
        load_config(CONFIG, [f"evaluation.max_detections={value}"])
    config = load_config(CONFIG)
    evaluation = dataclasses.replace(config.evaluation, max_detections=300, metric="voc12")
    with pytest.raises(ConfigError, match="voc12 counts all detections"):
        check_config(dataclasses.replace(config, evaluation=evaluation))
