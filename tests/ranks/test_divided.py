"""Matrices divided over ranks: a share on each, and the same results as with all of them."""

from pathlib import Path

import torch

from bigdet import distributed
from bigdet.engine.divided import DividedLayers
from bigdet.models.backbones.timm_net import TimmPlain, TimmPyramid
from bigdet.models.frozen import MATRIX_TYPE, freeze_backbone, frozen_layers, frozen_tensors
from tests.spawn import run_ranks

MADE = {
    "plain": lambda: TimmPlain(
        "vit_small_patch16_dinov3", taps=[2, 4], embed_dim=64, num_heads=2, depth=4
    ),
    # Both compute with weights of layers inside their attention, without calling these.
    "rotary": lambda: TimmPlain(
        "eva02_tiny_patch14_224", embed_dim=48, num_heads=3, depth=2, image_windows=2
    ),
    "shifted": lambda: TimmPyramid(
        "swinv2_tiny_window8_256", embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
    ),
    "convolutions": lambda: TimmPyramid("regnety_002"),
}


def compare(name: str) -> dict[str, int]:
    """Features of a frozen network, whole and divided; bytes of matrices and of shares."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.backbone = backbone = MADE[name]()
    freeze_backbone(backbone)
    images = torch.randn(1, 3, 64, 96)
    expected = backbone(images)
    divided = DividedLayers(frozen_layers(model))
    matrices = {n: each for n, each in frozen_tensors(model).items() if each.dtype == MATRIX_TYPE}
    for n, whole in matrices.items():
        owner, _, short = n.rpartition(".")
        module = model.get_submodule(owner)
        assert divided.has(module), n
        divided.divide(module, short, whole, whole.device)
    for _ in range(2):
        found = backbone(images)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    left = frozen_tensors(model)
    return {
        "matrices": sum(each.nbytes for each in matrices.values()),
        "shares": sum(share.untyped_storage().nbytes() for share in divided.shares),
        "at rest": sum(left[n].numel() for n in matrices),
        "padding": 2 * len(matrices),
    }


def compare_all() -> dict[str, dict[str, int]]:
    distributed.start()
    return {name: compare(name) for name in MADE}


def test_a_divided_network_computes_the_same_and_each_rank_has_half(tmp_path: Path) -> None:
    for own in run_ranks(compare_all, 2, tmp_path):
        for name, found in own.items():
            assert 0 <= found["shares"] - found["matrices"] / 2 <= found["padding"], name
            assert found["at rest"] == 0
