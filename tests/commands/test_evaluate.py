import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools import mask as mask_tools

from bigdet.benchmarks.evaluate import coco_ground_truth
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluate import check_categories, main, read_config
from bigdet.evaluation.coco_metrics import METRICS
from bigdet.models.weights import load_detector
from tests.commands.tiny_detector import ROOT, save_detector


@pytest.fixture(scope="module")
def run_and_shards(shapes_shards, tmp_path_factory):
    """A run folder with a model for the classes of a validation set, and that set."""
    val = ShardSet(shapes_shards / "val")
    categories = [{"id": category.id, "name": category.name} for category in val.categories]
    return save_detector(tmp_path_factory.mktemp("evaluate") / "run", categories), val


@pytest.fixture(autouse=True)
def _keep_logging(monkeypatch):
    """Commands that run in this process would take the log from other tests."""
    monkeypatch.setattr("bigdet.evaluate.setup_logging", lambda rank: None)
    monkeypatch.setattr("bigdet.cli.score_file.setup_logging", lambda rank: None)


def call(*words, ranks=None):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", ranks] if ranks else []
    return subprocess.run(
        [sys.executable, *map(str, launcher), "-m", "bigdet.evaluate", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_command_gives_the_same_table_and_numbers_on_two_ranks_and_remote_shards(
    run_and_shards, tmp_path, capsys
):
    model, val = run_and_shards
    words = ["--local_rank=0", model, "data.workers=0", f"data.cache.folder={tmp_path}/cache"]
    files = ["--out", tmp_path / "one.json", "--detections", tmp_path / "found.json"]
    one = call(*words, "--shards", val.folder, *files)
    assert one.returncode == 0, one.stderr
    lines = one.stdout.splitlines()
    assert lines[0].split() == list(METRICS)
    assert [line.split()[0] for line in lines[1:3]] == ["box", "mask"]
    assert len(lines) == 5 + val.num_classes
    metrics = json.loads((tmp_path / "one.json").read_text())
    assert list(metrics) == ["bbox", "segm", "per_class", "analysis"]
    assert list(metrics["segm"]) == list(METRICS)
    assert list(metrics["per_class"]["bbox"]) == [category.name for category in val.categories]

    address = f"pipe:cat {val.folder}/{{}}"
    two = call(*words, "--shards", address, "--out", tmp_path / "two.json", ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == metrics
    assert two.stdout == one.stdout

    alone = ["--shards", val.folder, "--out", tmp_path / "alone.json", "--analysis"]
    assert main(list(map(str, [tmp_path / "found.json", *alone]))) == 0
    assert json.loads((tmp_path / "alone.json").read_text()) == metrics
    printed = capsys.readouterr().out
    assert printed.startswith(one.stdout)
    assert "classification" in printed


def test_command_ends_with_one_message_on_shards_that_are_not_there(run_and_shards, tmp_path):
    ended = call(run_and_shards[0], "--shards", tmp_path / "nowhere")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere'}: ")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]', [], "1: has no score"),
        (
            '[{"image_id": -5, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
            [],
            "image_id is -5, which none of the",
        ),
        ('[{"image_id": 1, "keypoints": [1, 2, 3]}]', [], "has nothing that"),
        ('[{"image_id": 1, "segmentation": {}}]', ["--metric", "voc07"], "has nothing that"),
        ("[]", ["evaluation.metric=voc07"], "evaluation.metric=voc07 would be ignored"),
        ("[]", ["--detections", "x.json"], "--detections would be ignored"),
        ("[]", ["--tta"], "--tta would be ignored"),
        ("[]", ["--out", "/proc/nothing/x.json"], "--out: /proc/nothing: cannot be written to"),
        ("{}", [], "found a dict, expected a list of detections"),
    ],
)
def test_what_is_wrong_with_a_file_of_detections_is_reported(
    run_and_shards, tmp_path, content, words, message
):
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        main([str(tmp_path / "found.json"), "--shards", str(run_and_shards[1].folder), *words])


def test_what_cannot_be_written_is_reported_before_a_model_is_loaded(tmp_path, in_process):
    (tmp_path / "x").write_text("")
    words = ["nowhere", "--shards", "nowhere"]
    for option in ("--out", "--detections"):
        with pytest.raises(ValueError, match=f"^{option}: {tmp_path}/x: is a file"):
            main([*words, option, str(tmp_path / "x/found.json")])


def test_no_detections_and_the_metric_of_voc(run_and_shards, tmp_path, capsys, caplog):
    with pytest.raises(ValueError, match="there is no such results file"):
        main([str(tmp_path / "found.json"), "--shards", str(run_and_shards[1].folder)])
    (tmp_path / "found.json").write_text("[]")
    words = ["--shards", str(run_and_shards[1].folder), "--metric", "voc07", "--analysis"]
    assert main([str(tmp_path / "found.json"), *words]) == 0
    assert "contains no detections, so every AP is 0" in caplog.text
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["box", "0.000", "0.000", "0.000"]
    assert "errors at IoU 0.5, AP50 0.000" in out


def test_shards_with_other_categories_are_refused(run_and_shards):
    model, val = run_and_shards
    detector = load_detector(model)
    check_categories(detector, model, val)
    first = detector.categories[0]["name"]
    detector.categories[0] = {"id": 1, "name": "person"}
    with pytest.raises(ValueError, match=f"label 0 is '{first}', expected 'person'"):
        check_categories(detector, model, val)


def test_shards_with_more_categories_are_refused(run_and_shards):
    model, val = run_and_shards
    detector = load_detector(model)
    last = detector.categories.pop()["name"]
    place = val.num_classes - 1
    with pytest.raises(ValueError, match=f"label {place} is '{last}', expected absent"):
        check_categories(detector, model, val)


def test_overrides_change_the_config_of_the_weights(run_and_shards):
    config = read_config(
        run_and_shards[0],
        ["evaluation.resize={kind: short_side, size: 64}", "model.roi.nms_iou=0.7"],
    )
    assert config.evaluation.resize is not None
    assert config.evaluation.resize.size == 64
    assert config.model.roi.nms_iou == 0.7


@pytest.mark.parametrize(
    "word", ["model.width=8", "evaluation.every=5", "seed=1", "model.roi.rois_per_image=4", "tta"]
)
def test_options_that_an_evaluation_does_not_read_are_refused(run_and_shards, word):
    with pytest.raises(ValueError, match="does not read this option") as caught:
        read_config(run_and_shards[0], [word])
    assert word.partition("=")[0] in str(caught.value)


def test_value_that_breaks_a_rule_is_refused(run_and_shards: tuple[Path, ShardSet]):
    with pytest.raises(ValueError, match=r"model\.roi\.nms_iou"):
        read_config(run_and_shards[0], ["model.roi.nms_iou=7"])


MADE_BY = {  # the keys of a detection, in the order in which each program writes them
    "mmdetection.bbox.json": ("image_id", "bbox", "score", "category_id"),
    "mmdetection.segm.json": ("image_id", "bbox", "score", "category_id", "segmentation"),
    "coco_instances_results.json": ("image_id", "category_id", "bbox", "score", "segmentation"),
}


@pytest.mark.parametrize("name", MADE_BY)
def test_results_of_other_frameworks_are_scored_as_they_are(run_and_shards, tmp_path, capsys, name):
    val = run_and_shards[1]
    truth = coco_ground_truth(val)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    found = []
    for annotation in truth["annotations"]:
        rle = annotation["segmentation"]
        if isinstance(rle, list):
            outlines = mask_tools.frPyObjects(rle, *sizes[annotation["image_id"]])
            rle = mask_tools.merge(outlines)
            rle["counts"] = rle["counts"].decode()
        whole = annotation | {"score": 0.875, "segmentation": rle}
        found.append({key: whole[key] for key in MADE_BY[name]})
    (tmp_path / name).write_text(json.dumps(found))
    assert main([str(tmp_path / name), "--shards", str(val.folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    kinds = ["box", "mask"] if "segmentation" in MADE_BY[name] else ["box"]
    # The objects themselves were found: AP, AP50 and AP75 are 1.
    assert [line[:4] for line in lines[1 : 1 + len(kinds)]] == [
        [kind, *["1.000"] * 3] for kind in kinds
    ]


def test_masks_are_measured_where_the_first_detection_has_none(
    run_and_shards, tmp_path, capsys, caplog
):
    found = []
    for annotation in coco_ground_truth(run_and_shards[1])["annotations"]:
        keys = MADE_BY["mmdetection.segm.json" if found else "mmdetection.bbox.json"]
        found.append({key: (annotation | {"score": 0.875})[key] for key in keys})
    (tmp_path / "found.json").write_text(json.dumps(found))
    with caplog.at_level("INFO"):
        assert main([str(tmp_path / "found.json"), "--shards", str(run_and_shards[1].folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["box", "mask"]
    assert float(lines[2][1]) > 0.5
    assert "APl use the areas of boxes, also for masks, as in pycocotools" in caplog.text
