from __future__ import annotations

import pytest
import torch

from bigdet.benchmarks.torchvision_twin import torchvision_twin
from bigdet.config.heads import KeypointConfig, RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector
from bigdet.models.conventions import TORCHVISION, Conventions
from bigdet.models.detector import Detector
from bigdet.weights.torchvision_layout import from_torchvision, to_torchvision

SMALL = {"backbone": "resnet10", "width": 16, "fc_width": 32}
MODELS = {
    "faster_rcnn": ModelConfig(detector="faster_rcnn", **SMALL),
    "mask_rcnn gn": ModelConfig(detector="mask_rcnn", box_head="4conv1fc", norm="gn", **SMALL),
    "keypoint_rcnn": ModelConfig(
        detector="keypoint_rcnn", keypoint=KeypointConfig(num_keypoints=5, width=16), **SMALL
    ),
    "retinanet": ModelConfig(detector="retinanet", backbone="resnet10", width=16),
    "vgg16": ModelConfig(detector="faster_rcnn", backbone="vgg16", norm="none", fc_width=32),
}


def detector_of(config: ModelConfig, conventions: Conventions | None = None) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(config, 3, conventions)
    for tensor in detector.state_dict().values():
        tensor.uniform_(0.1, 1.0)  # so that nothing is alike
    return detector


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_as_they_were(name: str) -> None:
    detector = detector_of(MODELS[name])
    weights = detector.state_dict()
    there = to_torchvision(detector, weights)
    back = from_torchvision(detector, there, "test")
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_torchvisions_own_model_takes_the_weights(name: str) -> None:
    detector = detector_of(MODELS[name], TORCHVISION)
    twin = torchvision_twin(detector)  # loads them strictly
    theirs = twin.state_dict()
    assert {type(module).__module__.split(".")[0] for module in twin.modules()} <= {
        "torch",
        "torchvision",
    }
    back = from_torchvision(detector, theirs, "test")
    assert all(torch.equal(back[key], value) for key, value in detector.state_dict().items())


def test_tensors_that_do_not_fit_are_listed() -> None:
    detector = detector_of(MODELS["faster_rcnn"])
    state = to_torchvision(detector, detector.state_dict())
    state["roi_heads.mask_head.0.0.weight"] = state.pop("rpn.head.bbox_pred.bias")
    state["rpn.head.cls_logits.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"file\.pth: does not fit") as caught:
        from_torchvision(detector, state, "file.pth")
    message = str(caught.value)
    assert "1 missing (rpn.head.bbox_pred.bias)" in message
    assert "1 unexpected (roi_heads.mask_head.0.0.weight)" in message
    assert "rpn.head.cls_logits.bias: (5,) for (3,)" in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ModelConfig(detector="faster_rcnn", backbone="swin_t"), "no such backbone"),
        (ModelConfig(detector="cascade_rcnn", backbone="resnet10"), "no cascade"),
        (ModelConfig(detector="faster_rcnn", backbone="resnet10", norm="none"), "no biases"),
        (ModelConfig(detector="keypoint_rcnn", backbone="resnet10", norm="gn"), "keypoint head"),
        (ModelConfig(detector="faster_rcnn", backbone="resnet50", stride_in_1x1=True), "stride"),
    ],
)
def test_what_torchvision_does_not_have_is_an_error(config: ModelConfig, reason: str) -> None:
    with torch.device("meta"):
        detector = build_detector(config, 3)
    with pytest.raises(ValueError, match=reason):
        to_torchvision(detector, {})


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
def test_the_twin_detects_the_same_with_bigdets_own_conventions(kind: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        detector=kind, backbone="resnet10", width=16, **({} if kind == "retinanet" else HEADS)
    )
    detector = build_detector(config, 3).double().eval()
    if kind == "retinanet":
        torch.nn.init.constant_(detector.retina_head.classifier.bias, -2.5)
        torch.nn.init.normal_(detector.retina_head.classifier.weight, std=0.05)
    detector.eval_size = (96, 128)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((96, 128), (96, 110))
    ]
    twin = torchvision_twin(detector)
    # Masks as they are, not drawn at the size of the image.
    twin.transform.postprocess = lambda results, *_: results
    with torch.no_grad():
        found = detector.predict(images)
        expected = twin([image.double() / 255 for image in images])
    for one, other in zip(found, expected, strict=True):
        assert len(one.boxes) > 10
        torch.testing.assert_close(one.boxes, other["boxes"].float(), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(one.scores, other["scores"].float(), rtol=1e-6, atol=1e-6)
        shift = 0 if kind == "retinanet" else 1
        torch.testing.assert_close(one.labels, other["labels"] - shift)
        if kind == "mask_rcnn":
            masks = other["masks"][:, 0].float()
            torch.testing.assert_close(one.masks, masks, rtol=1e-5, atol=1e-5)


HEADS = {
    "fc_width": 32,
    "rpn": RpnConfig(anchor_sizes=[12, 24, 48, 96, 192], test_proposals=50),
    "roi": RoiConfig(score_threshold=0.01),
}


def test_weights_that_are_not_finite_are_refused_by_their_own_name() -> None:
    detector = detector_of(MODELS["faster_rcnn"])
    state = to_torchvision(detector, detector.state_dict())
    state["rpn.head.cls_logits.bias"] = torch.full_like(
        state["rpn.head.cls_logits.bias"], torch.nan
    )
    with pytest.raises(ValueError, match=r"a\.pth: .*not finite: rpn\.head\.cls_logits\.bias"):
        from_torchvision(detector, state, "a.pth")
