"""One small member of every family of timm's networks as a backbone, with random weights."""

import re

import pytest
import timm
import torch
from torch import nn

from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.backbone_base import STRIDES
from bigdet.models.backbones.build import freeze_stages
from bigdet.models.backbones.timm_net import TimmPlain, TimmPyramid
from bigdet.models.norms import batch_norms, set_norm_mode

SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
ALL_SHIFTS = {"strict_img_size": False, "always_partition": True}
"""Without these timm's Swin does not shift where a map is one window."""
SMALL_HIERA = {"embed_dim": 24, "stages": (1, 1, 2, 1)}
PYRAMIDS = {
    "resnet18d": {},
    "resnetrs50": {"layers": (1, 1, 1, 1)},
    "regnety_002": {},
    "efficientnet_lite0": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "swinv2_tiny_window8_256": SMALL_SWIN,
    "hiera_tiny_224": SMALL_HIERA,
    "hiera_small_abswin_256": SMALL_HIERA,
    "maxvit_pico_rw_256": {},
    "mvitv2_tiny": {},
    "tiny_vit_5m_224": {},
}
SMALL_VIT = {"embed_dim": 64, "num_heads": 2, "depth": 6}
PLAIN = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
)
FAMILIES = [*PYRAMIDS, *PLAIN]
SIZES = ((61, 99), (70, 33))


def build(name, **options):
    """Build the small member of a family, the same for each call."""
    torch.manual_seed(0)
    if name in PLAIN:
        return TimmPlain(name, drop_path=0.0, **SMALL_VIT, **options)
    return TimmPyramid(name, drop_path=0.0, **PYRAMIDS[name], **options)


def total(features):
    return sum(feature.square().mean() for feature in features)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_have_the_strides_at_any_size_and_reach_every_parameter(name):
    backbone = build(name)
    for height, width in SIZES:
        features = backbone(torch.randn(1, 3, height, width))
        expected = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
        assert [tuple(each.shape[-2:]) for each in features] == expected
        assert [each.shape[1] for each in features] == backbone.channels
        backbone.zero_grad()
        total(features).backward()
        unreached = [n for n, p in backbone.named_parameters() if p.grad is None]
        assert not unreached


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_are_what_each_feature_adds_to_the_one_before(name):
    """C2 follows from the stem and the first stage alone, C3 from the second too, and so on."""
    backbone = build(name)
    staged = [[p for module in stage for p in module.parameters()] for stage in backbone.stages]
    staged[0] += backbone.stem_parameters
    inner = list(backbone.net.parameters())
    assert len(staged) == 5
    assert sorted(id(p) for stage in staged for p in stage) == sorted(map(id, inner))
    if name in PLAIN:
        assert [len(stage) for stage in backbone.stages[1:]] == [1, 2, 1, 2]  # of six blocks
        return
    features = backbone(torch.randn(1, 3, *SIZES[0]))
    for index, feature in enumerate(features):
        reached = torch.autograd.grad(feature.sum(), inner, allow_unused=True, retain_graph=True)
        found = {id(p) for p, grad in zip(inner, reached, strict=True) if grad is not None}
        assert found == {id(p) for stage in staged[: index + 2] for p in stage}


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_stages_is_undone_by_freezing_fewer(name):
    backbone = build(name)
    for frozen in (2, 5, 0, 1):
        set_norm_mode(backbone, "live")
        freeze_stages(backbone, frozen)
        for index, modules in enumerate(backbone.stages):
            flags = {p.requires_grad for module in modules for p in module.parameters()}
            assert flags <= {index >= frozen}
            norms = [norm for module in modules for norm in batch_norms(module)]
            assert {norm.mode for norm in norms} <= {"fixed" if index < frozen else "live"}
        assert {p.requires_grad for p in backbone.stem_parameters} <= {frozen == 0}
        assert all(p.requires_grad for n, p in backbone.named_parameters() if n[:4] != "net.")


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(name):
    backbone = build(name).double()
    images = torch.randn(1, 3, 61, 99, dtype=torch.float64)
    weights = {parameter.data_ptr() for parameter in backbone.parameters()}
    kept, gradients = [], []
    for _ in range(2):
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        backbone.zero_grad()
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = total(backbone(images))
        loss.backward()
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
        enable_checkpointing(backbone)
    assert kept[1] < 0.7 * kept[0]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)


def native_options(name):
    """Options of timm's with which its own network is the same: patches of 16 pixels."""
    if name not in PLAIN:
        return {**PYRAMIDS[name], **(ALL_SHIFTS if name.startswith("swin") else {})}
    with torch.device("meta"):
        grid = timm.create_model(name).patch_embed.grid_size
    return {**SMALL_VIT, "patch_size": 16, "img_size": tuple(16 * count for count in grid)}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_timms_own_at_the_size_it_was_built_for(name):
    options = {"token_window": None} if name in PLAIN else {}
    backbone = build(name, **options).double().eval()
    for parameter in backbone.parameters():  # scales that start near 0 would hide differences
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    reference = timm.create_model(name, num_classes=0, **native_options(name)).double().eval()
    state = {
        key.removeprefix("net."): value
        for key, value in backbone.state_dict().items()
        if key.startswith("net.")
    }
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    unused = r"(norm|fc_norm|head\w*|conv_head|bn2|attn_pool)\.|.*num_batches_tracked"
    assert all(re.match(unused, name) for name in missing)
    size = timm.data.resolve_data_config({}, model=reference)["input_size"][1:]
    if name in PLAIN:
        size = reference.patch_embed.img_size
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward_intermediates(
            images, indices=backbone._indices, intermediates_only=True
        )
        if name in PLAIN:
            found = [backbone.features(images)]
        else:
            found = backbone.net(images, indices=backbone._indices)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
