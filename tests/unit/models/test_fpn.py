import math

import pytest
import torch
from torch import nn

from bigdet.models.necks.fpn import FPN, RetinaFPN

RESNET, SWIN = [256, 512, 1024, 2048], [96, 192, 384, 768]


@pytest.mark.parametrize(
    ("channels", "norm", "expected"),
    # Lateral 1x1 and output 3x3 convolutions to 256 channels, with biases or GN's scale and shift.
    [(RESNET, "none", 3_344_384), (RESNET, "gn", 3_346_432), (SWIN, "none", 2_729_984)],
)
def test_parameter_count(channels, norm, expected):
    with torch.device("meta"):
        fpn = FPN(channels, 256, norm)
    assert sum(parameter.numel() for parameter in fpn.parameters()) == expected


def identity_fpn():
    """One channel, laterals and outputs that change nothing."""
    fpn = FPN([1, 1], 1, "none")
    for layer in fpn.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            middle = layer.kernel_size[0] // 2
            layer.weight.data[0, 0, middle, middle] = 1.0
    return fpn


def test_coarse_levels_are_added_to_fine_ones_by_nearest_upsampling():
    fine = torch.zeros(1, 1, 4, 4)
    fine[0, 0, 0, 0] = 10.0
    coarse = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    p2, p3, p4 = identity_fpn()([fine, coarse])
    assert p2[0, 0].tolist() == [
        [11.0, 1.0, 2.0, 2.0],
        [1.0, 1.0, 2.0, 2.0],
        [3.0, 3.0, 4.0, 4.0],
        [3.0, 3.0, 4.0, 4.0],
    ]
    assert p3[0, 0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert p4[0, 0].tolist() == [[1.0]]  # every second position of the coarsest level


def test_odd_sizes_are_halved_rounding_up():
    sizes = [(25, 33), (13, 17), (7, 9), (4, 5)]
    features = [torch.randn(2, c, *size) for c, size in zip([4, 8, 16, 32], sizes, strict=True)]
    pyramid = FPN([4, 8, 16, 32], 8, "gn")(features)
    assert [tuple(level.shape[-2:]) for level in pyramid] == [*sizes, (2, 3)]
    assert all(level.shape[:2] == (2, 8) for level in pyramid)


def test_weights_start_uniform_with_the_variance_of_detectrons_xavier():
    torch.manual_seed(0)
    for layer in FPN([64, 64], 128, "none").modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.in_channels * layer.kernel_size[0] ** 2
            assert layer.weight.abs().max().item() <= math.sqrt(3 / fan_in)
            assert layer.weight.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.03)
            assert not layer.bias.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
def test_gradients_of_retinas_coarse_levels_are_whole_on_a_map_of_one_row_or_column(size):
    """Torch left most of the weights' gradient unset in bf16."""
    torch.manual_seed(0)
    fpn = RetinaFPN([8, 8, 32], 32, "none", "c5")
    scales = ((8, 4), (8, 2), (32, 1))
    features = [torch.randn(2, c, scale * size[0], scale * size[1]) for c, scale in scales]
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        fpn.to(dtype).zero_grad()
        unset = [torch.full((32, 32, 3, 3), torch.nan, dtype=dtype) for _ in range(8)]
        del unset  # memory that is taken next
        levels = fpn([feature.to(dtype) for feature in features])
        assert [tuple(level.shape[2:]) for level in levels[-2:]] == [(1, 1), (1, 1)]
        sum(level.sum() for level in levels[-2:]).backward()
        gradients[dtype] = [layer.weight.grad.double().clone() for layer in (fpn.p6, fpn.p7)]
    for exact, rounded in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
        assert (exact[:, :, 1, 1] != 0).any()
        assert (exact == 0).sum() >= 32 * 32 * 6  # what meets the padding alone
        assert (rounded[exact == 0] == 0).all()
