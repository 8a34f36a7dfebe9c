"""torchvision's detector with our settings, under autocast."""

from __future__ import annotations

import torch

from bigdet.benchmarks.torchvision_twin import AlignedPool


def test_regions_in_fp32_are_pooled_from_features_in_bf16() -> None:
    # On CUDA boxes are fp32 under autocast, features are not.
    features = {"0": torch.arange(64.0).view(1, 1, 8, 8)}
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0], [4.0, 4.0, 28.0, 20.0]])]
    pool = AlignedPool(["0"], 2, [4], 2)
    expected = pool(features, boxes, [(32, 32)])
    with torch.autocast("cpu", torch.bfloat16):
        found = pool({"0": features["0"].bfloat16()}, boxes, [(32, 32)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)
