import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.evaluation import split as predict
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.scoring import evaluate_detections
from bigdet.evaluation.split import Passes, coco_results, predict_split
from bigdet.ops.masks import paste_mask
from bigdet.structures import Detections
from tests.unit.data.turned import BOX, red_box, turned_file, write_coco
from tests.unit.evaluation.oracle import Oracle

CPU = torch.device("cpu")


def truth(label, box):
    x, y, width, height = box
    corners = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    annotation = {"id": 1, "label": label, "bbox": box, "area": width * height, "iscrowd": 0}
    return annotation | {"segmentation": corners}


FIVE_IMAGES = [
    [truth(0, [10, 10, 40, 40]), truth(1, [50, 60, 30, 20])],
    [],
    [truth(1, [0, 0, 100, 100])],
    [truth(0, [20, 30, 10, 60])],
    [truth(0, [70, 80, 30, 20])],
]


def test_detections_on_resized_images_come_back_in_original_pixels_and_category_ids(make_shards):
    shards = make_shards(FIVE_IMAGES)
    oracle = Oracle(shards).train()
    results = list(predict_split(oracle, shards, Passes((64, 107), 2), CPU))
    assert [result["image_id"] for result in results] == [7, 7, 9, 10, 11]
    assert [result["category_id"] for result in results] == [17, 3, 3, 17, 17]
    assert results[1]["bbox"] == pytest.approx([50, 60, 30, 20])
    assert results[1]["score"] == pytest.approx(0.8)
    assert oracle.training  # as it was before
    assert oracle.passes == 3  # 5 images by twos: the surplus slot is not among the results
    metrics = evaluate_detections(shards, results, ("bbox", "segm"))
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)
    assert metrics["segm"]["AP"] == pytest.approx(1.0)


def test_labels_get_the_ids_of_their_names_and_those_without_are_left_out(make_shards):
    shards = make_shards(FIVE_IMAGES)
    ids = [None, 17]  # the model calls cars 1, and its class 0 is not in the set
    results = list(predict_split(Oracle(shards), shards, Passes((64, 107), 2), CPU, ids=ids))
    assert [(each["image_id"], each["category_id"]) for each in results] == [(7, 17), (9, 17)]
    assert results[0]["bbox"] == pytest.approx([50, 60, 30, 20])


def test_boxes_are_cut_at_the_border_of_the_image(make_shards):
    shards = make_shards([[truth(0, [80, 90, 40, 30])]])
    (result,) = predict_split(Oracle(shards), shards, Passes((100, 100), 1), CPU)
    assert result["bbox"] == pytest.approx([80, 90, 20, 10])
    assert coco_mask.toBbox(result["segmentation"]).tolist() == [80, 90, 20, 10]


def test_split_without_any_detection_gives_no_results(make_shards):
    shards = make_shards([[], []])
    assert list(predict_split(Oracle(shards), shards, Passes((100, 100), 1), CPU)) == []


def test_a_request_to_stop_ends_the_evaluation_without_a_result(make_shards):
    shards = make_shards(FIVE_IMAGES)
    oracle, answers = Oracle(shards), iter([False, True])
    assert predict_split(oracle, shards, Passes((100, 100), 1), CPU, lambda: next(answers)) is None
    assert oracle.passes == 2
    assert oracle.training


def test_damaged_image_is_an_error_that_names_it(make_shards):
    shards = make_shards(FIVE_IMAGES)
    with open(shards.path(3), "r+b") as file:
        file.seek(int(shards.index[3]["image_offset"]) + 200)
        file.write(b"damage")
    oracle = Oracle(shards).train()
    with pytest.raises(ValueError, match=f"{shards.path(3)}.*{shards.key(3)}"):
        predict_split(oracle, shards, Passes((100, 100), 1), CPU)
    assert oracle.training


def test_progress_is_reported_with_the_time_left(make_shards, monkeypatch, caplog):
    monkeypatch.setattr(predict, "PROGRESS_SECONDS", 0.0)
    shards = make_shards(FIVE_IMAGES)
    with caplog.at_level(logging.INFO, "bigdet"):
        predict_split(Oracle(shards), shards, Passes((100, 100), 2), CPU)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "evaluation: 2 of 5 images",
        "evaluation: 4 of 5 images",
        "evaluation: 5 of 5 images",
    ]


def test_run_lengths_are_those_of_the_mask_pasted_into_the_whole_image():
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(20, 2, generator=generator) * torch.tensor([60.0, 40.0])
    sizes = torch.rand(20, 2, generator=generator) * 20
    detections = Detections(
        boxes=torch.cat([corners, corners + sizes], dim=1),
        scores=torch.ones(20),
        labels=torch.zeros(20, dtype=torch.int64),
        masks=torch.rand(20, 28, 28, generator=generator),
    )
    results = coco_results(detections, 5, (64, 96), [17])
    for result, mask, box in zip(results, detections.masks, detections.boxes, strict=True):
        expected = paste_mask(mask, box, 64, 96).numpy()
        encoded = coco_mask.encode(np.asfortranarray(expected.astype(np.uint8)))
        assert result["segmentation"] == {"size": [64, 96], "counts": encoded["counts"].decode()}
        assert coco_mask.area(result["segmentation"]) == expected.sum()


def test_detections_without_masks_give_results_without_segmentation():
    found = Detections(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([1]))
    expected = {"image_id": 5, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    assert coco_results(found, 5, (64, 96), [17, 3]) == [expected]


def test_module_runs_in_the_precision_of_the_run_with_single_precision_weights(make_shards):
    class Multiplying(Oracle):
        def __init__(self, shards):
            super().__init__(shards)
            self.linear = torch.nn.Linear(4, 4)
            self.seen = set()

        def forward(self, batch):
            self.seen.add((self.linear(torch.ones(1, 4)).dtype, self.linear.weight.dtype))
            return super().forward(batch)

    shards = make_shards(FIVE_IMAGES)
    module = Multiplying(shards)
    predict_split(module, shards, Passes((100, 100), 2, precision="bf16"), CPU)
    assert module.seen == {(torch.bfloat16, torch.float32)}
    module.seen.clear()
    predict_split(module, shards, Passes((100, 100), 2), CPU)
    assert module.seen == {(torch.float32, torch.float32)}


def test_keypoints_are_counted_in_cocos_pixels():
    # COCO's keypoint 0, 0 is the center of the first pixel, which is at 0.5, 0.5.
    found = Detections(
        torch.tensor([[1.0, 2.0, 4.0, 8.0]]),
        torch.tensor([0.5]),
        torch.tensor([0]),
        keypoints=torch.tensor([[[1.5, 2.5, 3.0], [3.0, 8.0, -1.0]]]),
    )
    (result,) = coco_results(found, 5, (64, 96), [17])
    assert result["keypoints"] == [1.0, 2.0, 3.0, 2.5, 7.5, -1.0]


def test_detections_of_a_diverged_model_are_left_out_and_counted(make_shards, caplog):
    class Diverged(Oracle):
        def _detections(self, *about):
            found = super()._detections(*about)
            if len(found.scores) == 2:
                found.boxes[0, 2] = torch.nan
            return found

    shards = make_shards(FIVE_IMAGES)
    results = list(predict_split(Diverged(shards), shards, Passes((100, 100), 2), CPU))
    assert [result["category_id"] for result in results] == [3, 3, 17, 17]  # the first is gone
    assert "1 detections of this rank were not finite" in caplog.text


def test_a_rank_that_has_no_image_yet_reports_no_progress(monkeypatch, caplog):
    monkeypatch.setattr(predict, "PROGRESS_SECONDS", -1.0)  # a slow machine: always due
    surplus = SimpleNamespace(weights=torch.zeros(1))
    predict._Collected([1], 8, SavedResults()).add(surplus, [None])
    assert not caplog.records


def test_saved_results_come_by_image_id_all_or_those_of_some_images():
    saved = SavedResults()
    for image_id in (9, 4, 7):
        saved.add(image_id, [{"image_id": image_id, "score": score} for score in (0.5, 0.25)])
    assert [result["image_id"] for result in saved] == [4, 4, 7, 7, 9, 9]
    found = list(saved.of_images([9, 4, 5]))
    assert [(result["image_id"], result["score"]) for result in found] == [
        (4, 0.5),
        (4, 0.25),
        (9, 0.5),
        (9, 0.25),
    ]


class FailingOracle(Oracle):
    def forward(self, batch):
        raise RuntimeError("out of memory")


def test_a_pass_that_fails_leaves_the_module_as_it_was(make_shards, tmp_path):
    shards = make_shards(FIVE_IMAGES)
    oracle = FailingOracle(shards).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_split(oracle, shards, Passes((100, 100), 1), CPU)
    assert oracle.training
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # there is no such folder for what is found
        predict_split(oracle, shards, Passes((100, 100), 1), CPU, folder=tmp_path / "file")
    assert oracle.training


def test_detections_that_are_not_finite_are_left_out_with_all_that_belongs_to_them():
    nan = float("nan")
    found = Detections(
        boxes=torch.tensor([[0.0, 0, 5, 5], [0, nan, 5, 5], [1, 1, 2, 2], [2, 2, 3, 3]]),
        scores=torch.tensor([0.9, 0.8, float("inf"), 0.6]),
        labels=torch.tensor([3, 4, 5, 6]),
        masks=torch.arange(4.0)[:, None, None].expand(4, 28, 28),
    )
    kept, num_left_out = predict.finite_detections(found)
    assert num_left_out == 2
    assert kept.labels.tolist() == [3, 6]
    assert kept.masks[:, 0, 0].tolist() == [0, 3]


class RedFinder(torch.nn.Module):
    """Finds the red rectangle on what it sees."""

    def forward(self, batch):
        found = []
        for image, size in zip(batch.images, batch.image_sizes.tolist(), strict=True):
            x, y, w, h = red_box(image[:, : size[0], : size[1]].permute(1, 2, 0).numpy())
            box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32)
            masks, labels = torch.ones(1, 28, 28), torch.zeros(1, dtype=torch.int64)
            found.append(Detections(box, torch.tensor([0.9]), labels, masks))
        return found


def test_results_on_turned_images_are_of_the_images_as_annotated(tmp_path):
    files = {f"{n}.jpg": turned_file(n, size=(96, 64)) for n in range(5, 9)}
    file = write_coco(tmp_path, files, size=(96, 64))
    convert_coco(tmp_path / "images", file, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    results = list(predict_split(RedFinder(), shards, Passes((64, 96), 2), CPU))
    assert [result["bbox"] for result in results] == [BOX] * 4
    assert [coco_mask.toBbox(result["segmentation"]).tolist() for result in results] == [BOX] * 4
    assert [result["segmentation"]["size"] for result in results] == [[96, 64]] * 4
    # All three annotations of an image are the same box, so one of three is found.
    assert evaluate_detections(shards, results, ("bbox",))["bbox"]["AR100"] == pytest.approx(1 / 3)
