"""VGG-16's fc6 and fc7 in a box head compute what they compute in the classifier."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from bigdet.config.model import ModelConfig
from bigdet.models.backbones.vgg import VGG
from bigdet.models.build import build_detector
from bigdet.models.rcnn import RCNN
from bigdet.weights.published_backbones import load_backbone_file

WIDTH = 32


def make_detector(**changes: object) -> RCNN:
    settings = {"detector": "faster_rcnn", "backbone": "vgg16", "norm": "none", "fc_width": WIDTH}
    detector = build_detector(ModelConfig(**(settings | changes)), 3)
    assert isinstance(detector, RCNN)
    return detector


def make_classifier() -> dict[str, Tensor]:
    """VGG-16 by timm's names, with narrow fc6 and fc7."""
    return {
        **VGG().state_dict(),
        "pre_logits.fc1.weight": torch.randn(WIDTH, 512, 7, 7) / 150,
        "pre_logits.fc1.bias": torch.randn(WIDTH),
        "pre_logits.fc2.weight": torch.randn(WIDTH, WIDTH, 1, 1) / 6,
        "pre_logits.fc2.bias": torch.randn(WIDTH),
        "head.fc.weight": torch.randn(1000, WIDTH),
        "head.fc.bias": torch.randn(1000),
    }


def by_torchvisions_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {
        "pre_logits.fc1": "classifier.0",
        "pre_logits.fc2": "classifier.3",
        "head.fc": "classifier.6",
    }
    stems = {name: name.rpartition(".") for name in state}
    return {
        f"{new.get(stem, stem)}.{kind}": state[name].flatten(1)
        if stem in new and kind == "weight"
        else state[name]
        for name, (stem, _, kind) in stems.items()
    }


def load(detector: RCNN, state: dict[str, Tensor], tmp_path, parts: list[str]):
    file = tmp_path / "vgg.pth"
    torch.save(state, file)
    return load_backbone_file(detector, file, parts, None)


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_the_box_head_computes_fc6_and_fc7(layout, tmp_path):
    state, detector = make_classifier(), make_detector()
    named = state if layout == "timm" else by_torchvisions_names(state)
    rows = load(detector, named, tmp_path, ["backbone", "box_head"])
    assert [(row.part, row.tensors, row.parameters) for row in rows] == [
        ("backbone", 26, 14_714_688),
        ("box_head", 4, WIDTH * (512 * 49 + 1) + WIDTH * (WIDTH + 1)),
    ]
    pooled = torch.randn(5, 512, 7, 7)
    hidden = pooled
    for name in ("pre_logits.fc1", "pre_logits.fc2"):
        hidden = functional.relu(
            functional.conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"])
        )
    expected = detector.box_head.classifier(hidden.flatten(1))
    torch.testing.assert_close(detector.box_head(pooled)[0], expected)


def test_the_real_networks_have_these_layers():
    with torch.device("meta"):
        theirs = timm.create_model("vgg16").state_dict()
        named = by_torchvisions_names(theirs)
        published = torchvision.models.vgg16(weights=None).state_dict()
    assert {name: value.shape for name, value in named.items()} == {
        name: value.shape for name, value in published.items()
    }


def test_without_the_part_only_the_convolutions_are_loaded(tmp_path):
    detector = make_detector()
    before = {name: value.clone() for name, value in detector.box_head.state_dict().items()}
    (row,) = load(detector, make_classifier(), tmp_path, ["backbone"])
    assert row.part == "backbone"
    for name, value in detector.box_head.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_layers_are_refused(tmp_path):
    parts = ["backbone", "box_head"]
    with pytest.raises(ValueError, match=r"Set model\.box_head: 2fc and model\.fc_width: 32\."):
        load(make_detector(fc_width=48), make_classifier(), tmp_path, parts)
    convolutions = VGG().state_dict()
    with pytest.raises(ValueError, match=r"no fc6 and fc7 of VGG-16 in it\. Or leave box_head out"):
        load(make_detector(), dict(convolutions), tmp_path, parts)
