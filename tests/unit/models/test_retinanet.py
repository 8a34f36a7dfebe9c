from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

from bigdet.config.heads import RetinaConfig
from bigdet.config.model import ModelConfig
from bigdet.models.assign import pad_objects
from bigdet.models.build import build_detector
from bigdet.models.conventions import TORCHVISION, Conventions
from bigdet.models.detector import Detector
from bigdet.models.heads.retina import octave_sizes
from bigdet.structures import Batch
from tests.unit.models.scenes import assert_weight_zero_hides_an_image, make_scene
from tests.unit.models.test_detector import Waits

CONFIG = ModelConfig(
    detector="retinanet",
    backbone="resnet10",
    width=16,
    retina=RetinaConfig(anchor_sizes=[12, 24, 48, 96, 192], score_threshold=0.0),
)
OBJECTS = [[(5, 8, 60, 70), (50, 30, 100, 100)], [(10, 10, 30, 34)]]
SIZES = [(128, 128), (96, 120)]


def detector_of(config: ModelConfig = CONFIG, conventions: Conventions | None = None) -> Detector:
    torch.manual_seed(0)
    return build_detector(config, 3, conventions)


def scene(objects: list = OBJECTS) -> Batch:
    return make_scene(objects, SIZES, (128, 128))


@pytest.mark.parametrize("objects", [OBJECTS, [OBJECTS[0], []], [[], []]])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_losses_are_finite_and_touch_every_parameter_with_or_without_objects(
    objects: list, is_bf16: bool
) -> None:
    detector = detector_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        losses = detector(scene(objects))
    assert list(losses) == ["retina_class", "retina_box"]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert losses["retina_class"] > 0
    if not any(objects):
        assert losses["retina_box"] == 0
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_classes_start_at_the_prior() -> None:
    detector = detector_of().eval()
    with torch.no_grad():
        predictions = detector._predictions(scene())
    scores = torch.cat(predictions.logits, dim=1).sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.05)


def test_the_host_waits_for_the_device_once_a_step() -> None:
    detector, batch = detector_of(), scene()
    with Waits() as waits:
        detector(batch)
    assert waits.found == {"aten._local_scalar_dense.default": 1}  # the largest number of objects


@pytest.mark.parametrize("conventions", [Conventions(), TORCHVISION])
def test_losses_are_divided_by_the_positives_of_the_lane_or_of_each_image(
    conventions: Conventions,
) -> None:
    detector, batch = detector_of(conventions=conventions), scene()
    with torch.no_grad():
        predictions = detector._predictions(batch)
        objects = pad_objects(batch.targets, predictions.anchors.dtype)
        head = detector.retina_head
        both = head.losses(predictions, objects, batch.weights)["retina_box"]
        ones = [
            head.losses(predictions, objects, torch.eye(2)[image])["retina_box"]
            for image in range(2)
        ]
        counts = [num_positives(detector, batch, image) for image in range(2)]
    assert counts[0] != counts[1]
    if conventions.retina_normalizer == "image":
        expected = sum(ones) / 2
    else:
        expected = sum(one * count for one, count in zip(ones, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(both, expected)


def num_positives(detector: Detector, batch: Batch, image: int) -> int:
    """Anchors with IoU of at least one half with an object, or an object's best, by torchvision."""
    with torch.no_grad():
        anchors = detector._predictions(batch).anchors
    rows = slice(*batch.targets.offsets[image : image + 2].tolist())
    iou = box_iou(anchors, batch.targets.boxes[rows])
    return int(((iou >= 0.5) | (iou == iou.amax(dim=0))).any(dim=1).sum())


def test_an_image_of_weight_zero_changes_no_loss() -> None:
    other = scene([OBJECTS[0], [(0, 0, 90, 90)]])
    assert_weight_zero_hides_an_image(detector_of(), scene(), other)


def test_a_crowd_is_no_object() -> None:
    batch = scene()
    crowd = replace(batch, targets=replace(batch.targets, is_crowd=torch.ones(3, dtype=torch.bool)))
    detector = detector_of()
    empty = detector(replace(batch, targets=scene([[], []]).targets))
    assert detector(crowd) == empty


def test_detections_lie_in_their_images_best_first() -> None:
    found = detector_of().eval()(scene())
    assert len(found) == 2
    for one, (height, width) in zip(found, SIZES, strict=True):
        assert len(one.boxes) == 100
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, [0, 2]] <= width).all()
        assert (one.boxes[:, [1, 3]] <= height).all()
        assert torch.equal(one.scores, one.scores.sort(descending=True).values)
        assert one.masks is None


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_no_detections_is_an_ordinary_result(threshold: float) -> None:
    config = replace(CONFIG, retina=replace(CONFIG.retina, score_threshold=threshold))
    for found in detector_of(config).eval()(scene()):
        assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.0, 0.012, 1.0])
def test_detections_are_the_same_without_waiting_for_the_number_of_candidates(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RetinaConfig(score_threshold=threshold, candidates_per_level=50)
    detector = detector_of(replace(CONFIG, retina=config)).eval().requires_grad_(False)
    batch = scene()
    features = detector.features(batch)
    generator = torch.Generator().manual_seed(0)
    for level in features.logits:  # without ties, the order of which is not defined
        level.copy_(torch.randn(level.shape, generator=generator) - 4)
    features.logits[0][0, :5] = torch.nan
    expected = detector.find(features, batch)
    head = detector.retina_head
    monkeypatch.setattr(head, "_best_above", head._best)
    with Waits() as waits:
        head.decode(features, 2)
    assert not waits.found
    found = detector.find(features, batch)
    for name in ("images", "boxes", "scores", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.counts == torch.bincount(expected.images, minlength=2).tolist()
    assert (len(found.scores) > 20) == (threshold < 1)


def test_test_settings_replace_those_of_the_model() -> None:
    detector = detector_of().eval()
    retina = replace(CONFIG.retina, detections_per_image=7)
    detector.use_eval_settings(replace(CONFIG, retina=retina))
    assert [len(one.boxes) for one in detector(scene())] == [7, 7]


def test_sizes_of_an_octave_end_below_the_next() -> None:
    # 32 x 2^(1/3) = 40.317, 32 x 2^(2/3) = 50.797
    assert octave_sizes(32, 3, rounded=False) == pytest.approx([32, 40.317, 50.797], abs=1e-3)
    assert octave_sizes(32, 3, rounded=True) == [32.0, 40.0, 50.0]
