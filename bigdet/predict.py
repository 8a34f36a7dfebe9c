"""Detect objects in pictures: drawn copies and ``detections.json``.

Its command line is in ``cli/arguments/predict.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.predict import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import argparse
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigdet import distributed
from bigdet.cli.inputs import Input, is_shard_set, list_inputs
from bigdet.cli.running import run_command
from bigdet.data.format.shard_set import UnavailableShardError
from bigdet.evaluation.detections import Result
from bigdet.evaluation.split import coco_results, finite_detections
from bigdet.host import errors
from bigdet.host.files import check_folder
from bigdet.host.strict_json import to_json
from bigdet.logs.log import setup_logging
from bigdet.models.detector import Detector
from bigdet.models.weights import load_detector
from bigdet.ops.sizes import canvas_size, eval_size
from bigdet.pictures.drawing import draw_detections
from bigdet.structures import Detections

logger = logging.getLogger("bigdet.predict")  # __name__ is __main__ here

NUM_THREADS = 4  # that read and draw while the model runs


def main(arguments: Sequence[str]) -> int:
    """Detect, draw and write; return the exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0)
    if not 0 <= options.score <= 1:
        raise ValueError(f"--score: found {options.score}, expected a score in [0, 1].")
    if options.batch < 1:
        raise ValueError(f"--batch: found {options.batch}, expected 1 or more.")
    device = choose_device(options.device)
    if options.exif == "stored" and any(map(is_shard_set, options.images)):
        raise ValueError(
            "--exif: images of a shard set are used as annotated. Leave the option out."
        )
    inputs, num_bad = list_inputs(options.images, options.exif)
    if not inputs:
        raise ValueError(f"no image to detect objects on: {num_bad} were left out.")
    check_output(options.out, inputs)
    detector = load_detector(options.model).to(device)
    results, num_done = detect_all(detector, inputs, options)
    num_bad += len(inputs) - num_done
    results.sort(key=lambda result: int(result["image_id"]))
    names = {one.image_id: one.source_id for one in inputs if one.source_id is not None}
    if names:
        results = [r | {"image_id": names.get(r["image_id"], r["image_id"])} for r in results]
    (options.out / "detections.json").write_text(to_json(results), encoding="utf-8")
    logger.info("%s has the detections of %d images", options.out, num_done)
    if num_bad:
        raise ValueError(
            f"{num_bad} of {num_done + num_bad} images could not be read (the log names each); the "
            f"other {num_done} are in {options.out}. Repair them, or leave them out."
        )
    return 0


def detect_all(
    detector: Detector, inputs: Sequence[Input], options: argparse.Namespace
) -> tuple[list[Result], int]:
    """Detect the objects on all images that can be read, and draw them.

    Returns:
        The COCO results, and how many images there were.
    """
    results: list[Result] = []
    num_done = 0
    batches = plan_batches(inputs, detector.eval_size, options.batch)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        drawing: list[Future[None]] = []
        for batch, readings in read_ahead(pool, batches):
            errors.at(f"detecting objects on {', '.join(one.name for one in batch)}")
            images, pixels = collect(batch, readings)
            found = predict_images(detector, pixels)
            for future in drawing:  # of the batch before
                future.result()
            drawing = []
            for image, shown, detections in zip(images, pixels, found, strict=True):
                num_done += 1
                count = int((detections.scores >= options.score).sum())
                logger.info("%d of %d: %s: %d objects", num_done, len(inputs), image.name, count)
                results += as_results(image, detections, detector)
                if not options.no_pictures:
                    path = options.out / f"{image.stem}.jpg"
                    task = (path, shown, detections, detector.categories, options.score)
                    drawing.append(pool.submit(write_picture, *task))
        for future in drawing:
            future.result()
    return results, num_done


def choose_device(name: str | None) -> torch.device:
    """Return the named device; by default the GPU of this process if there is one."""
    if name is None:
        return distributed.device()
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here. Leave it out, or give cpu.")
    return torch.device(name)


def check_output(out: Path, inputs: Sequence[Input]) -> None:
    """Raise ``ValueError`` where pictures cannot be written, or would replace the images."""
    for one in inputs:
        if one.file_name is not None and Path(one.file_name).resolve().parent == out.resolve():
            raise ValueError(
                f"--out {out}: {one.file_name} is in this folder and could be overwritten. Give "
                f"another folder."
            )
    check_folder(out, "--out")


def plan_batches(
    inputs: Iterable[Input], short_and_long: tuple[int, int], limit: int
) -> list[list[Input]]:
    """Group images of equal canvases into batches: results do not depend on the other images.

    Args:
        inputs: images of any sizes.
        short_and_long: short side and longest long side at which the model sees them, pixels.
        limit: most images of a batch.
    """
    by_canvas: dict[tuple[int, int], list[Input]] = {}
    for one in inputs:
        canvas = canvas_size([eval_size(*one.size, *short_and_long)])
        by_canvas.setdefault(canvas, []).append(one)
    return [
        group[first : first + limit]
        for group in by_canvas.values()
        for first in range(0, len(group), limit)
    ]


def read_ahead(
    pool: ThreadPoolExecutor, batches: Iterable[list[Input]]
) -> Iterator[tuple[list[Input], list[Future[NDArray[np.uint8]]]]]:
    """Yield each batch with its images, while the pool reads those of the next one."""
    waiting: deque[tuple[list[Input], list[Future[NDArray[np.uint8]]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(one.read) for one in batch]))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def collect(
    batch: Sequence[Input], readings: Sequence[Future[NDArray[np.uint8]]]
) -> tuple[list[Input], list[NDArray[np.uint8]]]:
    """Return those images of a batch that could be read, and their pixels."""
    images, pixels = [], []
    for image, reading in zip(batch, readings, strict=True):
        try:
            pixels.append(reading.result())
        except UnavailableShardError:
            raise  # the reason is not in the image
        except ValueError as error:
            logger.error("%s: %s; left out", image.name, error)
        else:
            images.append(image)
    return images, pixels


def predict_images(detector: Detector, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
    """Detect the objects on images ``(H, W, 3)`` in one forward pass; results are on the CPU."""
    if not images:
        return []
    found = [finite_detections(one.to(torch.device("cpu"))) for one in detector.predict(images)]
    if num_left_out := sum(number for _, number in found):
        logger.warning(
            "%d detections were not finite and left out; the model may have diverged", num_left_out
        )
    return [detections for detections, _ in found]


def write_picture(
    path: Path,
    pixels: NDArray[np.uint8],
    detections: Detections,
    categories: Sequence[Mapping[str, Any]],
    score: float,
) -> None:
    """Write an image with its detections of at least ``score`` drawn on it."""
    draw_detections(pixels, detections, categories, score).save(path, quality=90)


def as_results(image: Input, detections: Detections, detector: Detector) -> list[Result]:
    """Return the detections of an image as COCO results."""
    ids = [category["id"] for category in detector.categories]
    found = coco_results(detections, image.image_id, image.size, ids)
    if image.file_name is None:
        return found
    return [result | {"file_name": image.file_name} for result in found]


if __name__ == "__main__":
    run_command(main)
