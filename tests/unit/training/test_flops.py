"""FLOPs of a step against those of its layers, counted by hand from the shapes they see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bigdet.host.accelerators import peak_flops
from bigdet.models.backbones.build import freeze_stages
from bigdet.models.frozen import freeze_backbone
from bigdet.models.heads.mask import OwnClass
from bigdet.training import flops
from bigdet.training.flops import FlopMeter, count_flops
from tests.unit.models.test_detector import detector_of, scene


def count_by_hand(detector: nn.Module) -> dict[str, float]:
    """Forward FLOPs by layer, two for each weight that an output value is computed with."""
    found: dict[str, float] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        size = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        places = size[:, 0].numel() if size.ndim == 4 else size[..., 0].numel()
        products = places * layer.weight.numel()
        if isinstance(layer, OwnClass):  # one of its classes for each region
            products = inputs[0].numel()
        found[name] = found.get(name, 0) + 2 * products

    hooks = [
        layer.register_forward_hook(lambda *seen, name=name: note(name, *seen))
        for name, layer in detector.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    ]
    with torch.no_grad():
        detector(scene())
    for hook in hooks:
        hook.remove()
    return found


def test_flops_are_those_of_all_layers_and_frozen_ones_have_no_backward_pass() -> None:
    detector = detector_of().train()
    by_hand = count_by_hand(detector)
    total = sum(by_hand.values())
    assert total > 1e6
    assert count_flops(detector, scene(), "fp32") == pytest.approx(3 * total)
    freeze_stages(detector.backbone, 2)  # the stem and the first stage
    frozen = sum(
        n for name, n in by_hand.items() if name.startswith(("backbone.conv1", "backbone.layer1"))
    )
    assert 0 < frozen < total
    assert count_flops(detector, scene(), "fp32") == pytest.approx(3 * total - 2 * frozen)
    freeze_backbone(detector.backbone)  # without parameters then
    by_hand = count_by_hand(detector)
    frozen = sum(n for name, n in by_hand.items() if name.startswith("backbone."))
    expected = 3 * sum(by_hand.values()) - 2 * frozen
    assert count_flops(detector, scene(), "fp32") == pytest.approx(expected)


def test_counting_leaves_the_steps_as_they_were() -> None:
    plain, counted = detector_of().train(), detector_of().train()
    count_flops(counted, scene(), "fp32")
    for detector in (plain, counted):
        sum(detector(scene()).values()).backward()
    for (name, one), other in zip(plain.named_parameters(), counted.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, msg=name)
    for one, other in zip(plain.buffers(), counted.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "teraflops"), [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.5),
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100-PCIE-40GB", 312.0), ("NVIDIA L40S", 362.0),
    ("NVIDIA L4", 121.0), ("NVIDIA B200", 2250.0), ("NVIDIA A10G", None), ("", None),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA H100 NVL", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
])  # fmt: skip
def test_peaks_are_those_of_the_data_sheets(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_a_meter_gives_the_seconds_that_the_peak_would_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector, cpu, batch = detector_of().train(), torch.device("cpu"), scene()
    meter = FlopMeter(detector, "fp32", cpu)
    meter.count(batch)
    meter.add([batch])
    assert meter.take() == 0.0  # a CPU
    monkeypatch.setattr(flops, "peak_flops", lambda name: 1e9)
    meter = FlopMeter(detector, "fp32", cpu)
    meter.count(batch)
    needed = count_flops(detector, batch, "fp32")
    height, width = batch.images.shape[-2:]
    twice_as_wide = SimpleNamespace(images=torch.empty(len(batch.images), 3, height, 2 * width))
    meter.add([batch, twice_as_wide])
    assert meter.take() == pytest.approx(3 * needed / 1e9)
    assert meter.take() == 0.0
