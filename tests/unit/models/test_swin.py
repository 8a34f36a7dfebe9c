"""Swin's attention in one kernel against timm's own, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor

from bigdet.models.backbones.build import build_backbone
from bigdet.models.backbones.swin import FusedAttention, shift_mask

IMAGES, ROWS, COLUMNS = 2, 14, 21  # 2 x 3 windows of 7 x 7


def gradients(
    attention: WindowAttention, x: Tensor, mask: Tensor | None, *, is_fused: bool
) -> dict[str, Tensor]:
    """Output and gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    found = attention.fused(x, mask) if is_fused else attention(x, mask)
    (found * torch.linspace(-1, 2, found.numel(), dtype=x.dtype).view_as(found)).sum().backward()
    assert x.grad is not None
    values = {name: p.grad for name, p in attention.named_parameters()}
    return {"output": found.detach(), "input": x.grad, **values}


@pytest.mark.parametrize("index", [0, 1])  # windows as they are, and shifted ones
def test_attention_in_one_kernel_is_timms(index: int) -> None:
    torch.manual_seed(index)
    stage = build_backbone("swin_t", "none", 0.0).layers[0].double()
    block, channels = stage.blocks[index], 96
    mask = None
    if block.shift_size != (0, 0):
        mask = shift_mask(block, torch.zeros(1, ROWS, COLUMNS, channels, dtype=torch.float64))
        assert len(mask) == 6
        assert mask.count_nonzero() > 0
    assert (mask is None) == (index == 0)
    with torch.no_grad():
        block.attn.relative_position_bias_table.normal_()
    x = torch.randn(IMAGES * 6, 49, channels, dtype=torch.float64)
    expected = gradients(copy.deepcopy(block.attn), x, mask, is_fused=False)
    found = gradients(block.attn, x, mask, is_fused=True)
    assert type(block.attn) is FusedAttention
    assert found["relative_position_bias_table"].abs().min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_attention_is_computed_by_timm() -> None:
    attention = build_backbone("swin_t", "none", 0.0).layers[0].blocks[0].attn
    x = torch.randn(3, 49, 96)
    assert torch.equal(attention(x), WindowAttention.forward(attention, x))
