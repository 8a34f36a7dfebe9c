"""What torch's allocator on a null GPU and its simulation say of the same; prints JSON."""

from __future__ import annotations

import dataclasses
import random

import torch

from bigdet.engine.precision import TotalLoss
from bigdet.models.detector import Detector
from bigdet.planning.allocator import CachingAllocator
from bigdet.planning.simulated import run_steps
from bigdet.structures import Batch, _map_tensors
from tests.gpu.test_detectors import MODELS
from tests.nullgpu import null_gpu
from tests.unit.models.test_detector import detector_of, scene

GPU = torch.device("cuda", 0)
NAMES = ("mask_rcnn, gn", "mask_rcnn, swin_t", "retinanet")


def allocations() -> dict[str, list[tuple[int, int]]]:
    """Allocated and reserved bytes after each of some random allocations and frees."""
    draw, memory = random.Random(1), CachingAllocator()
    held: list = []
    found: dict[str, list[tuple[int, int]]] = {"torch": [], "simulated": []}
    for _ in range(600):
        if held and draw.random() < 0.45:
            tensor, block = held.pop(draw.randrange(len(held)))
            del tensor
            memory.free(block)
        else:
            size = int(2 ** draw.uniform(0, 26))
            tensor = torch.empty(size, dtype=torch.uint8, device=GPU)
            held.append((tensor, memory.allocate(size)))
            del tensor
        found["torch"].append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        found["simulated"].append((memory.allocated, memory.reserved))
    return found


def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, foreach=True)


def peaks_on_gpu(detector: Detector, batch: Batch) -> list[int]:
    """Most bytes in forward pass, backward pass and update of the second step."""
    before = torch.cuda.memory_allocated()
    detector.to(GPU)  # channels_last, as ZeRO-0 lays weights out
    optimizer, total = make_optimizer(detector), TotalLoss(detector, "bf16", GPU)
    on_gpu = batch.to(GPU)
    peaks = []

    def note() -> None:
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()

    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss = total(on_gpu)[0]
        note()
        loss.backward()
        del loss
        note()
        optimizer.step()
        note()
        optimizer.zero_grad()
    return peaks[3:]


def main() -> None:
    null_gpu.install()
    found: dict = {"allocations": allocations(), "peaks": {}}
    for name in NAMES:
        batch = scene()
        most = int(batch.targets.offsets.diff().max())
        known = dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, most=most))
        step = run_steps(
            detector_of(MODELS[name]).train(),
            lambda known=known: _map_tensors(known, torch.clone),
            make_optimizer,
            "bf16",
            answer=1,
        )
        found["peaks"][name] = {
            "torch": peaks_on_gpu(detector_of(MODELS[name]).train(), batch),
            "simulated": [step.forward, step.backward, step.optimizer],
        }
    null_gpu.print_and_leave(found)


if __name__ == "__main__":
    main()
