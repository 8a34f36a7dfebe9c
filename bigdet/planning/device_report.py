"""The tables of ``bigdet plan --device``."""

from __future__ import annotations

import dataclasses
import logging

from bigdet.config.engine import shards_frozen
from bigdet.config.run import RunConfig, phase_model
from bigdet.host.accelerators import Gpu
from bigdet.planning.devices import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    Memory,
    find_gpus,
    gpu_seconds,
    memory_of,
    most_images,
)
from bigdet.planning.scaling import GPUS_PER_HOST, Scale, scale
from bigdet.planning.simulated import Step, canvas_of, simulate
from bigdet.training.sizes import model_sizes

logger = logging.getLogger(__name__)
GIB = 1 << 30
_ROWS = {
    "weights": "weights and running statistics",
    "gradients": "gradients",
    "optimizer": "optimizer state and moving average",
    "rest": "activations and temporary tensors",
    "sending": "buckets and gathered weights",
    "unused": "reserved by the allocator, not used",
    "context": "CUDA context",
    "nccl": "NCCL's buffers",
}


def report_devices(
    config: RunConfig,
    phase: str,
    *,
    devices: str,
    gpus: list[int],
    num_classes: int,
    num_objects: int,
    disk: float,
) -> None:
    """Write memory, largest batch and time of a phase on GPUs that are not there.

    Args:
        config: resolved.
        phase: a key of ``config.phases``.
        devices: names with commas, such as ``h200,rtx4090``.
        gpus: numbers of GPUs; the first is the one of the tables of memory and time.
        num_classes: K.
        num_objects: of each image.
        disk: bytes per second that a host writes.
    """
    found = find_gpus(devices)
    engine, settings = config.engine, config.phases[phase]
    kind = "FSDP2" if engine.kind == "fsdp" else f"ZeRO-{engine.zero_stage}"
    if engine.offload != "none":
        raise ValueError(
            f"engine.offload: found {engine.offload}, expected none: with --device all is on the "
            f"GPU. Plan with engine.offload=none, or with --memory-gib on a GPU."
        )
    if config.device.cuda_graphs:
        logger.warning(
            "device.cuda_graphs: planned without graphs, which keep more memory between steps "
            "(a third more was reserved for an R50 at 800x1344)"
        )
    if phase_model(config, phase).compile:
        logger.warning("model.compile: planned without it; a compiled detector takes less memory")
    over = GPUS_PER_HOST if engine.shard_over == "node" else max(gpus)
    shared = shards_frozen(engine)
    sizes = model_sizes(config, phase, num_classes)
    height, width = canvas_of(config, phase)
    images = settings.images_per_gpu
    logger.info("phase %s: running a step of %d images without memory", phase, images)
    step = simulate(config, phase, num_classes, num_objects)
    logger.info(
        "%s on %s: %.1f M weights, %.1f M trained; %s; micro-batch: %d images of %dx%d, %d objects "
        "each; %s on %d GPUs",
        phase_model(config, phase).detector,
        config.model.backbone,
        (sizes.parameters + sizes.frozen) / 1e6,
        sizes.trained / 1e6,
        engine.precision,
        images,
        height,
        width,
        num_objects,
        kind,
        gpus[0],
    )
    memory = memory_of(step, kind, gpus[0], sizes, over, shares_frozen=shared)
    _write_rows(memory)
    larger = simulate(_with_images(config, phase, 2 * images), phase, num_classes, num_objects)
    twice = memory_of(larger, kind, gpus[0], sizes, over, shares_frozen=shared)
    totals = memory.total, twice.total
    _write_devices(found, step, totals, images, engine.precision)
    if len(gpus) > 1:
        rows = [scale(step, kind, n, sizes, over, disk, shares_frozen=shared) for n in gpus]
        _write_scaling(rows, kind, disk)


def _write_rows(memory: Memory) -> None:
    """Log what the memory of a GPU is made of."""
    for name, text in _ROWS.items():
        logger.info("  %-38s %8.2f GiB", text, getattr(memory, name) / GIB)
        if name == "sending":
            logger.info("  %-38s %8.2f GiB", "= allocated at most", memory.allocated / GIB)
    logger.info("  %-38s %8.2f GiB", "= needed", memory.total / GIB)


def _write_devices(
    found: dict[str, Gpu], step: Step, totals: tuple[float, float], images: int, precision: str
) -> None:
    """Log whether the phase fits, the largest micro-batch, and the estimate of time."""
    flops, moved = (sum(kinds) for kinds in zip(*step.costs, strict=True))
    logger.info(
        "a micro-batch: %.2f TFLOP, %.1f GB read and written, %d kernels; estimate of the GPU's "
        "time, not measured and rather a lower bound: a roofline at %.0f%% of the peak of matrix "
        "products and %.0f%% of the bandwidth",
        flops / 1e12,
        moved / 1e9,
        len(step.costs),
        100 * COMPUTE_SHARE,
        100 * BANDWIDTH_SHARE,
    )
    logger.info("  %-12s %8s  %-8s %15s %11s", "GPU", "GiB", "", "images_per_gpu", "at least")
    for name, gpu in found.items():
        room = GIB * gpu.memory_gib
        seconds = f"{gpu_seconds(step, gpu):9.3f} s"
        logger.info(
            "  %-12s %8.1f  %-8s %7d at most %11s",
            name,
            gpu.memory_gib,
            "fits" if totals[0] <= room else "too small",
            most_images((images, 2 * images), totals, room),
            "-" if precision == "fp32" else seconds,
        )


def _write_scaling(rows: list[Scale], kind: str, disk: float) -> None:
    """Log a table with a row for each number of GPUs."""
    logger.info(
        "%s on more GPUs, eight on a host that writes %.1f GB/s; GiB, and seconds. Whole: each "
        "rank builds the model, and rank 0 gathers and writes checkpoints. Shares: as bigdet does.",
        kind,
        disk / 1e9,
    )
    heads = ("start, GPU", "step, GPU", "save, host memory of a rank", "write, s", "wait, s")
    logger.info("  %5s  %-17s  %9s  %-27s  %-17s  %8s", "GPUs", *heads)
    both = ("whole", "shares")
    logger.info("  %5s  %8s %8s  %9s  %13s %13s  %8s %8s", "", *both, "", *both, *both)
    for row in rows:
        logger.info(
            "  %5d  %8.2f %8.2f  %9.2f  %13.2f %13.2f  %8.1f %8.1f  %8.3f",
            row.gpus,
            row.start_whole / GIB,
            row.start / GIB,
            row.step.total / GIB,
            row.save_whole / GIB,
            row.save / GIB,
            row.write_whole,
            row.write,
            row.wait,
        )


def _with_images(config: RunConfig, phase: str, images: int) -> RunConfig:
    """Return a config whose phase has other micro-batches."""
    settings = dataclasses.replace(
        config.phases[phase], images_per_gpu=images, images_per_step=None
    )
    return dataclasses.replace(config, phases={**config.phases, phase: settings})
