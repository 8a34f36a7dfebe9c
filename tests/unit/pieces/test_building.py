"""Modules without memory, and with parameters in a file, against modules as they are usually."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigdet.config.model import ModelConfig
from bigdet.models.build import build_detector
from bigdet.pieces import building
from bigdet.pieces.building import materialize, parameters_in_file, parameters_on_meta

BACKBONES = {
    "resnet10": {}, "vgg16": {"norm": "none", "width": 512}, "swin_t": {}, "swinv2_t": {},
    "vit_s": {}, "timm:vit_tiny_patch16_224": {},
}  # fmt: skip


def build(backbone: str) -> nn.Module:
    torch.manual_seed(7)
    options: dict[str, Any] = {"detector": "mask_rcnn", "width": 16, "fc_width": 16}
    return build_detector(ModelConfig(backbone=backbone, **(options | BACKBONES[backbone])), 3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_random_weights_in_a_file_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    monkeypatch.setattr(building, "RESIDENT_BYTES", 1 << 16)  # let go of again and again
    expected = build(backbone)
    after = torch.rand(3)
    with parameters_in_file(tmp_path / "parameters"):
        found = build(backbone)
    assert torch.equal(torch.rand(3), after)  # as many random numbers were drawn
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    trained = [parameter.requires_grad for parameter in found.parameters()]
    assert trained == [parameter.requires_grad for parameter in expected.parameters()]
    numbers = sum(parameter.nbytes for parameter in found.parameters())
    assert (tmp_path / "parameters").stat().st_size >= numbers


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_memory_all_but_the_numbers_is_the_same(backbone: str) -> None:
    expected = build(backbone)
    with parameters_on_meta():
        found = build(backbone)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert [(name, p.shape, p.requires_grad) for name, p in found.named_parameters()] == [
        (name, p.shape, p.requires_grad) for name, p in expected.named_parameters()
    ]
    torch.testing.assert_close(
        dict(found.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0
    )
    materialize(found, lambda value: torch.full(value.shape, 2.0))
    assert all((parameter == 2).all() for parameter in found.parameters())
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # outside of the block


def test_shared_parameters_stay_shared_and_keep_what_was_noted_on_them(tmp_path: Path) -> None:
    with parameters_on_meta():
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
        module[0].weight.note = "no decay"
    materialize(module, lambda value: torch.zeros(value.shape))
    with parameters_in_file(tmp_path / "parameters"):
        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
    assert tied[1].weight is tied[0].weight
    assert module[1].weight is module[0].weight
    assert module[0].weight.note == "no decay"
    assert len(list(module.parameters())) == 3
