"""Steps of detectors with and without CUDA graphs on the null GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.structures import Batch
from tests.gpu.test_detectors import MODELS
from tests.nullgpu import null_gpu
from tests.nullgpu.run import GPU, pinned, seen
from tests.unit.models.test_detector import detector_of, scene

NAMES = ("mask_rcnn", "mask_rcnn, swin_t", "retinanet")


def shapes() -> list[Batch]:
    """A batch of a square canvas, and one of the same images on a wider one."""
    batch = scene()
    wider = batch.images.new_zeros(*batch.images.shape[:3], 160)
    return [pinned(batch), pinned(replace(batch, images=wider))]


def steps(detector: Detector) -> list[dict[str, Any]]:
    """What a step of each shape does, at first and later."""
    total, batches = TotalLoss(detector.to(GPU).train(), "bf16", GPU), shapes()
    found, delivered = [], []
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, key=name: delivered.append(key))
    for batch in [*batches, *batches]:
        total.zero_grad()
        delivered.clear()
        null_gpu.reset()
        total(batch.to(GPU))[0].backward()
        gradients = {
            name: [str(p.grad.dtype), p.grad.shape, p.grad.stride()]
            for name, p in detector.named_parameters()
            if p.grad is not None
        }
        found.append({**seen(), "gradients": gradients, "delivered": sorted(delivered)})
    return found


def main() -> dict[str, Any]:
    found = {}
    for name in NAMES:
        graphed = detector_of(MODELS[name])
        graphed.graph_dense()
        found[name] = {"eager": steps(detector_of(MODELS[name])), "graphed": steps(graphed)}
    return found
