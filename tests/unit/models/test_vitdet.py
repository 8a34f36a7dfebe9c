"""ViTDet against a plain implementation of detectron2's formulas, in double precision.

detectron2's are in ``modeling/backbone/vit.py``, ``modeling/backbone/utils.py`` and
``layers/batch_norm.py`` (LayerNorm). The one difference: it interpolates absolute positions without
antialiasing, timm and bigdet with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from bigdet.config.heads import RoiConfig
from bigdet.config.model import ModelConfig
from bigdet.config.rpn import RpnConfig
from bigdet.models.backbones.vit import ViT
from bigdet.models.build import build_detector
from bigdet.models.necks.fpn import SimplePyramid
from bigdet.models.norms import conv_norm, make_norm
from tests.unit.models.scenes import make_scene

DEPTH, WIDTH, HEADS = 8, 48, 3  # global blocks: 1, 3, 5, 7


def layer_norm(x: Tensor, weights: Mapping[str, Tensor], name: str, dim: int) -> Tensor:
    """Over one dimension, with eps 1e-6."""
    mean = x.mean(dim, keepdim=True)
    var = (x - mean).square().mean(dim, keepdim=True)
    shape = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
    scale, shift = weights[f"{name}.weight"].view(shape), weights[f"{name}.bias"].view(shape)
    return (x - mean) / torch.sqrt(var + 1e-6) * scale + shift


def table_of(weights: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """Relative positions of -(size - 1) to size - 1, linear in between, ends repeated."""
    table = weights[name]
    length, wanted = len(table), 2 * size - 1
    rows = []
    for place in range(wanted):
        at = min(max((place + 0.5) * length / wanted - 0.5, 0), length - 1)
        low = min(int(at), length - 2)
        rows.append(table[low] * (low + 1 - at) + table[low + 1] * (at - low))
    return torch.stack(rows)


def attention(x: Tensor, weights: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """All tokens of a map ``(h, w, C)`` attend to each other."""
    height, width, channels = x.shape
    size = channels // heads
    qkv = x.reshape(-1, channels) @ weights[f"{name}.qkv.weight"].T + weights[f"{name}.qkv.bias"]
    is_relative = f"{name}.rel_pos_h" in weights
    if is_relative:
        rows = table_of(weights, f"{name}.rel_pos_h", height)
        columns = table_of(weights, f"{name}.rel_pos_w", width)
        tokens = [(row, column) for row in range(height) for column in range(width)]
        down = torch.tensor([[a - c + height - 1 for c, _ in tokens] for a, _ in tokens])
        right = torch.tensor([[b - d + width - 1 for _, d in tokens] for _, b in tokens])
    outputs = []
    for head in range(heads):
        q, k, v = (
            qkv[:, part * channels + head * size : part * channels + (head + 1) * size]
            for part in range(3)
        )
        logits = q @ k.T / size**0.5
        if is_relative:
            logits = logits + (q @ rows.T).gather(1, down) + (q @ columns.T).gather(1, right)
        outputs.append(logits.softmax(dim=1) @ v)
    mixed = torch.cat(outputs, dim=1)
    out = mixed @ weights[f"{name}.proj.weight"].T + weights[f"{name}.proj.bias"]
    return out.view(height, width, channels)


def plain_vit(weights: Mapping[str, Tensor], image: Tensor, heads: int, depth: int) -> Tensor:
    """The last map ``(C, h, w)`` of one image ``(3, H, W)``."""
    proj = weights["patch_embed.proj.weight"]
    x = F.conv2d(image[None], proj, weights["patch_embed.proj.bias"], stride=16)[0].permute(1, 2, 0)
    height, width, channels = x.shape
    positions = weights["patch_embed.pos_embed"].view(1, 14, 14, channels).permute(0, 3, 1, 2)
    if (height, width) != (14, 14):
        positions = F.interpolate(positions, (height, width), mode="bicubic", antialias=True)
    x = x + positions[0].permute(1, 2, 0)
    for number in range(depth):
        name = f"blocks.{number}"
        y = layer_norm(x, weights, f"{name}.norm1", -1)
        if (number + 1) % (depth // 4) == 0:
            y = attention(y, weights, f"{name}.attn", heads)
        else:  # windows of 14 x 14, those at the lower and right edge filled up with zeros
            out = torch.zeros_like(y)
            for top in range(0, height, 14):
                for left in range(0, width, 14):
                    part = y[top : top + 14, left : left + 14]
                    window = y.new_zeros(14, 14, channels)
                    window[: part.shape[0], : part.shape[1]] = part
                    attended = attention(window, weights, f"{name}.attn", heads)
                    out[top : top + 14, left : left + 14] = attended[
                        : part.shape[0], : part.shape[1]
                    ]
            y = out
        x = x + y
        y = layer_norm(x, weights, f"{name}.norm2", -1)
        y = y @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + y @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]
    return x.permute(2, 0, 1)


def plain_pyramid(
    backbone: Mapping[str, Tensor], neck: Mapping[str, Tensor], x: Tensor
) -> list[Tensor]:
    """P2 to P6 of the last maps ``(B, C, h, w)``."""

    def double(x: Tensor, name: str) -> Tensor:
        weight, bias = backbone[f"{name}.weight"], backbone[f"{name}.bias"]
        return F.conv_transpose2d(x, weight, bias, stride=2)

    p2 = layer_norm(double(x, "pyramid.0.0"), backbone, "pyramid.0.1", 1)
    p2 = double(0.5 * p2 * (1 + torch.erf(p2 / 2**0.5)), "pyramid.0.3")
    levels = [p2, double(x, "pyramid.1"), x, F.max_pool2d(x, 2, 2)]
    for number, level in enumerate(levels):
        level = F.conv2d(level, neck[f"laterals.{number}.conv.weight"])
        level = layer_norm(level, neck, f"laterals.{number}.norm", 1)
        level = F.conv2d(level, neck[f"outputs.{number}.conv.weight"], padding=1)
        levels[number] = layer_norm(level, neck, f"outputs.{number}.norm", 1)
    return [*levels, levels[-1][..., ::2, ::2]]


def randomized(module: nn.Module) -> nn.Module:
    """Random values for what begins at 0 or 1, so that leaving it out would show."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or "pos" in name:
            nn.init.normal_(parameter, 0.5, 0.5)
    return module.double().eval()


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (256, 352)])  # one window; 16 x 22 tokens: four
def test_features_and_gradients_equal_a_plain_implementation(
    is_relative: bool, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    vit = randomized(ViT(WIDTH, DEPTH, HEADS, 0.1, is_relative))
    neck = randomized(SimplePyramid(vit.channels, 32, "ln"))
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = neck(vit(images))
    weights = dict(vit.named_parameters())
    maps = torch.stack([plain_vit(weights, image, HEADS, DEPTH) for image in images])
    expected = plain_pyramid(weights, dict(neck.named_parameters()), maps)
    assert len(found) == 5
    # timm interpolates positions in single precision.
    near = 1e-9 if size == (224, 224) else 1e-6
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)
    names = ["patch_embed.pos_embed", "blocks.0.attn.qkv.weight"]
    if is_relative:
        names += [f"blocks.{number}.attn.rel_pos_{axis}" for number in (0, 1) for axis in "hw"]
    wanted = [weights[name] for name in names]
    gradients = [
        torch.autograd.grad(sum(level.square().mean() for level in levels), wanted)
        for levels in (found, expected)
    ]
    for name, mine, theirs in zip(names, *gradients, strict=True):
        largest = float(theirs.abs().max())
        assert largest > 1e-6, name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=near * largest)


def test_relative_positions_equal_timms() -> None:
    torch.manual_seed(0)
    vit = randomized(ViT(WIDTH, DEPTH, HEADS, 0.0, True))
    reference = VisionTransformerSAM(
        img_size=1024, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, neck_chans=0,
        window_size=14, global_attn_indexes=(1, 3, 5, 7), use_rel_pos=True, use_abs_pos=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double().eval()  # fmt: skip
    reference.neck = nn.Identity()
    state = vit.state_dict()
    nn.init.zeros_(state.pop("patch_embed.pos_embed"))
    reference.load_state_dict({k: v for k, v in state.items() if not k.startswith("pyramid")})
    images = torch.randn(1, 3, 240, 272, dtype=torch.float64)
    vit.pyramid = nn.ModuleList([nn.Identity()] * 4)
    with torch.no_grad():
        expected = reference.forward_features(F.pad(images, (0, 16, 0, 16)))
        torch.testing.assert_close(vit(images)[2], expected[..., :15, :17], rtol=1e-9, atol=1e-9)


def test_global_attention_alone_equals_timms_vit() -> None:
    # 14 x 14 tokens are a single window: all attention is global there.
    torch.manual_seed(0)
    vit = randomized(ViT(WIDTH, DEPTH, HEADS, 0.0))
    reference = VisionTransformer(
        embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, class_token=False,
        global_pool="", final_norm=False,
    ).double().eval()  # fmt: skip
    state = vit.state_dict()
    state["pos_embed"] = state.pop("patch_embed.pos_embed")
    reference.load_state_dict({k: v for k, v in state.items() if not k.startswith("pyramid")})
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    vit.pyramid = nn.ModuleList([nn.Identity()] * 4)
    with torch.no_grad():
        expected = reference.forward_features(images).transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(vit(images)[2], expected, rtol=1e-9, atol=1e-9)


def test_relative_positions_begin_as_none() -> None:
    torch.manual_seed(0)
    with_them = ViT(WIDTH, DEPTH, HEADS, 0.0, True).eval()
    without = ViT(WIDTH, DEPTH, HEADS, 0.0).eval()
    left = with_them.load_state_dict(without.state_dict(), strict=False)
    assert len(left.missing_keys) == 2 * DEPTH
    assert all(".rel_pos_" in name for name in left.missing_keys)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(with_them(images), without(images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_layer_normalization_is_over_the_channels_of_each_position() -> None:
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3) * torch.tensor([1.0, 2, 10])
    # Mean 2 and deviation 1 at the first column: -1 and 1; the same at all scales.
    normalized = make_norm("ln", 2)(x)
    expected = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3)
    torch.testing.assert_close(normalized, expected)
    assert make_norm("ln", 2).eps == 1e-6
    layers = dict(conv_norm(2, 4, 3, "ln", relu=True).named_parameters())
    assert sorted(layers) == ["conv.weight", "norm.bias", "norm.weight"]


def test_levels_of_the_simple_pyramid_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    neck = SimplePyramid([4, 6, 8, 10], 16, "ln")
    features = [torch.randn(1, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4), (10, 2))]
    before = neck(features)
    features[3] = torch.randn(1, 10, 2, 2)
    for number, (mine, theirs) in enumerate(zip(neck(features), before, strict=True)):
        assert torch.equal(mine, theirs) == (number < 3)
    assert before[4].shape == (1, 16, 1, 1)


def test_a_canvas_padded_to_a_square_gives_what_a_square_canvas_gives() -> None:
    options = {"neck": "simple", "norm": "ln", "width": 16, "fc_width": 16}
    config = ModelConfig(detector="mask_rcnn", backbone="vit_ti", pad_to_square=True, **options)
    scene = make_scene([[(4, 8, 40, 50), (50, 10, 90, 44)]], [(60, 90)], (64, 96))
    square = replace(scene, images=F.pad(scene.images, (0, 0, 0, 32)))
    losses, found = [], []
    for model in (config, replace(config, pad_to_square=False)):
        torch.manual_seed(0)
        detector = build_detector(model, 3)
        batch = scene if model.pad_to_square else square
        losses.append(detector.train()(batch))
        found.append(detector.eval()(batch)[0])
        plain = detector.pixels(scene)
        assert plain.shape[-2:] == ((96, 96) if model.pad_to_square else (64, 96))
    assert losses[0] == losses[1]
    assert torch.equal(found[0].boxes, found[1].boxes)
    assert torch.equal(found[0].masks, found[1].masks)


def test_a_small_vitdet_learns_one_scene() -> None:
    config = ModelConfig(
        detector="mask_rcnn", backbone="tests.ranks.large_backbones:tiny_vit", neck="simple",
        norm="ln", box_head="4conv1fc", width=16, fc_width=32,
        rpn=RpnConfig(num_convs=2, anchor_sizes=[16, 24, 32, 48, 64], train_proposals=50),
        roi=RoiConfig(rois_per_image=32),
    )  # fmt: skip
    torch.manual_seed(0)
    detector = build_detector(config, 3).train()
    scene = make_scene([[(4, 8, 40, 50), (50, 10, 90, 44)]], [(60, 90)], (64, 96))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    totals = []
    for _ in range(25):
        total = sum(detector(scene).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.6 * totals[0]
    for name, parameter in detector.named_parameters():
        if ".rel_pos_" in name:
            assert parameter.any(), name  # they began at 0


SIZES = {"vit_b": (768, 12, 12), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 16)}


def detectron2_parameters(backbone: str, is_cascade: bool, is_relative: bool) -> int:
    """Count what detectron2's project has, 80 classes, from its code.

    ``vit.py``: ViT and SimpleFeaturePyramid; ``configs/common/models/mask_rcnn_vitdet.py`` and
    ``mask_rcnn_fpn.py``: heads; ``cascade_mask_rcnn_vitdet_b_100ep.py``: class-agnostic stages.
    """
    c, depth, heads = SIZES[backbone]
    patches = 16 * 16 * 3 * c + c
    positions = (14 * 14 + 1) * c  # with one of the class token, which its forward pass leaves out
    # Two norms, qkv and projection with biases, an MLP of 4 C.
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c)
    # 2 x 14 - 1 distances in windows, 2 x 64 - 1 in the four global blocks, in height and in width.
    distances = (depth - 4) * 2 * (2 * 14 - 1) + 4 * 2 * (2 * 64 - 1)
    relative = distances * (c // heads) if is_relative else 0

    def deconv(i: int, o: int) -> int:
        return 2 * 2 * i * o + o

    def conv(i: int, kernel: int) -> int:  # to 256 channels, with LN and without bias
        return kernel * kernel * i * 256 + 2 * 256

    resizing = deconv(c, c // 2) + 2 * (c // 2) + deconv(c // 2, c // 4) + deconv(c, c // 2)
    pyramid = sum(conv(i, 1) + conv(256, 3) for i in (c // 4, c // 2, c, c))
    rpn = 2 * (9 * 256 * 256 + 256) + (256 * 3 + 3) + (256 * 12 + 12)
    box_layers = 4 * conv(256, 3) + (256 * 49 * 1024 + 1024) + (1024 * 81 + 81)
    boxes = 3 * (box_layers + 1024 * 4 + 4) if is_cascade else box_layers + 1024 * 320 + 320
    masks = 4 * conv(256, 3) + deconv(256, 256) + (256 * 80 + 80)
    plain_vit = patches + positions + depth * block
    return plain_vit + relative + resizing + pyramid + rpn + boxes + masks


@pytest.mark.parametrize(
    ("backbone", "detector", "is_relative", "total"),
    [
        ("vit_b", "mask_rcnn", False, 110_803_120),
        ("vit_b", "mask_rcnn", True, 110_895_792),
        ("vit_b", "cascade_mask_rcnn", False, 141_068_318),
        ("vit_b", "cascade_mask_rcnn", True, 141_160_990),
        ("vit_l", "mask_rcnn", False, 330_550_512),
        ("vit_l", "mask_rcnn", True, 330_684_656),
        ("vit_l", "cascade_mask_rcnn", False, 360_815_710),
        ("vit_l", "cascade_mask_rcnn", True, 360_949_854),
        ("vit_h", "mask_rcnn", False, 661_001_520),
        ("vit_h", "mask_rcnn", True, 661_203_760),
        ("vit_h", "cascade_mask_rcnn", False, 691_266_718),
        ("vit_h", "cascade_mask_rcnn", True, 691_468_958),
    ],
)
def test_parameters_are_as_many_as_detectron2s(
    backbone: str, detector: str, is_relative: bool, total: int
) -> None:
    config = ModelConfig(
        detector=detector, backbone=backbone, neck="simple", norm="ln", box_head="4conv1fc",
        relative_positions=is_relative, rpn=RpnConfig(num_convs=2),
    )  # fmt: skip
    with torch.device("meta"):
        model = build_detector(config, 80)
    found = sum(parameter.numel() for parameter in model.parameters())
    class_token = SIZES[backbone][0]  # its position
    expected = detectron2_parameters(backbone, detector == "cascade_mask_rcnn", is_relative)
    assert found + class_token == expected == total
