"""How fast the training stream is, per worker, beside decoding and resizing the same images.

``ratio`` is the stream's images per second and worker over those of one thread that only decodes
the same files and resizes them. What a phase takes from the stream is everything: reading, order,
boxes, masks, the canvas, and the way from the loader process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from bigdet.config.derived import plan_of
from bigdet.config.schema import RunConfig
from bigdet.data.decode import decode_image
from bigdet.data.shards import ShardSet
from bigdet.data.stream import TrainStream, open_train_stream
from bigdet.ops.resize import resize_image, test_size

ROUNDS = (
    5  # of each measurement in turn, as the speed of a shared machine drifts; the median counts
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be set beside the config."""
    parser.add_argument("--phase", help="default: the first of the config")
    parser.add_argument("--images", type=int, default=300, help="per measurement; default 300")
    parser.add_argument("--workers", type=int, help="loader processes; default data.workers")


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return images per second of each."""
    torch.set_num_threads(1)  # as in a loader process
    name = arguments.phase or next(iter(config.phases))
    if name not in config.phases:
        raise ValueError(f"--phase {name}: the config has {', '.join(config.phases)}.")
    phase = config.phases[name]
    workers = config.data.workers if arguments.workers is None else arguments.workers
    data = dataclasses.replace(config.data, workers=workers)
    stream = open_train_stream(
        ShardSet(data.train.shards),
        data,
        phase,
        name=name,
        with_masks=config.model.detector == "mask_rcnn",
        seed=config.seed,
        rank=0,
        world_size=1,
    )
    num_groups = max(1, arguments.images // phase.images_per_gpu)
    files = _files(stream, data.train.shards, num_groups)
    plan = plan_of(phase.resize)
    measured: dict[str, Callable[[], float]] = {
        "decode": lambda: _rate(files, lambda file: decode_image(file)),
        "decode_and_resize": lambda: _rate(files, lambda file: _decode_and_resize(file, plan)),
        "stream": lambda: _stream_rate(stream, num_groups) / max(1, workers),
    }
    rounds = [{what: measure() for what, measure in measured.items()} for _ in range(ROUNDS)]
    rates = {what: statistics.median(round_[what] for round_ in rounds) for what in measured}
    ratios = [round_["stream"] / round_["decode_and_resize"] for round_ in rounds]
    return {
        "what": "stream",
        "phase": name,
        "resize": f"{phase.resize.kind} {phase.resize.size}",
        "workers": workers,
        "images": len(files),
        "decode_images_per_second": round(rates["decode"], 1),
        "decode_and_resize_images_per_second": round(rates["decode_and_resize"], 1),
        "stream_images_per_second_per_worker": round(rates["stream"], 1),
        "ratio": round(statistics.median(ratios), 3),
    }


def _files(stream: TrainStream, folder: str, num_groups: int) -> list[bytes]:
    """Return the image files of the groups that the stream is measured on."""
    shards = ShardSet(folder)
    row_of = {int(image_id): row for row, image_id in enumerate(shards.index["image_id"])}
    # The stream's first group is not measured.
    keys = ((1 + i // len(stream.lanes), i % len(stream.lanes)) for i in range(1, num_groups + 1))
    ids = [image_id for step, lane in keys for image_id in stream.group_ids(step, lane)]
    return [shards.read(row_of[image_id]).image_bytes for image_id in ids if image_id is not None]


def _decode_and_resize(file: bytes, plan: tuple[int, int]) -> None:
    image = decode_image(file)
    resize_image(image, test_size(image.shape[1], image.shape[2], *plan))


def _rate(files: Sequence[bytes], work: Callable[[bytes], object]) -> float:
    """Return images per second of ``work`` on each file."""
    start = time.perf_counter()
    for file in files:
        work(file)
    return len(files) / (time.perf_counter() - start)


def _stream_rate(stream: TrainStream, num_groups: int) -> float:
    """Return images per second of the stream with all its processes."""
    with contextlib.closing(stream):
        batches = iter(stream)
        next(batches)  # the clock starts when the processes run
        start = time.perf_counter()
        num_images = sum(len(batch.images) for batch in islice(batches, num_groups))
        return num_images / (time.perf_counter() - start)
