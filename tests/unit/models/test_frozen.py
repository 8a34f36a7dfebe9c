"""A frozen backbone: bf16, no gradient, nothing in the state, and its file."""

import pytest
import torch
from torch import nn

from bigdet.models.backbones.build import build_backbone
from bigdet.models.backbones.timm_net import TimmPlain, TimmPyramid
from bigdet.models.frozen import (
    find_frozen,
    freeze_backbone,
    frozen_tensors,
    hash_of,
    read_frozen,
    write_frozen,
)

SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 4}
MADE = {
    "resnet10": lambda drop: build_backbone("resnet10", "bn", 0.0),
    "swin_t": lambda drop: build_backbone("swin_t", "none", drop),
    "regnety_002": lambda drop: TimmPyramid("regnety_002", drop_path=drop),
    "dinov3": lambda drop: TimmPlain(
        "vit_small_patch16_dinov3", drop_path=drop, final_norm=True, taps=[2, 4], **SMALL
    ),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Stands where a detector does: it has a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def made(name, drop=0.0):
    torch.manual_seed(0)
    return MADE[name](drop)


@pytest.mark.parametrize("name", MADE)
def test_features_are_those_of_autocast_with_weights_in_fp32(name):
    backbone, frozen = made(name).eval(), made(name)
    freeze_backbone(frozen)
    frozen.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = backbone(IMAGES)
        found = frozen(IMAGES)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.float(), theirs.float())


@pytest.mark.parametrize("name", MADE)
def test_what_is_frozen_is_in_no_state_and_its_matrices_are_in_bf16(name):
    backbone = made(name)
    before = {f"backbone.{n}": tensor for n, tensor in backbone.state_dict().items()}
    model = Model(backbone)
    freeze_backbone(backbone)
    frozen, left = frozen_tensors(model), model.state_dict()
    assert not set(frozen) & set(left)
    assert set(frozen) | set(left) == set(before)
    outside = ("norm0", "norm1", "norm2", "norm3", "pyramid", "input_")
    assert all(n.removeprefix("backbone.").startswith(outside) for n in left)
    assert all(parameter.requires_grad for parameter in model.parameters())
    matrices = [n for n in frozen if frozen[n].dtype == torch.bfloat16]
    numbers = sum(before[n].numel() for n in frozen)
    in_matrices = sum(before[n].numel() for n in matrices)
    assert in_matrices > 0.9 * numbers
    bytes_held = sum(each.numel() * each.element_size() for each in frozen.values())
    assert bytes_held == 4 * numbers - 2 * in_matrices
    for n in frozen:
        assert torch.equal(frozen[n], before[n].to(frozen[n].dtype)), n


@pytest.mark.parametrize("name", ["swin_t", "regnety_002", "dinov3"])
def test_in_training_nothing_of_it_is_random_and_nothing_is_kept_for_backward(name):
    backbone = made(name, drop=0.5)
    freeze_backbone(backbone)
    backbone.train()
    first, second = backbone(IMAGES), backbone(IMAGES)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    kept = []
    inner = backbone if name == "swin_t" else backbone.net
    options = {} if name == "swin_t" else {"indices": [1]}
    if name == "swin_t":  # but for its output norms
        for index in range(4):
            setattr(backbone, f"norm{index}", nn.Identity())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        features = inner(IMAGES, **options)
    assert not kept
    assert not any(feature.requires_grad for feature in features)
    assert all(feature.dtype == torch.float32 for feature in features)


def test_layers_behind_it_are_trained():
    backbone = made("dinov3")
    freeze_backbone(backbone)
    sum(feature.sum() for feature in backbone(IMAGES)).backward()
    names = [name for name, parameter in backbone.named_parameters()]
    assert names
    assert all(name.startswith("pyramid.") for name in names)
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_file_is_found_from_its_checkpoints_and_others_are_refused(tmp_path):
    model = Model(made("resnet10"))
    freeze_backbone(model.backbone)
    tensors = frozen_tensors(model)
    file = tmp_path / "frozen" / "train.safetensors"
    write_frozen(file, tensors)
    checkpoint = tmp_path / "checkpoints" / "train-10"
    for weights in (checkpoint, checkpoint / "model.safetensors", tmp_path / "model.safetensors"):
        assert find_frozen(weights, "train") == file
    read = read_frozen(file, hash_of(tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    name = next(iter(tensors))
    write_frozen(file, {**tensors, name: tensors[name] * 2})
    with pytest.raises(ValueError, match=r"train\.safetensors: its tensors have the hash \w{12}, "):
        read_frozen(file, hash_of(tensors))
    file.unlink()
    with pytest.raises(ValueError, match=r"train\.safetensors: not found, but it holds the frozen"):
        read_frozen(file, hash_of(tensors))
