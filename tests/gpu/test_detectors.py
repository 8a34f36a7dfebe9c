"""Every detector on a GPU: losses, gradients and detections of a CPU; no wait; steady memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bigdet.config.heads import CascadeConfig, RetinaConfig
from bigdet.config.model import ModelConfig
from bigdet.engine.precision import TotalLoss, autocast
from bigdet.models.detector import Detector
from tests.unit.models.test_detector import CONFIG, detector_of, scene

pytestmark = pytest.mark.gpu
MODELS = {
    "mask_rcnn": CONFIG,
    "faster_rcnn, giou": replace(
        CONFIG, detector="faster_rcnn", roi=replace(CONFIG.roi, box_loss="giou")
    ),
    "faster_rcnn, vgg16": replace(CONFIG, detector="faster_rcnn", backbone="vgg16", norm="none"),
    "mask_rcnn, gn": replace(CONFIG, norm="gn", box_head="4conv1fc", width=32),
    "cascade_mask_rcnn": replace(CONFIG, detector="cascade_mask_rcnn"),
    "cascade_rcnn, mmdet": replace(
        CONFIG, detector="cascade_rcnn", cascade=CascadeConfig(gradients="mmdet")
    ),
    "keypoint_rcnn": replace(CONFIG, detector="keypoint_rcnn"),
    "mask_rcnn, swin_t": replace(CONFIG, backbone="swin_t", norm="none", drop_path=0.0),
    "retinanet": replace(CONFIG, detector="retinanet", retina=RetinaConfig(score_threshold=0.005)),
}


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the numbers of all devices from the CPU's generator: each device has its own."""
    original = torch.rand

    def drawn(*size: Any, device: torch.device | None = None, **options: Any) -> Tensor:
        return original(*size, **options).to(device)

    monkeypatch.setattr(torch, "rand", drawn)


def gradients_of(detector: Detector, device: torch.device) -> tuple[dict[str, Tensor], ...]:
    """Losses and gradients of a scene, on the CPU."""
    detector.to(device).zero_grad()
    losses = detector(scene().to(device))
    torch.stack(list(losses.values())).sum().backward()
    gradients = {n: p.grad.cpu() for n, p in detector.named_parameters() if p.grad is not None}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_a_cpu(
    name: str, same_draws: None, exact: torch.device
) -> None:
    detector = detector_of(MODELS[name])
    losses, gradients = gradients_of(detector, torch.device("cpu"))
    found, found_gradients = gradients_of(detector, exact)
    assert found.keys() == losses.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-6, msg=key)
    assert found_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        error = (found_gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-3, (key, float(error))


@pytest.mark.parametrize("name", MODELS)
def test_detections_are_those_of_a_cpu(name: str, exact: torch.device) -> None:
    detector = detector_of(MODELS[name]).eval()
    expected = detector(scene())
    found = detector.to(exact)(scene().to(exact))
    for one, other in zip(found, expected, strict=True):
        assert len(other.boxes) > 0
        # Not one by one: scores that differ by rounding change places.
        torch.testing.assert_close(one.scores.cpu(), other.scores, rtol=1e-3, atol=1e-4)
        nearest = torch.cdist(one.boxes.cpu(), other.boxes, p=math.inf).amin(dim=1)
        assert (nearest < 0.1).float().mean() > 0.95


def types_of(detector: Detector, device: torch.device) -> dict[str, set[torch.dtype]]:
    """The types of all that each module gives in a training step under bf16."""
    types: dict[str, set[torch.dtype]] = {}

    def note(name: str, values: Any) -> None:
        found = types.setdefault(name, set())
        found |= {x.dtype for x in tree_leaves(values) if isinstance(x, Tensor)}

    detector.to(device).train()
    for name, module in detector.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    with autocast(device, "bf16"):
        losses = detector(scene().to(device))
    torch.stack(list(losses.values())).sum().backward()
    return types


@pytest.mark.parametrize("name", MODELS)
def test_activations_have_the_types_that_they_have_on_a_cpu(name: str, exact: torch.device) -> None:
    on_cpu = types_of(detector_of(MODELS[name]), torch.device("cpu"))
    assert types_of(detector_of(MODELS[name]), exact) == on_cpu
    assert torch.bfloat16 in set().union(*on_cpu.values())


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
def test_a_step_makes_the_host_wait_for_nothing(name: str, exact: torch.device) -> None:
    total = TotalLoss(detector_of(MODELS[name]).to(exact), "bf16", exact)
    batch = scene().to(exact)
    total(batch)[0].backward()  # what happens only once
    with no_waiting():
        total(batch)[0].backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_memory_does_not_grow(precision: Any, exact: torch.device) -> None:
    total = TotalLoss(detector_of().to(exact), precision, exact)
    peaks = []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        loss, _ = total(scene().to(exact))
        loss.backward()
        total.zero_grad()
        del loss
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[2:]) <= 1.02 * peaks[1]


def test_many_small_images_fit_into_one_suppression(exact: torch.device) -> None:
    # 64 images of 448 pixels have 431,040 candidates; torchvision refuses so many in one call.
    small: ModelConfig = replace(CONFIG, rpn=replace(CONFIG.rpn, train_candidates=2000))
    detector = detector_of(small).to(exact)
    batch = replace(
        scene([[(5, 8, 60, 70)]] * 64),
        images=torch.zeros(64, 3, 448, 448, dtype=torch.uint8),
        image_sizes=torch.full((64, 2), 448),
    )
    with torch.autocast("cuda", torch.bfloat16):
        losses = detector(batch.to(exact))
    assert all(loss.isfinite() for loss in losses.values())
