import re
from typing import get_args

import pytest
import timm
import torch
from torch import nn
from torchvision.models import swin_t as torchvision_swin_t

from bigdet.config import schema
from bigdet.models.backbones import BACKBONES, build_backbone, freeze_stages
from bigdet.models.norms import BatchNorm2d, batch_norms, set_norm_mode


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomized(backbone):
    """Give the one-dimensional parameters values, so that leaving one out would show."""
    for parameter in backbone.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    return backbone


def test_every_backbone_of_the_schema_is_in_the_table():
    assert set(BACKBONES) == set(get_args(schema.Backbone))


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        # RECIPES.md, E.1
        ("resnet50", 23_508_032, [256, 512, 1024, 2048]),
        ("resnet101", 42_500_160, [256, 512, 1024, 2048]),
        ("resnext101_32x8d", 86_742_336, [256, 512, 1024, 2048]),
        ("resnext152_32x8d", 120_323_392, [256, 512, 1024, 2048]),
        ("swin_t", 27_517_818 + 2_880, [96, 192, 384, 768]),
        # Totals of Mask R-CNN there, less FPN 2,729,984, RPN 593,935, box 14,306,705, mask
        # 2,643,280; Swin-B's FPN has 1x1 convolutions of 1920 inputs, not 1440: 122,880 more.
        ("swin_s", 69_112_506 - 20_273_904, [96, 192, 384, 768]),
        ("swin_b", 107_141_800 - 20_273_904 - 122_880, [128, 256, 512, 1024]),
        # torchvision's count, 11,689,512, less its classifier of 512 x 1000 + 1000.
        ("resnet18", 11_689_512 - 513_000, [64, 128, 256, 512]),
    ],
)
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_parameter_count_and_channels(name, parameters, channels, norm):
    with torch.device("meta"):
        backbone = build_backbone(name, norm, 0.0)
    assert num_parameters(backbone) == parameters
    assert backbone.channels == channels
    assert backbone.strides == [4, 8, 16, 32]


def test_norms_of_resnet50_number_53():
    with torch.device("meta"):
        norms = batch_norms(build_backbone("resnet50", "bn", 0.0))
    assert len(norms) == 53
    assert sum(2 * len(norm.weight) for norm in norms) == 53_120


@pytest.mark.parametrize("name", ["resnet10", "swin_t"])
def test_features_have_the_strides_at_any_size(name):
    backbone = build_backbone(name, "bn", 0.0).eval()
    images = torch.randn(1, 3, 61, 99).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        features = backbone(images)
    # ceil(61 / stride), ceil(99 / stride)
    assert [tuple(f.shape[-2:]) for f in features] == [(16, 25), (8, 13), (4, 7), (2, 4)]
    assert [f.shape[1] for f in features] == backbone.channels
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def test_resnet_features_equal_timms_own():
    torch.manual_seed(0)
    backbone = randomized(build_backbone("resnet18", "bn", 0.0)).eval()
    reference = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    reference.load_state_dict(backbone.state_dict(), strict=False)  # it counts batches
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(backbone(images), reference(images), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_resnet_strides_in_the_3x3_convolution():
    backbone = build_backbone("resnet50", "bn", 0.0)
    block = backbone.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_resnet_starts_with_msra_weights_and_unit_norms():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", "gn", 0.0)
    weight = backbone.layer3[1].conv2.weight
    # Deviation sqrt(2 / (256 x 9)) = 0.0295; 589,824 draws give it to 0.1%.
    assert weight.std().item() == pytest.approx(0.02946, rel=0.01)
    for layer in backbone.modules():
        if isinstance(layer, nn.GroupNorm):  # the last one of each block too
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_without_norm_every_convolution_has_a_bias():
    backbone = build_backbone("resnet10", "none", 0.0)
    convolutions = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 2 + 3
    assert all(conv.bias is not None and not conv.bias.any() for conv in convolutions)
    assert not any(isinstance(m, (BatchNorm2d, nn.GroupNorm)) for m in backbone.modules())


def swin_stage_outputs(backbone, images):
    """The features before the output norms, which nobody else has."""
    for index in range(4):
        setattr(backbone, f"norm{index}", nn.Identity())
    with torch.no_grad():
        return backbone(images)


@pytest.mark.parametrize("built_at", [224, 448])
def test_swin_features_at_224_equal_timms_own_wherever_that_was_built(built_at):
    torch.manual_seed(0)
    backbone = randomized(build_backbone("swin_t", "bn", 0.0)).eval()
    reference = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=built_at,
        strict_img_size=False,
        always_partition=True,
        features_only=True,
    ).eval()
    state = {re.sub(r"^layers\.", "layers_", k): v for k, v in backbone.state_dict().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not missing
    assert all(name.startswith("norm") for name in unexpected)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = [feature.permute(0, 3, 1, 2) for feature in reference(images)]
    for mine, theirs in zip(swin_stage_outputs(backbone, images), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_swin_features_equal_torchvisions_at_sizes_that_windows_do_not_divide():
    torch.manual_seed(0)
    backbone = randomized(build_backbone("swin_t", "bn", 0.0)).eval()
    reference = torchvision_swin_t().eval()
    state = {}
    for name, tensor in backbone.state_dict().items():
        name = re.sub(r"^patch_embed\.proj", "features.0.0", name)
        name = re.sub(r"^patch_embed\.norm", "features.0.2", name)
        name = re.sub(r"^layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", name)
        state[name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")] = tensor
    reference.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 256, 288)  # C5 is 8x9: two windows of 7 in each direction
    x, expected = images, []
    with torch.no_grad():
        for index, layer in enumerate(reference.features):
            x = layer(x)
            if index % 2:
                expected.append(x.permute(0, 3, 1, 2))
    for mine, theirs in zip(swin_stage_outputs(backbone, images), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_swin_output_norms_normalize_over_channels():
    backbone = build_backbone("swin_t", "bn", 0.0).eval()
    with torch.no_grad():
        for feature in backbone(torch.randn(1, 3, 64, 64)):
            # A LayerNorm at its start: mean 0, variance 1 at every position.
            torch.testing.assert_close(
                feature.mean(1), torch.zeros(feature.mean(1).shape), atol=1e-5, rtol=0
            )
            assert feature.var(1, unbiased=False).sub(1).abs().max() < 0.01


def test_drop_path_grows_to_its_rate_and_follows_the_seed():
    backbone = build_backbone("swin_t", "bn", 0.2)
    rates = [
        getattr(block.drop_path1, "drop_prob", 0.0)
        for stage in backbone.layers
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0.2 * index / 11 for index in range(12)], abs=1e-6)
    images = torch.randn(4, 3, 32, 32)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(backbone(images)[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["resnet10", "swin_t"])
def test_freezing_stages_is_undone_by_freezing_fewer(name):
    backbone = build_backbone(name, "bn", 0.0)
    for frozen in (2, 0, 5, 1):
        set_norm_mode(backbone, "live")
        freeze_stages(backbone, frozen)
        for index, modules in enumerate(backbone.stages):
            flags = {p.requires_grad for module in modules for p in module.parameters()}
            assert flags == {index >= frozen}
        assert all(p.requires_grad for n, p in backbone.named_parameters() if n.startswith("norm"))


def test_every_parameter_of_a_resnet_is_in_one_stage():
    backbone = build_backbone("resnet10", "bn", 0.0)
    staged = [p for modules in backbone.stages for module in modules for p in module.parameters()]
    assert {id(p) for p in staged} == {id(p) for p in backbone.parameters()}
    assert len(staged) == len(list(backbone.parameters()))


def test_norms_in_frozen_stages_are_fixed_and_others_keep_their_mode():
    backbone = build_backbone("resnet10", "bn", 0.0)
    set_norm_mode(backbone, "affine")
    freeze_stages(backbone, 2)
    stem_and_stage1 = [backbone.bn1, *batch_norms(backbone.layer1)]
    assert {norm.mode for norm in stem_and_stage1} == {"fixed"}
    assert not any(p.requires_grad for norm in stem_and_stage1 for p in norm.parameters())
    rest = [norm for norm in batch_norms(backbone) if norm not in stem_and_stage1]
    assert {norm.mode for norm in rest} == {"affine"}
    assert all(p.requires_grad for norm in rest for p in norm.parameters())
