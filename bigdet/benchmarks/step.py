"""Compares the time of a training step with that of torchvision's R-CNNs.

They train on the same random scene: noise with elliptic objects of all sizes. They take turns, one
step each, since the speed of a shared machine drifts; medians over the rounds count.

There are two peers. ``torchvision`` is what its users have: for a ResNet its own backbone and
pyramid, in its memory format. ``torchvision_heads`` has bigdet's backbone and pyramid, in
channels_last memory, so that only proposals, heads and losses differ. ``ratio`` and ``ratio_heads``
are bigdet's images per second over theirs in fp32; ``ratio_bf16`` those of bigdet in bf16 over
torchvision's in fp32 (CPU) or under the same autocast (CUDA). With
``engine.activation_checkpointing=true`` there is also ``bigdet_fp32_checkpointed``, the same
detector with it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from bigdet.benchmarks import engines, operators
from bigdet.benchmarks.memory import peak_memory, start_memory
from bigdet.benchmarks.torchvision_twin import mask_options, training_options
from bigdet.config.load import check_phase
from bigdet.config.model import ModelConfig, has_fpn, has_masks, model_parts, used
from bigdet.config.phase import PhaseConfig
from bigdet.config.rpn import proposal_limits
from bigdet.config.run import RunConfig, graphed_phases
from bigdet.engine.precision import autocast
from bigdet.models.activation_checkpointing import enable_checkpointing
from bigdet.models.build import build_detector
from bigdet.models.detector import PIXEL_DEVIATION, PIXEL_MEAN, Detector
from bigdet.models.norms import make_norm, set_norm_mode
from bigdet.structures import Batch, Masks, Targets

NUM_CLASSES = 80
PARTS = ("forward", "backward", "optimizer")
UNCOUNTED = 2
"""Steps of each whose time does not count: one that is weighed, and one that gets memory anew."""


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return seconds, images per second, memory and ratios."""
    name = arguments.phase or next(iter(config.phases))
    check_phase(config, name)
    phase = config.phases[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = phase.resize.size
    height, width = side, side
    if phase.resize.kind == "short_side" and phase.resize.cap is not None:
        width = phase.resize.cap // 32 * 32
    if arguments.engines:
        scene = functools.partial(
            make_scene, phase.images_per_gpu, (height, width), arguments.objects
        )
        return engines.run(config, phase, scene, NUM_CLASSES, arguments)
    if arguments.operators:
        return measure_operators(config, phase, (height, width), arguments)
    check_peer(config.model)
    torch.manual_seed(config.seed)
    detector = build_detector(config.model, NUM_CLASSES).to(device)
    heads = torchvision_detector(detector, config.model, (height, width)).to(device)
    peers = {"torchvision_heads": heads}
    if config.model.backbone in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        own = own_pyramid(config.model, is_live=phase.norm_mode in ("live", "sync"))
        peers["torchvision"] = torchvision_rcnn(own, config.model, (height, width)).to(device)
    for model in (detector, *peers.values()):
        if phase.norm_mode is not None:
            set_norm_mode(model, phase.norm_mode)
        model.train()
    saving = copy.deepcopy(detector) if config.engine.activation_checkpointing else None
    if config.model.compile:
        detector.compile_dense()
    if config.device.cuda_graphs and name in graphed_phases(config):
        detector.graph_dense()
    batch = make_scene(phase.images_per_gpu, (height, width), arguments.objects, config.seed)
    batch = batch.to(device)
    images, targets = as_torchvision(batch)

    fp32, bf16 = (functools.partial(autocast, device, name) for name in ("fp32", "bf16"))
    ours = functools.partial(detector, batch)
    takers = {"bigdet_fp32": Taker(detector, ours, fp32, device)}
    for name, peer in peers.items():
        theirs = functools.partial(peer, images, targets)
        takers[f"{name}_fp32"] = Taker(peer, theirs, fp32, device)
    takers["bigdet_bf16"] = Taker(detector, ours, bf16, device)
    if saving is not None:
        enable_checkpointing(saving)
        again = functools.partial(saving, batch)
        takers["bigdet_fp32_checkpointed"] = Taker(saving, again, fp32, device)
    best = list(peers)[-1]
    rival = f"{best}_fp32"
    if device.type == "cuda":
        rival = f"{best}_bf16"
        theirs = functools.partial(peers[best], images, targets)
        takers[rival] = Taker(peers[best], theirs, bf16, device)
    for _ in range(arguments.rounds + UNCOUNTED):
        for taker in takers.values():
            taker.step()
    report = {name: taker.report(phase.images_per_gpu) for name, taker in takers.items()}
    speed = {name: numbers["images_per_second"] for name, numbers in report.items()}
    return {
        "what": "step",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "images_per_gpu": phase.images_per_gpu,
        "canvas_size": [height, width],
        "objects_per_image": arguments.objects,
        **report,
        "ratio": round(speed["bigdet_fp32"] / speed[f"{best}_fp32"], 3),
        "ratio_heads": round(speed["bigdet_fp32"] / speed["torchvision_heads_fp32"], 3),
        "ratio_bf16": round(speed["bigdet_bf16"] / speed[rival], 3),
    }


def measure_operators(
    config: RunConfig, phase: PhaseConfig, size: tuple[int, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the shares of operators in steps of the detector alone, which may be of any kind."""
    torch.manual_seed(config.seed)
    detector = build_detector(config.model, NUM_CLASSES).train()
    if phase.norm_mode is not None:
        set_norm_mode(detector, phase.norm_mode)
    if config.engine.activation_checkpointing:
        enable_checkpointing(detector)
    batch = make_scene(phase.images_per_gpu, size, arguments.objects, config.seed)
    report = operators.run(detector, batch, arguments.rounds)
    return {
        "what": "operators",
        "threads": torch.get_num_threads(),
        "images_per_gpu": phase.images_per_gpu,
        "canvas_size": list(size),
        **report,
    }


def check_peer(config: ModelConfig) -> None:
    """Raise ``ValueError`` for detectors whose steps cannot be compared."""
    parts = model_parts(config)
    is_plain = config.neck == "fpn" and config.rpn is not None and config.rpn.num_convs == 1
    if "box_head" not in parts or "keypoint_head" in parts or not has_fpn(config) or not is_plain:
        raise ValueError(
            f"model.detector: found {config.detector} on {config.backbone}, expected Faster or "
            f"Mask R-CNN with an FPN and one convolution in the RPN head, as steps are compared "
            f"with torchvision's. "
            f"`bigdet benchmark predict` measures other detectors too."
        )


@dataclass
class Taker:
    """A model that is measured, in turn with others.

    Attributes:
        model: what is trained; counts the regions of its mask head.
        losses: runs it on the batch.
        precision: returns the context of the forward pass.
        device: of the model and the batch.
    """

    model: nn.Module
    losses: Callable[[], dict[str, Tensor]]
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    device: torch.device
    times: list[dict[str, float]] = field(default_factory=list)
    peak: float = 0.0
    mask_regions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Give the model its own optimizer, with a rate too small to change anything."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-9, momentum=0.9)

    def step(self) -> None:
        """Take and time one training step; the first one is weighed."""
        head = getattr(self.model, "mask_head", None)
        if isinstance(self.model, FasterRCNN):
            head = self.model.roi_heads.mask_head
        count = []
        hook = (
            head.register_forward_pre_hook(lambda _, x: count.append(len(x[0]))) if head else None
        )
        # It gives free memory back, which has to come anew in the steps that follow.
        before = None if self.times else start_memory(self.device)
        clock = [self._now()]
        with self.precision():
            losses = self.losses()
        clock.append(self._now())
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        clock.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.append(self._now())
        if before is not None:
            self.peak = peak_memory(self.device) - before
        spans = [end - start for start, end in itertools.pairwise(clock)]
        self.times.append(dict(zip(PARTS, spans, strict=True)))
        self.mask_regions += count
        if hook is not None:
            hook.remove()

    def report(self, num_images: int) -> dict[str, Any]:
        """Return the medians of the steps that count."""
        times = self.times[UNCOUNTED:]
        seconds = statistics.median(sum(one.values()) for one in times)
        return {
            "step_seconds": round(seconds, 4),
            **{
                f"{part}_seconds": round(statistics.median(one[part] for one in times), 4)
                for part in PARTS
            },
            "images_per_second": round(num_images / seconds, 3),
            "peak_memory_gib": round(self.peak / 2**30, 3),
            "mask_regions": statistics.median(self.mask_regions) if self.mask_regions else 0,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Pyramid(nn.Module):
    """bigdet's backbone and FPN in the form that torchvision's detectors take."""

    def __init__(self, detector: Detector, width: int) -> None:
        """Copy them, so that the two models share no gradient."""
        super().__init__()
        self.backbone = copy.deepcopy(detector.backbone)
        self.fpn: Any = copy.deepcopy(detector.fpn)
        self.out_channels = width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels by name."""
        features = self.fpn(self.backbone(images))
        return OrderedDict(zip(["0", "1", "2", "3", "pool"], features, strict=True))


def own_pyramid(config: ModelConfig, *, is_live: bool) -> nn.Module:
    """Build torchvision's own ResNet with its pyramid.

    Its batch normalization has live statistics, or is frozen, as is torchvision's default.
    """
    norm: Callable[..., nn.Module] = nn.BatchNorm2d if is_live else FrozenBatchNorm2d
    if config.norm == "gn":
        norm = functools.partial(make_norm, "gn")
    resnet = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm)
    stages = [f"layer{number}" for number in range(1, 5)]
    channels = [resnet.inplanes // 8 * 2**number for number in range(4)]
    levels = {stage: str(number) for number, stage in enumerate(stages)}
    pyramid: nn.Module = BackboneWithFPN(resnet, levels, channels, config.width)
    return pyramid


def torchvision_detector(
    detector: Detector, config: ModelConfig, size: tuple[int, int]
) -> FasterRCNN:
    """Build torchvision's heads on our backbone and pyramid, in channels_last memory."""
    model = torchvision_rcnn(Pyramid(detector, config.width), config, size)
    return model.to(memory_format=torch.channels_last)


def torchvision_rcnn(pyramid: nn.Module, config: ModelConfig, size: tuple[int, int]) -> FasterRCNN:
    """Build torchvision's detector with the settings of ours on a backbone with pyramid.

    ``size`` is the height and width of the images, which it would resize to a side of 800.
    """
    rpn = proposal_limits(used(config.rpn), config.detector)
    options = training_options(config, rpn, config.width, NUM_CLASSES) | {
        "min_size": min(size),
        "max_size": max(size),
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_DEVIATION],
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in rpn.anchor_sizes),
            (tuple(rpn.anchor_ratios),) * len(rpn.anchor_sizes),
        ),
    }
    if has_masks(config):
        options |= mask_options(config, config.width, NUM_CLASSES)
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
        return MaskRCNN(pyramid, mask_roi_pool=pool, **options)
    return FasterRCNN(pyramid, **options)


def make_scene(num_images: int, size: tuple[int, int], num_objects: int, seed: int) -> Batch:
    """Draw noise with elliptic objects whose sides are 5 to 60 percent of the canvas."""
    generator = torch.Generator().manual_seed(seed)
    total = num_images * num_objects
    canvas = torch.tensor([size[1], size[0]])
    sides = (canvas * 0.05 * 12 ** torch.rand(total, 2, generator=generator)).long() + 1
    corners = ((canvas - sides) * torch.rand(total, 2, generator=generator)).long()
    bitmaps = []
    for width, height in sides.tolist():
        y = (torch.arange(height) + 0.5) / height * 2 - 1
        x = (torch.arange(width) + 0.5) / width * 2 - 1
        bitmaps.append((y[:, None] ** 2 + x**2 <= 1).to(torch.uint8).flatten())
    lengths = torch.tensor([0, *[len(bits) for bits in bitmaps]])
    sizes = torch.tensor([size] * num_images)
    images = torch.randint(0, 256, (num_images, 3, *size), dtype=torch.uint8, generator=generator)
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(num_images),
        weights=torch.ones(num_images),
        targets=Targets(
            boxes=torch.cat([corners, corners + sides], dim=1).float(),
            labels=torch.randint(0, NUM_CLASSES, (total,), generator=generator),
            is_crowd=torch.zeros(total, dtype=torch.bool),
            offsets=torch.arange(num_images + 1) * num_objects,
            masks=Masks(torch.cat(bitmaps), lengths.cumsum(0), corners, sides.flip(1)),
        ),
        seed=seed,
    )


def as_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the batch in torchvision's form: float images, dictionaries with full-size bitmaps."""
    offsets, masks = batch.targets.offsets.tolist(), batch.targets.masks
    assert masks is not None
    images, targets = [], []
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        image = batch.images[number]
        bitmaps = image.new_zeros(stop - start, *image.shape[1:])
        for row in range(start, stop):
            (x, y), (height, width) = masks.origins[row].tolist(), masks.sizes[row].tolist()
            crop = masks.bits[masks.offsets[row] : masks.offsets[row + 1]]
            bitmaps[row - start, y : y + height, x : x + width] = crop.view(height, width)
        images.append(image.float() / 255)
        targets.append(
            {
                "boxes": batch.targets.boxes[start:stop],
                "labels": batch.targets.labels[start:stop] + 1,
                "masks": bitmaps,
            }
        )
    return images, targets
