import pickle
import re

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torchvision.models import _utils as torchvision_utils

from bigdet.config.model import ModelConfig
from bigdet.models.backbones.build import build_backbone
from bigdet.models.backbones.vit import ViT
from bigdet.models.build import build_detector
from bigdet.models.weights import load_parts
from bigdet.weights.backbone_names import rename
from bigdet.weights.pixel_order import warn_of_stride
from bigdet.weights.published_backbones import (
    _OWN,
    PUBLISHED,
    load_backbone_file,
    load_timm_backbone,
    timm_name,
)
from bigdet.weights.start import is_published_file

DEVIATION = torch.tensor([58.395, 57.12, 57.375])  # RGB


def make_detector(backbone, **options):
    torch.manual_seed(0)
    config = ModelConfig(detector="faster_rcnn", backbone=backbone, width=8, fc_width=8, **options)
    return build_detector(config, 2)


def randomized(model):
    """Give one-dimensional parameters and running statistics values that are seen if lost."""
    torch.manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.0)
    return model.double().eval()


def loaded(name, state):
    """Our backbone with a published state, which must fit to the last name."""
    backbone = build_backbone(name, "bn", 0.0).double().eval()
    tensors = rename(state, backbone)
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(re.match(r"(norm\d|pyramid)\.", key) for key in missing)
    for index in range(4):
        setattr(backbone, f"norm{index}", nn.Identity())
    return backbone


def assert_close(found, expected):
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_torchvisions_resnets_give_torchvisions_features(name):
    reference = randomized(getattr(torchvision.models, name)())
    stages = torchvision_utils.IntermediateLayerGetter(
        reference, {f"layer{number}": str(number) for number in range(1, 5)}
    )
    images = torch.randn(1, 3, 65, 96, dtype=torch.float64)
    with torch.no_grad():
        assert_close(loaded(name, reference.state_dict())(images), [*stages(images).values()])


@pytest.mark.parametrize(
    ("name", "theirs", "size"),
    [
        # C3 is 32x36 and C5 8x9: windows of 7 cut them, windows of 8 cut C5 in one direction.
        ("swin_t", "swin_t", (256, 288)),
        ("swinv2_t", "swin_v2_t", (288, 320)),
        ("convnext_t", "convnext_tiny", (64, 96)),
    ],
)
def test_torchvisions_other_backbones_give_torchvisions_features(name, theirs, size):
    reference = randomized(getattr(torchvision.models, theirs)())
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    x, expected = images, []
    with torch.no_grad():
        for index, layer in enumerate(reference.features):
            x = layer(x)
            if index % 2:
                expected.append(x if name == "convnext_t" else x.permute(0, 3, 1, 2))
        assert_close(loaded(name, reference.state_dict())(images), expected)


def test_torchvisions_vit_gives_torchvisions_blocks_and_positions_of_patches():
    reference = randomized(
        torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536, num_classes=3)
    )
    nn.init.normal_(reference.encoder.pos_embedding)
    backbone = loaded("vit_s", reference.state_dict())
    tokens = torch.randn(2, 5, 384, dtype=torch.float64)
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        for mine, theirs in zip(backbone.blocks, reference.encoder.layers, strict=True):
            torch.testing.assert_close(mine(tokens), theirs(tokens), rtol=1e-6, atol=1e-6)
        patches = reference.conv_proj(images).flatten(2).transpose(1, 2)
        expected = patches + reference.encoder.pos_embedding[:, 1:]  # the first is the class's
        torch.testing.assert_close(backbone.patch_embed(images).flatten(1, 2), expected)


def test_patches_of_14_pixels_become_16_as_in_timm():
    # MAE's ViT-H has 16 x 16 patches of 14 pixels; the positions of its class token go.
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
    published = randomized(VisionTransformer(img_size=224, patch_size=14, **sizes))
    nn.init.normal_(published.pos_embed)
    backbone = ViT(48, 4, 3, 0.0, relative_positions=True).double()
    tensors = rename(published.state_dict(), backbone)
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(_OWN.match(name) for name in missing)
    assert sum(".rel_pos_" in name for name in missing) == 2 * 4
    reference = VisionTransformer(img_size=224, patch_size=16, **sizes).double()
    reference.load_state_dict(checkpoint_filter_fn(published.state_dict(), reference))
    embedding = backbone.patch_embed
    torch.testing.assert_close(embedding.proj.weight, reference.patch_embed.proj.weight)
    torch.testing.assert_close(embedding.pos_embed, reference.pos_embed[:, 1:])


@pytest.mark.parametrize(
    ("name", "timm_model"),
    [
        ("resnet50", "resnet50"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("swinv2_t", "swinv2_tiny_window8_256"),
        ("convnext_t", "convnext_tiny"),
        ("vit_s", "deit_small_patch16_224"),
    ],
)
def test_a_timm_classifier_fits_the_backbone(name, timm_model, monkeypatch):
    classifier = timm.create_model(timm_model)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: classifier)
    detector = make_detector(name)
    before = {k: v.clone() for k, v in detector.backbone.state_dict().items()}
    (row,) = load_timm_backbone(detector, "timm", name)
    assert row.part == "backbone"
    own = detector.backbone.state_dict()
    for key, tensor in rename(classifier.state_dict(), detector.backbone).items():
        assert torch.equal(own.pop(key), tensor), key
    # Left are the layers that no classifier has, as they were.
    assert all(re.match(r"(norm\d|pyramid)\.", key) for key in own)
    assert bool(own) == (name != "resnet50")
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.items())


def write_swin_release(folder, state):
    """The original release: under "model", the patch merging at the end of each stage."""
    names = {
        key: re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        for key in state
        if not re.match(r"norm\d", key)
    }
    tensors = {names[key]: state[key] for key in names}
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    tensors |= {"norm.weight": torch.ones(768), "head.weight": torch.ones(1000, 768)}
    torch.save({"model": tensors}, folder / "swin.pth")
    return folder / "swin.pth"


def test_the_original_swin_release_loads(tmp_path):
    state = build_backbone("swin_t", "bn", 0.0).state_dict()
    detector = make_detector("swin_t")
    (row,) = load_backbone_file(detector, write_swin_release(tmp_path, state), None, None)
    assert (row.part, row.parameters) == ("backbone", 27_520_698)
    own = detector.backbone.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())


def write_detectron(folder, reference, *, scaled):
    """A torchvision ResNet in Detectron's names, as it takes BGR and folds batch normalization."""
    blobs = {"pred_w": torch.zeros(10, 2048), "conv1_w_momentum": torch.zeros(1)}
    for name, layer in reference.named_modules():
        name = re.sub(r"layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_", name)
        name = re.sub(r"_(conv|bn)(\d)", lambda m: f"_branch2{'abc'[int(m[2]) - 1]}", name)
        name = re.sub(r"_downsample\.\d", "_branch1", name)
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach()
            if name == "conv1":
                divisor = DEVIATION.view(1, 3, 1, 1) if scaled else 1
                weight = (weight / divisor).flip(1)
            blobs[f"{name}_w"] = weight
        elif isinstance(layer, nn.BatchNorm2d):
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            prefix = "res_conv1" if name == "bn1" else name
            blobs[f"{prefix}_bn_s"] = scale.detach()
            blobs[f"{prefix}_bn_b"] = (layer.bias - layer.running_mean * scale).detach()
    content = {"blobs": {key: value.numpy() for key, value in blobs.items()}, "cfg": "text"}
    (folder / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return folder / "R-50.pkl"


@pytest.mark.parametrize("pixels", ["bgr", "bgr_255"])
def test_detectrons_resnet_gives_the_features_it_gave_there(tmp_path, pixels, caplog):
    reference = randomized(torchvision.models.resnet50())
    path = write_detectron(tmp_path, reference, scaled=pixels == "bgr_255")
    assert {"res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} <= set(
        pickle.loads(path.read_bytes())["blobs"]
    )
    detector = make_detector("resnet50").double().eval()
    load_backbone_file(detector, path, ["backbone"], pixels)
    stages = torchvision_utils.IntermediateLayerGetter(
        reference, {f"layer{number}": str(number) for number in range(1, 5)}
    )
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(detector.backbone(images), [*stages(images).values()])
    assert ("stride in the 1x1" in caplog.text) == (pixels == "bgr_255")
    caplog.clear()
    warn_of_stride(make_detector("resnet50", norm="gn"), pixels, "R-50-GN.pkl")
    assert not caplog.text  # Detectron's own, with the stride in the 3x3 convolutions


def test_detectrons_group_norm_loads():
    backbone = build_backbone("resnet50", "gn", 0.0)
    state = {
        "conv1_w": torch.zeros(64, 3, 7, 7),
        "conv1_gn_s": torch.ones(64),
        "conv1_gn_b": torch.zeros(64),
        "res3_1_branch2b_gn_s": torch.ones(128),
    }
    assert set(rename(state, backbone)) == {
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "layer2.1.bn2.weight",
    }


def write_detectron2(folder, state):
    """What detectron2's tools/convert-torchvision-to-d2.py makes of a torchvision ResNet."""
    tensors = {}
    for key, tensor in state.items():
        name = key if "layer" in key else f"stem.{key}"
        for number in (1, 2, 3, 4):
            name = name.replace(f"layer{number}", f"res{number + 1}")
        for number in (1, 2, 3):
            name = name.replace(f"bn{number}", f"conv{number}.norm")
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        tensors[name] = tensor.numpy()
    content = {"model": tensors, "__author__": "torchvision", "matching_heuristics": True}
    (folder / "r18.pkl").write_bytes(pickle.dumps(content))
    return folder / "r18.pkl"


def test_detectron2s_resnet_loads_to_the_last_tensor(tmp_path):
    reference = randomized(torchvision.models.resnet18()).float()
    detector = make_detector("resnet18")
    expected = reference.state_dict()
    load_backbone_file(detector, write_detectron2(tmp_path, expected), None, "rgb")
    for key, tensor in detector.backbone.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_file_of_a_detector_gives_its_first_convolution_for_our_images(tmp_path):
    ours = randomized(torchvision.models.resnet18()).float().state_dict()
    theirs = pickle.loads(write_detectron2(tmp_path, ours).read_bytes())["model"]
    state = {f"backbone.bottom_up.{name}": torch.tensor(each) for name, each in theirs.items()}
    first = "backbone.bottom_up.stem.conv1.weight"
    # What gives on BGR, 0 to 255 minus the mean, what ours gives on normalized RGB.
    state[first] = (ours["conv1.weight"] / DEVIATION.view(1, 3, 1, 1)).flip(1).float()
    mean = torch.tensor([103.53, 116.28, 123.675])
    buffers = {"pixel_mean": mean.view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": {**state, **buffers}}, tmp_path / "says.pth")
    torch.save({"model": state}, tmp_path / "silent.pth")
    for name, pixels in (("says", None), ("says", "bgr_255"), ("silent", "bgr_255")):
        detector = make_detector("resnet18")
        load_backbone_file(detector, tmp_path / f"{name}.pth", ["backbone"], pixels)
        torch.testing.assert_close(detector.backbone.conv1.weight.detach(), ours["conv1.weight"])
    for name, pixels, said in (
        ("silent", None, r"does not say how .* Say it with start_from\.pixels"),
        ("says", "rgb", r"start_from\.pixels is rgb, but its .* are those of bgr_255"),
    ):
        with pytest.raises(ValueError, match=said):
            load_backbone_file(make_detector("resnet18"), tmp_path / f"{name}.pth", None, pixels)
    # mmdetection's names are torchvision's: RGB, unless it is stated.
    torch.save({f"backbone.{name}": each for name, each in ours.items()}, tmp_path / "mm.pth")
    for pixels, expected in ((None, ours["conv1.weight"]), ("bgr", ours["conv1.weight"].flip(1))):
        load_backbone_file(detector, tmp_path / "mm.pth", ["backbone"], pixels)
        assert torch.equal(detector.backbone.conv1.weight, expected)


def test_the_backbone_is_taken_out_of_a_detector():
    backbone = build_backbone("resnet18", "bn", 0.0)
    state = {f"module.backbone.{key}": value for key, value in backbone.state_dict().items()}
    state["module.neck.weight"] = torch.zeros(3)
    assert set(rename(state, backbone)) == set(backbone.state_dict())


def test_a_file_of_another_backbone_lists_what_does_not_fit(tmp_path):
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "r18.safetensors")
    detector = make_detector("resnet34")
    expected = (
        r"r18.safetensors: does not fit the model in backbone: 80 missing \(backbone.layer1.2.bn1"
        r".*; \.\.\.\).*Make model\.\*"
    )
    with pytest.raises(ValueError, match=expected):
        load_backbone_file(detector, tmp_path / "r18.safetensors", ["backbone"], None)


def test_a_safetensors_file_of_others_needs_the_part_written(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert is_published_file(tmp_path / "a.safetensors")
    assert not is_published_file(tmp_path)
    with pytest.raises(ValueError, match=r"parts: \[backbone\]"):
        load_backbone_file(make_detector("resnet10"), tmp_path / "a.safetensors", None, None)


def test_pixels_need_a_resnet(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"x": torch.zeros(2).numpy()}))
    with pytest.raises(ValueError, match="no first convolution"):
        load_backbone_file(make_detector("resnet10"), path, None, "bgr")


def test_batch_norm_weights_do_not_fit_a_backbone_with_group_norm():
    detector = make_detector("resnet18", norm="gn")
    state = rename(timm.create_model("resnet18").state_dict(), detector.backbone)
    tensors = {f"backbone.{key}": value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"40 unexpected \(backbone.bn1.running_mean; "):
        load_parts(detector, tensors, ["backbone"], "timm")


def test_every_published_name_is_one_of_timms():
    for backbone, name in PUBLISHED.items():
        assert timm_name("timm", backbone) == name
        assert timm_name(f"timm:{name}", "swin_t") == name


def test_a_backbone_without_published_weights_is_one_clear_error():
    with pytest.raises(ValueError, match=r"timm has no weights for model\.backbone resnet10, only"):
        timm_name("timm", "resnet10")


@pytest.mark.parametrize("name", ["resnet50.tv_in2k", "resnet5000", "resnet10t.none"])
def test_a_name_that_timm_has_not_is_one_clear_error(name):
    with pytest.raises(ValueError, match=rf"timm has no weights {name}\. Expected one of"):
        timm_name(f"timm:{name}", "resnet50")


def test_weights_for_other_pixels_are_refused(monkeypatch):
    classifier = timm.create_model("vit_small_patch16_224.augreg_in1k")  # mean and deviation 0.5
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: classifier)
    with pytest.raises(ValueError, match=r"was trained with pixel mean \(0\.5"):
        load_timm_backbone(
            make_detector("vit_s"), "timm:vit_small_patch16_224.augreg_in1k", "vit_s"
        )


def test_a_file_whose_config_names_other_pixels_is_refused(tmp_path):
    torch.save(build_backbone("resnet10", "bn", 0.0).state_dict(), tmp_path / "a.pth")
    cfg = tmp_path / "config.json"
    cfg.write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}')
    with pytest.raises(ValueError, match=r"a\.pth \(by the config\.json next .* mean \(0\.5"):
        load_backbone_file(make_detector("resnet10"), tmp_path / "a.pth", None, None)
    for text in ("{}", '{"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}'):
        cfg.write_text(text)
        load_backbone_file(make_detector("resnet10"), tmp_path / "a.pth", None, None)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(name, pretrained):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    expected = re.escape("could not download resnet50.tv_in1k (no connection)") + ".*HF_HOME"
    with pytest.raises(ValueError, match=expected):
        load_timm_backbone(make_detector("resnet50"), "timm", "resnet50")
