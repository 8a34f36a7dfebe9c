"""A frozen backbone: bf16, no gradient, nothing in the state, and its file."""

from weakref import WeakSet, finalize

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigdet.models.backbones.build import build_backbone
from bigdet.models.backbones.timm_net import TimmPlain, TimmPyramid
from bigdet.models.frozen import (
    freeze_backbone,
    frozen_tensors,
    hash_of,
    open_frozen,
    write_frozen,
)
from bigdet.run_dir import RunDir

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
    originals = dict(model.state_dict())
    freeze_backbone(model.backbone)
    tensors, run_dir = frozen_tensors(model), RunDir(tmp_path)
    digest = write_frozen(run_dir, tensors, originals.__getitem__)
    assert digest == hash_of(tensors)  # rounded as in the model
    file = run_dir.frozen(digest)
    assert [file] == list((tmp_path / "frozen").iterdir())
    checkpoint = tmp_path / "checkpoints" / "train-10"
    for weights in (checkpoint, checkpoint / "model.safetensors", tmp_path / "model.safetensors"):
        found = open_frozen(weights, digest, "train")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    found = open_frozen(tmp_path, digest, "train")  # by a later phase, which starts from it
    assert write_frozen(run_dir, tensors, lambda name: found[name].float()) == digest
    assert [file] == list((tmp_path / "frozen").iterdir())
    earlier = file.with_name("train.safetensors")  # as earlier versions named it
    file.rename(earlier)
    assert open_frozen(checkpoint, digest, "train").path == earlier
    earlier.unlink()
    with pytest.raises(
        ValueError, match=r"train-10: its frozen backbone is not in it, and frozen/"
    ):
        open_frozen(checkpoint, digest, "train")
    name = next(iter(tensors))
    other = write_frozen(run_dir, tensors, {**tensors, name: tensors[name] * 2}.__getitem__)
    assert other != digest
    run_dir.frozen(other).rename(file)
    with pytest.raises(ValueError, match=rf"{file.name}: its tensors have the hash {other[:12]}, "):
        open_frozen(checkpoint, digest, "train")


class Largest(TorchDispatchMode):
    """Records the most bytes of tensors that were alive at once, besides those of a network."""

    def __init__(self, network):
        super().__init__()
        self.most = self.now = 0
        own = [*network.parameters(), *network.buffers()]
        self.seen = WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            finalize(storage, self.drop, storage.nbytes())

    def drop(self, num_bytes):
        self.now -= num_bytes


def test_no_more_memory_is_needed_for_more_blocks():
    needed = {}
    for depth in (2, 8):
        for is_frozen in (True, False):
            torch.manual_seed(0)
            options = {**SMALL, "depth": depth}
            backbone = TimmPlain("vit_small_patch16_dinov3", final_norm=True, **options)
            if is_frozen:
                freeze_backbone(backbone)
            with Largest(backbone) as largest:
                features = backbone.net(IMAGES, indices=[depth - 1], norm=True)
            assert features[0].requires_grad != is_frozen
            needed[depth, is_frozen] = largest.most
    assert needed[8, True] == needed[2, True]
    assert needed[8, False] > 2 * needed[2, False]  # the same network if it is trained
