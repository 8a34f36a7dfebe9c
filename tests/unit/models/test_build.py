from __future__ import annotations

from typing import get_args

import pytest
import torch

from bigdet.config import model as model_options
from bigdet.config.families import DETECTORS
from bigdet.config.model import ModelConfig, model_parts
from bigdet.config.rpn import RpnConfig
from bigdet.models.build import build_detector, head_norm
from bigdet.models.heads.box import NUM_LAYERS

PUBLISHED = [  # of 80 classes; detectron2's tests have them less the 53,120 of fixed BN
    ("faster_rcnn", "resnet50", "bn", "2fc", 41_753_056),
    ("mask_rcnn", "resnet50", "bn", "2fc", 44_396_336),
    ("mask_rcnn", "resnet101", "bn", "2fc", 63_388_464),
    ("mask_rcnn", "resnext101_32x8d", "bn", "2fc", 107_630_640),
    ("mask_rcnn", "resnext152_32x8d", "bn", "2fc", 141_211_696),
    ("mask_rcnn", "resnet50", "gn", "4conv1fc", 45_711_152),
    ("mask_rcnn", "resnet101", "gn", "4conv1fc", 64_703_280),
    ("mask_rcnn", "resnext152_32x8d", "gn", "4conv1fc", 142_526_512),
    ("mask_rcnn", "resnet50", "bn", "4conv1fc", 45_707_056),
    ("mask_rcnn", "swin_t", "none", "2fc", 47_794_602),
    ("mask_rcnn", "swin_s", "none", "2fc", 69_112_506),
    ("mask_rcnn", "swin_b", "none", "2fc", 107_141_800),
    ("mask_rcnn", "swin_t", "none", "4conv1fc", 49_105_322),
    ("cascade_mask_rcnn", "resnet50", "bn", "2fc", 72_038_046),
    ("cascade_mask_rcnn", "resnext152_32x8d", "gn", "4conv1fc", 172_791_710),
]


@pytest.mark.parametrize(("detector", "backbone", "norm", "box_head", "expected"), PUBLISHED)
def test_parameters_are_as_many_as_published(
    detector: str,
    backbone: str,
    norm: model_options.Norm,
    box_head: model_options.BoxHead,
    expected: int,
) -> None:
    config = ModelConfig(detector=detector, backbone=backbone, norm=norm, box_head=box_head)
    with torch.device("meta"):
        model = build_detector(config, 80)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_parts_have_the_published_sizes() -> None:
    config = ModelConfig(detector="mask_rcnn", backbone="resnet50", norm="gn", box_head="4conv1fc")
    with torch.device("meta"):
        model = build_detector(config, 80)
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in model.named_children()
    }
    assert sizes == {
        "backbone": 23_508_032,
        "fpn": 3_346_432,
        "rpn": 593_935,
        "box_head": 15_618_449,
        "mask_head": 2_644_304,
    }
    assert list(sizes) == model_parts(config)


def test_a_keypoint_rcnn_has_the_published_size() -> None:
    config = ModelConfig(detector="keypoint_rcnn", backbone="resnet50")
    with torch.device("meta"):
        model = build_detector(config, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 59_186_278
    head = sum(parameter.numel() for parameter in model.keypoint_head.parameters())
    assert head == 17_838_097


def test_choices_of_the_schema_are_the_ones_that_can_be_built() -> None:
    assert set(NUM_LAYERS) == set(get_args(model_options.BoxHead))


def test_a_retinanet_has_the_published_sizes() -> None:
    config = ModelConfig(detector="retinanet", backbone="resnet50")
    with torch.device("meta"):
        model = build_detector(config, 80)
    assert [name for name, _ in model.named_children()] == model_parts(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_968_692
    pyramid = sum(p.numel() for part in (model.backbone, model.fpn) for p in part.parameters())
    assert pyramid - 53_120 == 31_452_352  # of all but the scales and shifts of BN


def test_a_faster_rcnn_on_vgg_has_the_published_sizes() -> None:
    config = ModelConfig(
        detector="faster_rcnn",
        backbone="vgg16",
        norm="none",
        fc_width=4096,
        rpn=RpnConfig(anchor_sizes=[64, 128, 256, 512]),
    )
    with torch.device("meta"):
        model = build_detector(config, 80)
    assert [name for name, _ in model.named_children()] == model_parts(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 138_294_029
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == 14_714_688
    assert sum(parameter.numel() for parameter in model.box_head.fcs.parameters()) == 119_545_856


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_has_the_parts_of_its_row(name: str) -> None:
    config = ModelConfig(detector=name, backbone="resnet10", width=16, fc_width=32)
    with torch.device("meta"):
        model = build_detector(config, 2)
    assert [part for part, _ in model.named_children()] == list(DETECTORS[name].parts)


@pytest.mark.parametrize(
    ("norm", "scope", "expected"),
    [
        ("bn", None, "none"),
        ("gn", None, "gn"),
        ("bn", "all", "bn"),
        ("gn", "backbone", "none"),
        ("none", None, "none"),
    ],
)
def test_heads_are_normalized_by_scope(
    norm: model_options.Norm, scope: model_options.NormScope | None, expected: str
) -> None:
    config = ModelConfig(detector="mask_rcnn", backbone="resnet50", norm=norm, norm_scope=scope)
    assert head_norm(config) == expected


def test_the_same_generator_state_gives_the_same_weights() -> None:
    config = ModelConfig(detector="mask_rcnn", backbone="resnet10", width=16, fc_width=32)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_detector(config, 3).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
