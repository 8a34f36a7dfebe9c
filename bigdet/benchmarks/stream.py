"""Compares the training stream with decoding the same images and with other loaders.

All numbers are images per second of CPU time, of this process and its loader processes, so that
other processes of the machine matter little: it is what one core gives. The stream does all that a
phase needs: reading, order, boxes, masks, the canvas, and the transfer from the loader process. It
is compared with, in turn: decoding the same files and nothing else; decoding and resizing them;
webdataset with Pillow (decode and resize, no objects); torchvision's CocoDetection with its v2
transforms in a DataLoader (resize, flip, boxes, masks where the model has them).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from bigdet.config.data import WorkerKind
from bigdet.config.load import check_phase
from bigdet.config.model import has_masks
from bigdet.config.resize import plan_of
from bigdet.config.run import RunConfig, phase_data, phase_model
from bigdet.data.examples.decode import decode_image
from bigdet.data.format.shard_set import Sample, ShardSet
from bigdet.data.streams.stream import TrainStream
from bigdet.ops.resize import resize_image
from bigdet.ops.sizes import eval_size
from bigdet.training.phase_stream import stream_for_phase

Plan = tuple[int, int]


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return images per CPU second of each, ratios, and seconds to the first batch."""
    torch.set_num_threads(1)  # as in a loader process
    name = arguments.phase or next(iter(config.phases))
    check_phase(config, name)
    phase = config.phases[name]
    workers = config.data.workers if arguments.workers is None else arguments.workers
    if workers < 0:
        raise ValueError(f"--workers: found {workers}, expected 0 or more.")
    with_masks = has_masks(phase_model(config, name))

    address = phase_data(config, name).train.shards

    def open_stream(workers: int, kind: WorkerKind = "processes") -> TrainStream:
        data = dataclasses.replace(config.data, workers=workers, worker_kind=kind)
        changed = dataclasses.replace(config, data=data)
        return stream_for_phase(changed, name, ShardSet(address))

    num_groups = max(1, arguments.images // phase.images_per_gpu)
    samples = _samples(open_stream(0), ShardSet(address), num_groups)
    files = [sample.image_bytes for sample in samples]
    plan = plan_of(phase.resize)
    measured: dict[str, Callable[[], float]] = {
        "decode": lambda: _rate(map(decode_image, files)),
        "decode_and_resize": lambda: _rate(_decode_and_resize(file, plan) for file in files),
        "stream": lambda: _stream_rate(open_stream(0), num_groups),
        "webdataset_pillow": lambda: _rate(islice(_webdataset(address, plan), len(files))),
    }
    if workers:
        measured["stream_in_workers"] = lambda: _stream_rate(open_stream(workers), num_groups)
        measured["stream_in_threads"] = lambda: _stream_rate(
            open_stream(workers, "threads"), num_groups
        )
    with tempfile.TemporaryDirectory() as folder:
        if workers:
            dataset = _torchvision_dataset(Path(folder), samples, plan, phase.flip, with_masks)
            measured["torchvision_in_workers"] = lambda: _torchvision_rate(
                dataset, phase.images_per_gpu, workers
            )
        rounds = [
            {what: measure() for what, measure in measured.items()} for _ in range(arguments.rounds)
        ]
    rates = {what: statistics.median(round_[what] for round_ in rounds) for what in measured}
    return {
        "what": "stream",
        "phase": name,
        "resize": f"{phase.resize.kind} {phase.resize.size}",
        "workers": workers,
        "images": len(files),
        "first_batch_seconds": round(_first_batch_seconds(open_stream, workers), 3),
        "images_per_cpu_second": {what: round(rate, 1) for what, rate in rates.items()},
        "ratios": _ratios(rounds),
        "cores_for_300_images_per_second": {
            what: round(300 / rate, 2) for what, rate in rates.items() if "stream" in what
        },
    }


def _ratios(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the medians of the stream's rates over those of the same round."""
    pairs = [
        ("stream", "decode_and_resize"),
        ("stream", "webdataset_pillow"),
        ("stream_in_workers", "decode_and_resize"),
        ("stream_in_threads", "decode_and_resize"),
        ("stream_in_threads", "stream_in_workers"),
        ("stream_in_workers", "torchvision_in_workers"),
    ]
    return {
        f"{ours}/{other}": round(statistics.median(one[ours] / one[other] for one in rounds), 3)
        for ours, other in pairs
        if ours in rounds[0]
    }


def _samples(stream: TrainStream, shards: ShardSet, num_groups: int) -> list[Sample]:
    """Return the samples of the groups that the stream is measured on."""
    row_of = {int(image_id): row for row, image_id in enumerate(shards.index["image_id"])}
    # The stream's first group is not measured.
    keys = ((1 + i // len(stream.lanes), i % len(stream.lanes)) for i in range(1, num_groups + 1))
    ids = [image_id for step, lane in keys for image_id in stream.group_ids(step, lane)]
    return [shards.read(row_of[image_id]) for image_id in ids if image_id is not None]


def _rate(images: Iterator[object]) -> float:
    """Return images per CPU second of this process, over all of an iterator."""
    start = time.process_time()
    count = sum(1 for _ in images)
    return _per_second(count, time.process_time() - start)


def _per_second(count: int, seconds: float) -> float:
    if not count or not seconds:
        raise ValueError("--images: too few to measure their time. Raise it.")
    return count / seconds


def _decode_and_resize(file: bytes, plan: Plan) -> torch.Tensor:
    image = decode_image(file)
    return resize_image(image, eval_size(image.shape[1], image.shape[2], *plan))


def _stream_rate(stream: TrainStream, num_groups: int) -> float:
    """Return images per CPU second of the stream: of this process and its loader processes."""
    with contextlib.closing(stream):
        batches = iter(stream)
        next(batches)  # the clock starts when the processes run
        start = _cpu_seconds()
        num_images = sum(len(batch.images) for batch in islice(batches, num_groups))
        return _per_second(num_images, _cpu_seconds() - start)


def _cpu_seconds() -> float:
    """Return the CPU time so far of this process and its children."""
    children = multiprocessing.active_children()
    own, ticks = time.process_time(), 0
    if not Path("/proc").is_dir():
        return own + sum(_ps_cpu_seconds(child.pid) for child in children)
    for child in children:
        # The name, in brackets, may hold blanks; user and system time are 12th and 13th after it.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return own + ticks / os.sysconf("SC_CLK_TCK")


def _ps_cpu_seconds(process: int | None) -> float:
    """Return the CPU time of a process from ``ps`` of macOS, ``[hours:]minutes:seconds``."""
    words = ["ps", "-o", "time=", "-p", str(process)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    seconds = 0.0
    for part in printed.strip().split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _first_batch_seconds(open_stream: Callable[[int], TrainStream], workers: int) -> float:
    """Return seconds from opening the shards to the first batch."""
    start = time.perf_counter()
    with contextlib.closing(open_stream(workers)) as stream:
        next(iter(stream))
        return time.perf_counter() - start


def _webdataset(folder: str, plan: Plan) -> Iterator[torch.Tensor]:
    """Yield the images of the shards as webdataset and Pillow give them, endlessly."""
    tars = [str(path) for path in sorted(Path(folder).glob("*.tar"))]

    def resize(sample: dict[str, Any]) -> torch.Tensor:
        image: Image.Image = next(sample[key] for key in ("jpg", "png", "webp") if key in sample)
        height, width = eval_size(image.height, image.width, *plan)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels: torch.Tensor = v2.functional.pil_to_tensor(image)
        return pixels

    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    yield from dataset.decode("pil").map(resize).repeat()


def _torchvision_dataset(
    folder: Path, samples: Sequence[Sample], plan: Plan, flip: float, with_masks: bool
) -> Dataset[Any]:
    """Write samples as COCO has them, and return torchvision's own data set of them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, sample in enumerate(samples):
        record, name = sample.record, f"{number}.jpg"
        (folder / name).write_bytes(sample.image_bytes)
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": number, "file_name": name, **size})
        for found in record["annotations"]:
            annotations.append(
                {
                    **found,
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": found["label"] + 1,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "annotations.json").write_text(json.dumps(content))
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomShortestSize(plan[0], max_size=plan[1]),
            v2.RandomHorizontalFlip(flip),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    with contextlib.redirect_stdout(None):  # pycocotools prints its progress
        dataset = CocoDetection(
            str(folder), str(folder / "annotations.json"), None, None, transforms
        )
    keys = {"boxes", "labels", "masks"} if with_masks else {"boxes", "labels"}
    wrapped: Dataset[Any] = wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
    return wrapped


def _torchvision_rate(dataset: Dataset[Any], images_per_gpu: int, workers: int) -> float:
    """Return images per CPU second, over all but the first batch."""
    loader = DataLoader(
        dataset,
        images_per_gpu,
        num_workers=workers,
        collate_fn=_as_lists,
        drop_last=True,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    # Loader processes end when no work is left. So the last batches, which are requested earlier,
    # are not counted.
    next(batches)
    start, count = _cpu_seconds(), 0
    for _ in range(len(loader) - 1 - 2 * workers):
        count += len(next(batches)[0])
    return _per_second(count, _cpu_seconds() - start)


def _as_lists(samples: list[Any]) -> tuple[list[Any], ...]:
    """Return images and targets, as torchvision's detectors take them."""
    return tuple(list(column) for column in zip(*samples, strict=True))
