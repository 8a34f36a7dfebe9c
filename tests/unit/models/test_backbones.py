import re
from functools import partial

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from bigdet.models.backbones.build import build_backbone, freeze_stages
from bigdet.models.norms import BatchNorm2d, GroupNorm, batch_norms, set_norm_mode


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomized(backbone):
    """Give the one-dimensional parameters values, so that leaving one out would show."""
    for parameter in backbone.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    return backbone


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        # With scale and shift of the norms, without the classifier.
        ("resnet50", 23_508_032, [256, 512, 1024, 2048]),
        ("resnet101", 42_500_160, [256, 512, 1024, 2048]),
        ("resnext101_32x8d", 86_742_336, [256, 512, 1024, 2048]),
        ("resnext152_32x8d", 120_323_392, [256, 512, 1024, 2048]),
        ("swin_t", 27_517_818 + 2_880, [96, 192, 384, 768]),
        # Published totals of Mask R-CNN, less FPN 2,729,984, RPN 593,935, box 14,306,705, mask
        # 2,643,280; Swin-B's FPN has 1x1 convolutions of 1920 inputs, not 1440: 122,880 more.
        ("swin_s", 69_112_506 - 20_273_904, [96, 192, 384, 768]),
        ("swin_b", 107_141_800 - 20_273_904 - 122_880, [128, 256, 512, 1024]),
        # torchvision's counts, less their classifiers of C x 1000 + 1000.
        ("resnet18", 11_689_512 - 513_000, [64, 128, 256, 512]),
        ("resnet34", 21_797_672 - 513_000, [64, 128, 256, 512]),
        ("resnet152", 60_192_808 - 2_049_000, [256, 512, 1024, 2048]),
        ("resnext50_32x4d", 25_028_904 - 2_049_000, [256, 512, 1024, 2048]),
        # The published 44.18 million; of resnext50_32x8d nothing is published.
        ("resnext101_32x4d", 44_177_704 - 2_049_000, [256, 512, 1024, 2048]),
        # Less the final norm, with output norms of 2 x 15 C; of SwinV2 torchvision also has biases
        # of the keys: C x the blocks of each stage, of which only those of q and v count.
        ("swin_l", 196_532_476 - 1_537_000 - 3_072 + 5_760, [192, 384, 768, 1536]),
        ("swinv2_t", 28_351_570 - 769_000 - 1_536 + 2_880 - 4_416, [96, 192, 384, 768]),
        ("swinv2_s", 49_737_442 - 769_000 - 1_536 + 2_880 - 9_024, [96, 192, 384, 768]),
        ("swinv2_b", 87_930_848 - 1_025_000 - 2_048 + 3_840 - 12_032, [128, 256, 512, 1024]),
        ("convnext_t", 28_589_128 - 769_000 - 1_536 + 2_880, [96, 192, 384, 768]),
        ("convnext_s", 50_223_688 - 769_000 - 1_536 + 2_880, [96, 192, 384, 768]),
        ("convnext_b", 88_591_464 - 1_025_000 - 2_048 + 3_840, [128, 256, 512, 1024]),
        # Less final norm, class token and its position. The pyramid has transposed convolutions
        # C to C/2 twice (2 C^2 + C/2 numbers) and C/2 to C/4 (C^2 / 2 + C/4), and a norm of C.
        (
            "vit_s",
            22_050_664 - 385_000 - 768 - 768 + 2 * (2 * 384**2 + 192) + 384**2 // 2 + 96 + 384,
            [96, 192, 384, 384],
        ),
        (
            "vit_b",
            86_567_656 - 769_000 - 1_536 - 1_536 + 2 * (2 * 768**2 + 384) + 768**2 // 2 + 192 + 768,
            [192, 384, 768, 768],
        ),
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


FAMILIES = ["resnet10", "swin_t", "swinv2_t", "convnext_t", "vit_s"]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_have_the_strides_at_any_size(name):
    backbone = build_backbone(name, "bn", 0.0).eval()
    images = torch.randn(1, 3, 61, 99).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        features = backbone(images)
    # ceil(61 / stride), ceil(99 / stride)
    assert [tuple(f.shape[-2:]) for f in features] == [(16, 25), (8, 13), (4, 7), (2, 4)]
    assert [f.shape[1] for f in features] == backbone.channels
    if name not in ("convnext_t", "vit_s"):  # which cut what they padded
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)


def test_at_canvas_sizes_no_feature_is_cut_and_all_are_channels_last():
    images = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for name in ("convnext_t", "vit_s"):
        with torch.no_grad():
            features = build_backbone(name, "bn", 0.0).eval()(images)
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features), name


def without_output_norms(backbone):
    """Our backbone in double precision, without the norms that nobody else has."""
    backbone = randomized(backbone).double().eval()
    for index in range(4):
        setattr(backbone, f"norm{index}", nn.Identity())
    return backbone


@pytest.mark.parametrize(
    ("name", "timm_name", "size", "options"),
    [
        ("resnet18", "resnet18", (64, 96), {}),
        ("resnext50_32x8d", "resnext50_32x4d", (32, 64), {"base_width": 8}),
        ("convnext_t", "convnext_tiny", (32, 64), {}),
        # Sizes that windows of 8 divide, where timm need not pad.
        ("swinv2_t", "swinv2_tiny_window8_256", (256, 256), {"always_partition": True}),
    ],
)
def test_features_equal_timms_own(name, timm_name, size, options):
    torch.manual_seed(0)
    backbone = without_output_norms(build_backbone(name, "bn", 0.0))
    indices = {"out_indices": (1, 2, 3, 4)} if name.startswith("res") else {}
    reference = timm.create_model(timm_name, features_only=True, **indices, **options)
    state = {
        re.sub(r"^layers\.", "layers_" if "swin" in name else "stages_", key).replace(
            "stem.", "stem_"
        ): tensor
        for key, tensor in backbone.state_dict().items()
    }
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert not unexpected
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.double().eval()(images)
        if "swin" in name:
            expected = [feature.permute(0, 3, 1, 2) for feature in expected]
        for mine, theirs in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (320, 352)])
def test_vit_equals_timms_vitdet_with_interpolated_positions(size):
    torch.manual_seed(0)
    backbone = randomized(build_backbone("vit_s", "bn", 0.0)).double().eval()
    nn.init.normal_(backbone.patch_embed.pos_embed)
    reference = VisionTransformerSAM(
        img_size=224, embed_dim=384, num_heads=6, num_classes=0, neck_chans=0, window_size=14,
        global_attn_indexes=(2, 5, 8, 11), norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double().eval()  # fmt: skip
    reference.neck = nn.Identity()
    state = backbone.state_dict()
    state["pos_embed"] = state.pop("patch_embed.pos_embed").view(1, 14, 14, 384)
    reference.load_state_dict({k: v for k, v in state.items() if not k.startswith("pyramid")})
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    backbone.pyramid = nn.ModuleList([nn.Identity()] * 4)  # the last map, four times
    with torch.no_grad():
        expected = reference.forward_features(images)
        found = backbone(images)
    torch.testing.assert_close(found[2], expected, rtol=1e-6, atol=1e-6)


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


def test_resnet_with_group_norm_is_timms_with_relus_of_their_own():
    torch.manual_seed(0)
    backbone = randomized(build_backbone("resnet50", "gn", 0.0)).eval()
    # One after the stem's, two in each of 16 blocks; those after the sums stay.
    norms = [layer for layer in backbone.modules() if isinstance(layer, GroupNorm)]
    assert (len(norms), sum(norm.relu for norm in norms)) == (53, 33)
    assert sum(isinstance(layer, nn.ReLU) for layer in backbone.modules()) == 16
    reference = timm.create_model(
        "resnet50", norm_layer=lambda channels, **_: nn.GroupNorm(32, channels), features_only=True
    ).eval()
    reference.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for own, other in zip(backbone(images), reference(images)[1:], strict=True):
            torch.testing.assert_close(own, other)


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


def test_swin_output_norms_normalize_over_channels():
    backbone = build_backbone("swin_t", "bn", 0.0).eval()
    with torch.no_grad():
        for feature in backbone(torch.randn(1, 3, 64, 64)):
            # A LayerNorm at its start: mean 0, variance 1 at every position.
            torch.testing.assert_close(
                feature.mean(1), torch.zeros(feature.mean(1).shape), atol=1e-5, rtol=0
            )
            assert feature.var(1, unbiased=False).sub(1).abs().max() < 0.01


@pytest.mark.parametrize(
    ("name", "block_type", "layer", "num_blocks"),
    [
        ("swin_t", SwinTransformerBlock, "drop_path1", 12),
        ("swinv2_t", SwinTransformerV2Block, "drop_path2", 12),
        ("convnext_t", ConvNeXtBlock, "drop_path", 18),
        ("vit_s", Block, "drop_path1", 12),
    ],
)
def test_drop_path_grows_to_its_rate_and_follows_the_seed(name, block_type, layer, num_blocks):
    backbone = build_backbone(name, "bn", 0.2)
    randomized(backbone)  # ConvNeXt's scales start near 0, SwinV2's at 0
    rates = [
        getattr(getattr(block, layer), "drop_prob", 0.0)
        for block in backbone.modules()
        if isinstance(block, block_type)
    ]
    expected = [0.2 * index / (num_blocks - 1) for index in range(num_blocks)]
    assert rates == pytest.approx(expected, abs=1e-6)
    images = torch.randn(4, 3, 32, 32)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(backbone(images)[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_stages_is_undone_by_freezing_fewer(name):
    backbone = build_backbone(name, "bn", 0.0)
    for frozen in (2, 0, 5, 1):
        set_norm_mode(backbone, "live")
        freeze_stages(backbone, frozen)
        for index, modules in enumerate(backbone.stages):
            flags = {p.requires_grad for module in modules for p in module.parameters()}
            assert flags == {index >= frozen}
        outside = ("norm", "pyramid")
        assert all(p.requires_grad for n, p in backbone.named_parameters() if n.startswith(outside))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_but_those_of_the_outputs_is_in_one_stage(name):
    backbone = build_backbone(name, "bn", 0.0)
    staged = [p for modules in backbone.stages for module in modules for p in module.parameters()]
    inner = [p for n, p in backbone.named_parameters() if not n.startswith(("norm", "pyramid"))]
    assert len(backbone.stages) == 5
    assert sorted(map(id, staged)) == sorted(map(id, inner))


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
