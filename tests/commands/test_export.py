import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bigdet.benchmarks.predict import settle
from bigdet.cli.export import main
from bigdet.config.run import phase_model
from bigdet.export.fixed import FixedDetector
from bigdet.export.writing import Differences, compare, load_exported, on_canvas, write_exported
from bigdet.models.build import build_detector
from bigdet.models.weights import save_detector_weights, weights_metadata
from bigdet.ops.nms import grouped_nms, spread_nms
from tests.shipped import unchecked

ROOT = Path(__file__).parents[2]
CATEGORIES = [{"id": number, "name": f"class {number}"} for number in range(1, 12)]
SMALL = [
    "model.width=32",
    "model.fc_width=32",
    "model.rpn.test_proposals=60",
    "data.train.shards=x",
    "data.val.shards=x",
]
SIZE = (96, 128)


def noise(*size):
    """Blurred colored noise: something for a network to see."""
    coarse = torch.rand(1, 3, size[0] // 8, size[1] // 8)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * image[0]).to(torch.uint8)


def make_detector(kind, *words):
    """A small detector with random weights that finds many things, and its config."""
    torch.manual_seed(0)
    overrides = [*SMALL, f"model.detector={kind}", *words]
    config = unchecked(ROOT / "configs" / "quickstart.yaml", overrides)
    detector = build_detector(phase_model(config, "finetune"), len(CATEGORIES))
    if not kind.startswith("cascade"):
        settle(detector, noise(96, 128))
    detector.eval_size, detector.categories = (96, 128), CATEGORIES
    return detector, config


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("faster_rcnn", []),
        ("mask_rcnn", []),
        ("mask_rcnn", ["model.roi.sampling_ratio=0"]),
        ("retinanet", []),
    ],
)
def test_fixed_shapes_give_what_the_detector_gives(kind, words):
    detector, _ = make_detector(kind, *words)
    fixed = FixedDetector(detector, num_candidates=1000)
    batch = on_canvas(detector, noise(60, 128), SIZE, 2)

    def run(images, sizes):
        return [output.numpy() for output in fixed(images, sizes)]

    found = compare(detector, run, batch)
    assert found.detections > 20
    assert found.is_within(Differences(box=1e-3, score=1e-5, mask=1e-4)), found
    boxes, scores, labels, is_valid, *masks = run(batch.images, batch.image_sizes)
    most = detector.eval_settings.detections_per_image
    assert (boxes.shape, scores.shape, labels.shape) == ((2, most, 4), (2, most), (2, most))
    assert (scores[~is_valid] == 0).all()
    assert (np.diff(scores) <= 0).all()
    assert [mask.shape for mask in masks] == [(2, most, 28, 28)] * (kind == "mask_rcnn")


def test_too_few_candidates_are_noticed():
    detector, _ = make_detector("faster_rcnn")
    fixed = FixedDetector(detector, num_candidates=5)

    def run(images, sizes):
        return [output.numpy() for output in fixed(images, sizes)]

    found = compare(detector, run, on_canvas(detector, noise(96, 128), SIZE, 1))
    assert found.unmatched > 0


def test_comparison_measures_boxes_scores_masks_and_what_is_missing():
    detector, _ = make_detector("mask_rcnn")
    fixed = FixedDetector(detector, num_candidates=1000)
    batch = on_canvas(detector, noise(96, 128), SIZE, 1)

    def altered(images, sizes):
        boxes, scores, labels, is_valid, masks = (
            output.numpy().copy() for output in fixed(images, sizes)
        )
        boxes[0, 1, 0] += 0.25
        scores[0, 2] += 0.125
        masks[0, 3, 5, 5] += 0.5
        labels[0, 4] = (labels[0, 4] + 1) % len(CATEGORIES)  # theirs is new, ours is missing
        return [boxes, scores, labels, is_valid, masks]

    found = compare(detector, altered, batch)
    assert (found.box, found.score) == pytest.approx((0.25, 0.125), abs=1e-3)
    assert found.mask == pytest.approx(0.5, abs=1e-3)
    assert found.unmatched == 2


def test_nms_on_a_square_of_groups_is_nms_by_groups():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(600, 2, generator=generator) * 300
    boxes = torch.cat([corners, corners + 20 + torch.rand(600, 2, generator=generator) * 60], 1)
    scores = torch.rand(600, generator=generator)
    scores[::50] = -torch.inf
    for num_groups in (1, 5, 80):
        groups = torch.randint(0, num_groups, (600,), generator=generator)
        expected = grouped_nms(boxes, scores, groups, num_groups, 0.5)
        assert torch.equal(spread_nms(boxes, scores, groups, num_groups, 0.5), expected)


def test_image_is_made_smaller_until_it_fits_the_canvas():
    detector, _ = make_detector("retinanet")
    detector.eval_size = (200, 400)
    # 100x150 at (200, 400) would be 200x300; 128 / 300 of that is 85x128.
    batch = on_canvas(detector, noise(100, 150), SIZE, 1)
    assert batch.image_sizes.tolist() == [[85, 128]]
    assert batch.images[0, :, 85:].sum() == 0


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_onnx_gives_what_the_detector_gives_on_real_images(tmp_path, coco_dir, capsys, kind):
    detector, config = make_detector(kind, "phases.finetune.resize.size=96")
    (tmp_path / "run").mkdir()
    metadata = weights_metadata(config, CATEGORIES, "finetune")
    save_detector_weights(tmp_path / "run" / "model.safetensors", detector, metadata)
    images = [str(path) for path in sorted((coco_dir / "val2017").glob("*.jpg"))[:3]]
    out = tmp_path / "detector.onnx"
    words = [str(tmp_path / "run"), str(out), "--size", "96", "128", "--check", *images]
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"3 images: \d\d+ detections, 0 unmatched", told)

    facts = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert json.loads(facts["categories"]) == CATEGORIES
    outputs = [output.name for output in onnx.load(out).graph.output]
    expected = ["boxes", "scores", "labels", "is_valid", "masks"]
    assert outputs == expected[: 5 if kind == "mask_rcnn" else 4]


def test_program_of_torch_export_gives_what_the_detector_gives(tmp_path):
    detector, _ = make_detector("faster_rcnn")
    write_exported(detector, tmp_path / "x.pt2", SIZE, 2, 1000)
    exported = load_exported(tmp_path / "x.pt2")
    found = compare(detector, exported, on_canvas(detector, noise(80, 110), SIZE, 2))
    assert found.detections > 20
    assert found.is_within(Differences(box=1e-3, score=1e-5))
    facts = {"bigdet.json": ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=facts)
    assert json.loads(json.loads(facts["bigdet.json"])["categories"]) == CATEGORIES


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("cascade_rcnn", ["x.pt2", "--size", "96", "96"], "found a cascade_rcnn"),
        ("faster_rcnn", ["x.pth", "--size", "96", "96"], r"x\.pth: expected a name that ends"),
        ("faster_rcnn", ["x.pt2", "--size", "96", "100"], "--size: found 96 100"),
        ("faster_rcnn", ["x.pt2", "--size", "96", "96", "--batch", "0"], "--batch: found 0"),
        ("faster_rcnn", ["x.pt2", "--size", "96", "96", "--check", "/no"], "--check: 1 of the"),
    ],
)
def test_what_cannot_be_exported_is_one_message(tmp_path, monkeypatch, kind, words, message):
    detector, config = make_detector(kind)
    metadata = weights_metadata(config, CATEGORIES, "finetune")
    save_detector_weights(tmp_path / "model.safetensors", detector, metadata)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(["model.safetensors", *words])
    assert not Path("x.pt2").exists()
