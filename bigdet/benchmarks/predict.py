"""Compares inference with torchvision's detector of the same weights and settings.

Weights are random, but those of the classifier are scaled so that there are about as many
detections as with a trained model (``detections`` says how many), and normalization has the
statistics of the image. Both get an image of the test size and paste its masks at that size. They
take turns, since the speed of a shared machine drifts; ``ratio`` is the median over the rounds of
bigdet's images per second over torchvision's in the same precision.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigdet.benchmarks.torchvision_twin import torchvision_twin
from bigdet.config.load import check_phase
from bigdet.config.resize import plan_of
from bigdet.config.run import RunConfig, eval_resize, phase_model
from bigdet.engine.precision import autocast
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector, collate_images
from bigdet.models.norms import batch_norms, set_norm_mode
from bigdet.ops.masks import paste_mask
from bigdet.weights.torchvision_layout import twins

NUM_CLASSES = 80
LOGIT_SPREAD = {"box_head": 0.7, "retina_head": 0.45}
"""Deviation of class logits with which about as many of them pass the threshold as after training:
just under one of a region's 80 classes, and some thousands of all anchors' classes."""


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return seconds, images per second and ratios."""
    phase = arguments.phase or list(config.phases)[-1]
    check_phase(config, phase)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = plan_of(eval_resize(config, phase))
    torch.manual_seed(config.seed)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(arguments.images)]
    detector = build_detector(phase_model(config, phase), NUM_CLASSES).to(device)
    detector.eval_size = size
    twins(detector)  # raises where torchvision has no such detector
    settle(detector, images[0])
    twin = torchvision_twin(detector)

    def ours() -> int:
        found = detector.predict(images)
        for one in found:
            if one.masks is not None:
                for mask, box in zip(one.masks, one.boxes, strict=True):
                    paste_mask(mask, box, *size)
        return sum(len(one.boxes) for one in found)

    def theirs() -> int:
        with torch.no_grad():
            found = twin([image.to(device).float() / 255 for image in images])
        return sum(len(one["boxes"]) for one in found)

    fp32, bf16 = (functools.partial(autocast, device, name) for name in ("fp32", "bf16"))
    takers = {
        "bigdet_fp32": (ours, fp32),
        "torchvision_fp32": (theirs, fp32),
        "bigdet_bf16": (ours, bf16),
    }
    if device.type == "cuda":
        takers["torchvision_bf16"] = (theirs, bf16)
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    counts: dict[str, int] = {}
    for _ in range(arguments.rounds + 1):
        for name, (predict, precision) in takers.items():
            with precision():
                took, counts[name] = timed(predict, device)
            seconds[name].append(took)
    speeds = {
        name: arguments.images / statistics.median(times[1:]) for name, times in seconds.items()
    }
    return {
        "what": "predict",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "images": arguments.images,
        "image_size": list(size),
        "images_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "detections": counts,
        "ratio": ratio(seconds, "bigdet_fp32", "torchvision_fp32"),
        "ratio_bf16": ratio(
            seconds,
            "bigdet_bf16",
            "torchvision_bf16" if device.type == "cuda" else "torchvision_fp32",
        ),
    }


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Return how many times faster ours is: the median over all rounds but the first."""
    pairs = zip(seconds[theirs][1:], seconds[ours][1:], strict=True)
    return round(statistics.median(their / our for their, our in pairs), 3)


def timed(predict: Callable[[], int], device: torch.device) -> tuple[float, int]:
    """Return the seconds that a call takes, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = predict()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def settle(detector: Detector, image: Tensor) -> None:
    """Set statistics of normalization from an image, and the spread of class logits."""
    device = detector.get_buffer("pixel_mean").device
    part = image[:, :256, :256]  # noise, of which little is left in an image that is made smaller
    small = collate_images([part], (256, 256)).to(device)
    set_norm_mode(detector, "live")
    detector.train()
    detector.features(small)
    for layer in batch_norms(detector):
        if layer.batch_var.any():  # a head has seen nothing yet
            layer.running_mean.copy_(layer.batch_mean)
            layer.running_var.copy_(layer.batch_var)
    set_norm_mode(detector, "fixed")
    detector.eval()
    name = next(name for name in LOGIT_SPREAD if hasattr(detector, name))
    classifier: nn.Module = detector.get_submodule(f"{name}.classifier")
    logits: list[Tensor] = []
    hook = classifier.register_forward_hook(lambda _, __, output: logits.append(output.flatten()))
    detector(small)
    hook.remove()
    weight, bias = classifier.get_parameter("weight"), classifier.get_parameter("bias")
    weight.mul_(LOGIT_SPREAD[name] / torch.cat(logits).std())
    if name == "box_head":
        bias.zero_()
