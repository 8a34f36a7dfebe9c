"""Steps of detectors with and without CUDA graphs on the null GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.models.graphs import Graphs
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


def reserved() -> list[int]:
    """Bytes that the allocator holds after recordings of one, two and three shapes of one size."""
    layers = [nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU()) for _ in range(8)]
    net = nn.Sequential(*layers).to(GPU)
    graphs, found = Graphs([net]), []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for shape in ((65536, 256), (2, 32768, 256), (4, 16384, 256)):
        graphs(net, torch.ones(shape, device=GPU)).sum().backward()
        net.zero_grad()
        torch.cuda.empty_cache()
        found.append(torch.cuda.memory_reserved() - before)
    return found


def main() -> dict[str, Any]:
    found = {}
    for name in NAMES:
        graphed = detector_of(MODELS[name])
        graphed.graph_dense()
        found[name] = {"eager": steps(detector_of(MODELS[name])), "graphed": steps(graphed)}
    return found
