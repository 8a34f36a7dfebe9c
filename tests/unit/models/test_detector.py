from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigdet.config.heads import KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector
from bigdet.ops import nms
from bigdet.pieces.building import parameters_on_meta
from bigdet.structures import Batch, Masks, Targets
from tests.unit.models.scenes import assert_weight_zero_hides_an_image, make_scene

CONFIG = ModelConfig(
    detector="mask_rcnn",
    backbone="resnet10",
    width=16,
    fc_width=32,
    rpn=RpnConfig(anchor_sizes=[12, 24, 48, 96, 192], train_proposals=100, test_proposals=50),
    roi=RoiConfig(rois_per_image=32, score_threshold=0.01),
    keypoint=KeypointConfig(num_keypoints=3, width=16),
)
OBJECTS = [[(5, 8, 60, 70), (50, 30, 100, 100)], [(10, 10, 30, 34)]]
SIZES = [(128, 128), (96, 120)]


def detector_of(config: ModelConfig = CONFIG) -> Detector:
    torch.manual_seed(0)
    return build_detector(config, 3)


def scene(objects: list = OBJECTS) -> Batch:
    return make_scene(objects, SIZES, (128, 128), num_keypoints=CONFIG.keypoint.num_keypoints)


@pytest.mark.parametrize(
    ("backbone", "blocks_of_units"),
    [
        ("vit_s", [3, 3, 3, 3]),  # 1.8 million weights each: a quarter is a unit
        ("vit_b", [2, 1] * 4),  # 7.1 million
        ("vit_l", [1] * 24),  # 12.6 million
    ],
)
def test_large_backbones_are_gathered_by_fewer_blocks(
    backbone: str, blocks_of_units: list[int]
) -> None:
    config = ModelConfig(detector="mask_rcnn", backbone=backbone, width=16, fc_width=16)
    with parameters_on_meta():
        detector = build_detector(config, 3)
    blocks = [list(block.parameters()) for block in detector.backbone.blocks]
    units = [[p for part in unit for p in part.parameters()] for unit in detector.units]
    found = []
    for unit in units[1 : 1 + len(blocks_of_units)]:  # the first is the patch embedding
        found.append(0)
        while unit:
            block, found[-1] = blocks.pop(0), found[-1] + 1
            assert all(p is own for p, own in zip(unit, block, strict=False))
            unit = unit[len(block) :]
    assert (found, blocks) == (blocks_of_units, [])


@pytest.mark.parametrize("objects", [OBJECTS, [OBJECTS[0], []], [[], []]])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_losses_are_finite_and_touch_every_parameter_with_or_without_objects(
    objects: list, is_bf16: bool
) -> None:
    detector = detector_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        losses = detector(scene(objects))
    assert list(losses) == ["rpn_objectness", "rpn_box", "box_class", "box_delta", "mask"]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    if not any(objects):
        assert losses["rpn_box"] == losses["box_delta"] == losses["mask"] == 0
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_image_of_weight_zero_changes_no_loss() -> None:
    other = scene([OBJECTS[0], [(0, 0, 90, 90)]])
    assert_weight_zero_hides_an_image(detector_of(), scene(), other)


def test_losses_depend_on_the_seed_of_the_batch_and_not_on_the_generator() -> None:
    detector = detector_of()
    torch.manual_seed(1)
    first = detector(scene())
    torch.manual_seed(2)
    assert detector(scene()) == first
    assert detector(replace(scene(), seed=5)) != first


def test_a_crowd_is_no_object() -> None:
    detector = detector_of()
    batch = scene()
    crowd = replace(batch, targets=replace(batch.targets, is_crowd=torch.ones(3, dtype=torch.bool)))
    losses = detector(crowd)
    assert losses["rpn_box"] == losses["box_delta"] == losses["mask"] == 0


def test_pixels_are_normalized_and_zero_outside_the_image() -> None:
    detector = detector_of()
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = scene()
    detector(batch)
    (pixels,) = seen
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert not pixels[1, :, 96:].any()
    assert not pixels[1, :, :, 120:].any()
    mean, deviation = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_DEVIATION)
    expected = (batch.images[1, :, 95, 119] - mean) / deviation
    torch.testing.assert_close(pixels[1, :, 95, 119], expected)


def test_normalization_constants_are_in_no_weights_file() -> None:
    assert not [name for name in detector_of().state_dict() if "pixel" in name]


def test_a_faster_rcnn_reads_no_masks() -> None:
    detector = detector_of(replace(CONFIG, detector="faster_rcnn"))
    batch = scene()
    batch = replace(batch, targets=replace(batch.targets, masks=None))
    assert list(detector(batch)) == ["rpn_objectness", "rpn_box", "box_class", "box_delta"]
    assert all(found.masks is None for found in detector.eval()(batch))


def test_a_batch_without_what_a_head_learns_is_an_error() -> None:
    batch = scene()
    with pytest.raises(ValueError, match="The batch has no masks"):
        detector_of()(replace(batch, targets=replace(batch.targets, masks=None)))
    detector = detector_of(replace(CONFIG, detector="keypoint_rcnn"))
    with pytest.raises(ValueError, match="The batch has no keypoints"):
        detector(replace(batch, targets=replace(batch.targets, keypoints=None)))


def test_keypoints_are_moved_to_the_image_as_given() -> None:
    detector = detector_of(replace(CONFIG, detector="keypoint_rcnn"))
    detector.eval_size = (128, 128)
    image = scene().images[0]
    small = torch.nn.functional.interpolate(image[None], size=(64, 32))[0]  # seen at 128 x 64
    found = detector.predict([small])[0]
    seen = []
    forward = detector._detect
    detector._detect = lambda batch: seen.extend(forward(batch)) or seen
    detector.predict([small])
    assert len(found.boxes) > 0
    torch.testing.assert_close(found.keypoints[..., :2], seen[0].keypoints[..., :2] / 2)
    torch.testing.assert_close(found.keypoints[..., 2], seen[0].keypoints[..., 2])
    # Peaks lie in their boxes.
    assert (found.keypoints[..., :2] >= found.boxes[:, None, :2]).all()
    assert (found.keypoints[..., :2] <= found.boxes[:, None, 2:] + 1).all()


def test_detections_lie_in_their_images_best_first() -> None:
    found = detector_of().eval()(scene())
    assert len(found) == 2
    for one, (height, width) in zip(found, SIZES, strict=True):
        assert 0 < len(one.boxes) <= 100
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, [0, 2]] <= width).all()
        assert (one.boxes[:, [1, 3]] <= height).all()
        assert torch.equal(one.scores, one.scores.sort(descending=True).values)
        assert one.masks is not None
        assert one.masks.shape == (len(one.boxes), 28, 28)
        assert ((one.masks >= 0) & (one.masks <= 1)).all()


def test_no_detections_is_an_ordinary_result() -> None:
    config = replace(CONFIG, roi=replace(CONFIG.roi, score_threshold=0.999))
    for found in detector_of(config).eval()(scene()):
        assert found.boxes.shape == (0, 4)
        assert found.masks is not None
        assert found.masks.shape == (0, 28, 28)


def test_predict_resizes_and_gives_boxes_in_pixels_of_the_given_images() -> None:
    detector = detector_of()
    detector.eval_size = (64, 96)
    image = scene().images[0, :, :, :96]  # 128 x 96, shown at 85 x 64, half the size
    half = detector.predict([image])[0]
    assert detector.training
    small = torch.nn.functional.interpolate(
        image[None], size=(85, 64), mode="bilinear", antialias=True
    )[0]
    canvas = make_scene([[]], [(85, 64)], (96, 64))
    canvas.images.zero_()[0, :, :85] = small
    expected = detector.eval()(canvas)[0]
    scale = torch.tensor([96 / 64, 128 / 85] * 2)
    assert len(half.boxes) > 0
    torch.testing.assert_close(half.boxes, expected.boxes * scale, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(half.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_predict_takes_images_of_any_sizes_together() -> None:
    detector = detector_of()
    detector.eval_size = (64, 96)
    shapes = [(40, 90), (200, 50), (64, 64)]
    found = detector.predict([torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in shapes])
    for one, (height, width) in zip(found, shapes, strict=True):
        assert (one.boxes <= torch.tensor([width, height, width, height])).all()


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device.

    ``lift_fresh`` is a Python list made a tensor: on its way to a device it waits.
    """

    NAMES = (
        "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
        "repeat_interleave.Tensor", "equal.default", "nms", "lift_fresh",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split("::")[-1]
        is_boolean_index = name.startswith("aten.index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for arg in args[1:2]
            if isinstance(arg, (list, tuple))
            for index in arg
        )
        if is_boolean_index or any(word in name for word in self.NAMES):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn", "keypoint_rcnn"])
def test_the_host_waits_for_the_device_once_a_step(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU, suppression waits for the sizes of its groups; with Triton it waits for nothing.
    calls = []

    def one_call(boxes: Tensor, scores: Tensor, *_: Any, is_sorted: bool) -> Tensor:
        calls.append(len(boxes))
        return torch.ones_like(scores, dtype=torch.bool)

    monkeypatch.setattr("bigdet.models.heads.rpn.grouped_nms", one_call)
    model = detector_of(replace(CONFIG, detector=detector))
    batch = scene()
    batch = replace(batch, targets=replace(batch.targets, most=2))  # as a copy to a device has
    with Waits() as waits:
        losses = model(batch)
    # The number of positives. That of objects is known before they are copied to the device.
    assert waits.found == {"aten._local_scalar_dense.default": 1}
    assert len(calls) == 1
    assert all(loss.isfinite() for loss in losses.values())


def test_suppression_on_a_device_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
        calls.append(len(boxes))
        return original(boxes, scores, iou)

    original = nms.nms
    monkeypatch.setattr(nms, "nms", counted)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 30 * torch.rand(300, 2, generator=generator)], dim=1)
    scores = torch.rand(300, generator=generator)
    scores[::7] = -torch.inf
    groups = torch.randint(0, 5, (300,), generator=generator)
    separate = nms.grouped_nms(boxes, scores, groups, 5, 0.5)
    assert len(calls) == 5
    together = nms.shifted_nms(boxes, scores, groups, 0.5)
    assert len(calls) == 6
    assert torch.equal(separate, together)


def test_targets_without_a_single_row_are_an_ordinary_batch() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    masks = Masks(
        bits=torch.zeros(0, dtype=torch.uint8),
        offsets=torch.zeros(1, dtype=torch.int64),
        origins=torch.zeros(0, 2, dtype=torch.int64),
        sizes=torch.zeros(0, 2, dtype=torch.int64),
    )
    targets = Targets(
        torch.zeros(0, 4), empty, empty.bool(), torch.zeros(3, dtype=empty.dtype), masks
    )
    losses = detector_of()(replace(scene(), targets=targets))
    assert losses["mask"] == 0


class PassError(Exception):
    """Raised in the middle of a forward pass."""


def fail(*_: object) -> None:
    raise PassError


@pytest.mark.parametrize("is_failing", [False, True])
def test_predict_leaves_every_part_in_its_mode_whatever_happens(is_failing: bool) -> None:
    detector = detector_of().train()
    detector.backbone.eval()  # as somebody may freeze it
    modes = [part.training for part in detector.modules()]
    if is_failing:
        detector.rpn.register_forward_hook(fail)
        with pytest.raises(PassError):
            detector.predict([scene().images[0]])
    else:
        detector.predict([scene().images[0]])
    assert [part.training for part in detector.modules()] == modes
