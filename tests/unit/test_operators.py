"""Which operators of a training step count as convolutions and matrix products."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bigdet.benchmarks.operators import is_product


def test_products_are_convolutions_matrix_products_and_attention_in_both_directions():
    images = torch.randn(1, 3, 8, 8)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten())
    last = nn.Linear(288, 4)
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        last(layers(images)).sum().backward()
        (query @ query.mT).sum().backward()
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    names = {one.key for one in profiled.key_averages()}
    found = {name for name in names if is_product(name)}
    assert {"aten::convolution_backward", "aten::addmm", "aten::mm", "aten::bmm"} <= found
    assert {name for name in found if "attention" in name and "backward" in name}
    others = names - found
    assert {"aten::native_group_norm", "aten::native_group_norm_backward"} <= others
    assert {"aten::threshold_backward", "aten::sum", "aten::copy_"} <= others
    assert not is_product("aten::upsample_bilinear2d")
