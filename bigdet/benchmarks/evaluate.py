"""Compares the time to compute AP with that of pycocotools, on synthetic detections with masks.

The images repeat those of the validation set. The detections are masks and boxes of its objects,
moved; some have a wrong class or are where no object is. Both programs score the same results file,
from reading it to the numbers, each in its own process. The numbers must be equal to the last
digit. ``ratio`` is pycocotools' seconds over bigdet's, ``cpu_ratio`` the same for CPU seconds,
which depend less on the load of the machine; ``memory_gib`` is the peak of each process minus what
it had after its imports.

With --classes, objects and detections are entirely synthetic: boxes only, many of a few classes and
few of most. Only bigdet runs, and computes all that ``bigdet evaluate --analysis`` prints: for sets
that are too large for pycocotools, such as Objects365's 80,000 images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bigdet.benchmarks.memory import peak_memory
from bigdet.config.run import RunConfig
from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.evaluation.coco_metrics import METRICS, measure
from bigdet.evaluation.detections import Kind, load_results, read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections

KINDS: tuple[Kind, ...] = ("bbox", "segm")
POOL = 300
"""Number of different detections of a source image."""
WRONG_CLASS, NOTHING_THERE = 0.1, 0.4
"""Fractions of the detections."""


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return seconds, memory and the ratio, after comparing all numbers."""
    if arguments.classes:
        with tempfile.TemporaryDirectory() as name:
            make_boxes(Path(name), arguments)
            return in_a_process(score_boxes, Path(name))
    source = ShardSet(config.data.val.shards, cache=config.data.cache)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(source, folder, arguments)
        ours = in_a_process(score_bigdet, folder)
        theirs = in_a_process(score_pycocotools, folder)
    for kind in KINDS:
        assert ours["numbers"][kind] == theirs["numbers"][kind], (kind, ours, theirs)
    return {
        "images": arguments.images,
        "detections": arguments.images * arguments.detections,
        "bigdet_seconds": ours["seconds"],
        "pycocotools_seconds": theirs["seconds"],
        "ratio": theirs["seconds"] / ours["seconds"],
        "cpu_seconds": {"bigdet": ours["cpu_seconds"], "pycocotools": theirs["cpu_seconds"]},
        "cpu_ratio": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "memory_gib": {"bigdet": ours["memory_gib"], "pycocotools": theirs["memory_gib"]},
        "numbers": ours["numbers"],
    }


def new_shards(folder: Path, categories: Sequence[Category]) -> ShardWriter:
    """Return what writes the shards of a measurement."""
    return ShardWriter(
        folder / "shards",
        name="benchmark",
        source="coco",
        categories=list(categories),
        options={},
    )


def blank_image() -> bytes:
    """Return a small JPEG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg")
    return file.getvalue()


def make_inputs(source: ShardSet, folder: Path, arguments: argparse.Namespace) -> None:
    """Write shards of blank images, their annotations as a COCO file, and synthetic results."""
    random = np.random.default_rng(arguments.seed)
    records = [source.record(row) for row in range(len(source))]
    pools: dict[int, list[dict[str, Any]]] = {}
    results: list[dict[str, Any]] = []
    blank = blank_image()
    with new_shards(folder, source.categories) as writer:
        for image_id in range(1, arguments.images + 1):
            number = int(random.integers(len(records)))
            writer.add(blank, {**records[number], "image_id": image_id})
            if number not in pools:
                pools[number] = make_pool(records[number], records, source, random)
            chosen = random.choice(len(pools[number]), arguments.detections, replace=False)
            results += [{"image_id": image_id, **pools[number][place]} for place in chosen]
    truth = coco_ground_truth(ShardSet(folder / "shards"))
    (folder / "truth.json").write_bytes(orjson.dumps(truth))
    (folder / "results.json").write_bytes(orjson.dumps(results))


def make_boxes(folder: Path, arguments: argparse.Namespace) -> None:
    """Write shards of blank images with synthetic boxes, and synthetic results."""
    random = np.random.default_rng(arguments.seed)
    commonness = 1 / np.arange(1, arguments.classes + 1) ** 0.8
    commonness /= commonness.sum()
    categories = [Category(number, f"class {number}") for number in range(1, len(commonness) + 1)]
    blank = blank_image()
    with new_shards(folder, categories) as writer, (folder / "results.json").open("wb") as results:
        for image_id in range(1, arguments.images + 1):
            record, made = make_image(image_id, arguments.detections, commonness, random)
            writer.add(blank, record)
            results.write(b"[" if image_id == 1 else b",")
            results.write(orjson.dumps(made)[1:-1])
        results.write(b"]")


def make_image(
    image_id: int, count: int, commonness: NDArray[np.float64], random: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the record of an image with about 15 objects, and ``count`` results on it."""
    size = random.integers(400, 1025, 2)  # width, height

    def some(number: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        sides = np.exp(random.normal(np.log(70), 0.9, (number, 2))).clip(4, size - 2)
        boxes = np.hstack([random.random((number, 2)) * (size - sides), sides])
        return random.choice(len(commonness), number, p=commonness), boxes.round(2)

    labels, boxes = some(1 + random.poisson(14))
    annotations = [
        {"id": place, "label": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for place, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True))
    ]
    record = {
        "image_id": image_id,
        "file_name": f"{image_id}.jpg",
        "annotations": annotations,
        "width": int(size[0]),
        "height": int(size[1]),
    }
    other_labels, other_boxes = some(count)
    source = random.integers(len(boxes), size=count)
    is_object = random.random(count) > NOTHING_THERE
    is_right = is_object & (random.random(count) > WRONG_CLASS)
    moved = boxes[source] + random.normal(0, 0.1, (count, 4)) * np.tile(boxes[source, 2:], 2)
    found = np.where(is_object[:, None], moved, other_boxes)
    results = zip(
        np.where(is_right, labels[source], other_labels).tolist(),
        np.maximum(found, 0.1).round(3).tolist(),
        random.beta(2, np.where(is_right, 2, 5)).round(4).tolist(),
        strict=True,
    )
    return record, [
        {"image_id": image_id, "category_id": label + 1, "bbox": box, "score": score}
        for label, box, score in results
    ]


def make_pool(
    record: dict[str, Any],
    records: list[dict[str, Any]],
    source: ShardSet,
    random: np.random.Generator,
) -> list[dict[str, Any]]:
    """Return possible detections of an image, without its id."""
    size = (record["height"], record["width"])
    ids = [category.id for category in source.categories]
    shapes = polygons_of(record)
    others = [shape for other in records for shape in polygons_of(other)]
    pool: list[dict[str, Any]] = []
    while len(pool) < POOL:
        is_object = bool(shapes) and random.random() > NOTHING_THERE
        shape = (shapes if is_object else others)[
            int(random.integers(len(shapes if is_object else others)))
        ]
        spread = 0.1 if is_object else 3.0
        shift = random.normal(0, spread, 2) * np.array(shape["bbox"][2:])
        rle = moved_mask(shape["segmentation"], size, shift)
        if coco_mask.area(rle) == 0:
            continue
        is_right = is_object and random.random() > WRONG_CLASS
        label = shape["label"] if is_right else others[int(random.integers(len(others)))]["label"]
        box = np.asarray(coco_mask.toBbox(rle)) + random.normal(0, 0.5, 4)
        pool.append(
            {
                "category_id": ids[label],
                "bbox": np.maximum(box, 0.1).round(3).tolist(),
                "score": round(float(random.beta(2, 2 if is_right else 5)), 4),
                "segmentation": {"size": list(size), "counts": rle["counts"].decode()},
            }
        )
    return pool


def polygons_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of an image that have polygons."""
    return [a for a in record["annotations"] if isinstance(a.get("segmentation"), list)]


def moved_mask(
    polygons: list[list[float]], size: tuple[int, int], shift: NDArray[np.float64]
) -> dict[str, Any]:
    """Return polygons, moved by x, y pixels, as RLE of an image, cut at its edges."""
    moved = [
        (np.array(polygon).reshape(-1, 2) + shift).clip(0, size[::-1]).ravel().tolist()
        for polygon in polygons
    ]
    rle: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(moved, *size))
    return rle


def in_a_process(score: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a scorer in a fresh process; return its numbers, seconds and peak memory in GiB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, score, folder).result()


def _measure(score: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    before = _peak_gib()
    started, cpu_started = time.perf_counter(), time.process_time()
    numbers = score(folder)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    found = {"numbers": numbers, "seconds": seconds, "cpu_seconds": cpu_seconds}
    return {**found, "memory_gib": _peak_gib() - before}


def _peak_gib() -> float:
    """Return the most memory of this process so far (off Linux, maybe of its parent too)."""
    return peak_memory(torch.device("cpu")) / (1 << 30)


def score_bigdet(folder: Path) -> dict[str, Any]:
    """Return our numbers."""
    truth = read_ground_truth(ShardSet(folder / "shards"), with_masks=True, with_keypoints=False)
    found = read_detections(load_results(folder / "results.json"), truth, KINDS)
    numbers: dict[str, Any] = {}
    for kind in KINDS:
        stats = measure(truth, found, kind).stats()
        numbers[kind] = {name: stats[place] for name, place in METRICS.items()}
    return numbers


def score_boxes(folder: Path) -> dict[str, Any]:
    """Return our numbers of boxes, after all else that an evaluation computes."""
    results = load_results(folder / "results.json")
    return dict(evaluate_detections(ShardSet(folder / "shards"), results, ["bbox"])["bbox"])


def score_pycocotools(folder: Path) -> dict[str, Any]:
    """Return pycocotools' numbers."""
    truth = json.loads((folder / "truth.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    numbers: dict[str, Any] = {}
    for kind in KINDS:
        stats, _ = pycocotools_stats(truth, results, kind)
        numbers[kind] = {name: stats[place] for name, place in METRICS.items()}
    return numbers


def coco_ground_truth(shards: ShardSet) -> dict[str, Any]:
    """Return the annotations of all samples as the content of a COCO file.

    Annotations are numbered anew from 1: some data sets have the id 0, which pycocotools takes for
    "not matched". What cannot be measured of a kind is a region to ignore: for masks an object
    without one.
    """
    ids = [category.id for category in shards.categories]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in range(len(shards)):
        record = shards.record(row)
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": record["file_name"], **size})
        for source in record["annotations"]:
            annotation = {key: source[key] for key in ("bbox", "area", "iscrowd")}
            for key in ("segmentation", "keypoints"):
                if key in source:
                    annotation[key] = source[key]
            annotation["image_id"], annotation["id"] = record["image_id"], len(annotations) + 1
            annotation["category_id"] = ids[source["label"]]
            annotations.append(annotation)
    categories = [{"id": category.id, "name": category.name} for category in shards.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def pycocotools_stats(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> tuple[list[float | None], dict[int, float | None]]:
    """Return ``COCOeval.stats`` and the AP of each category by its id; None for its -1.

    Args:
        truth: the content of a COCO file.
        results: COCO results. The area of a mask is that of its pixels, as in the COCO server;
            pycocotools would take that of a box in the result.
        kind: ``bbox``, ``segm`` or ``keypoints``.
    """
    annotations = [_truth_of(annotation, kind) for annotation in truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        gt, found = COCO(), COCO()
        gt.dataset = {**truth, "annotations": annotations}
        gt.createIndex()
        if results:
            key = "segmentation" if kind == "segm" else kind
            keys = ("image_id", "category_id", "score", key)
            found = gt.loadRes([{key: result[key] for key in keys} for result in results])
        evaluation = COCOeval(gt, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [None if number < 0 else float(number) for number in evaluation.stats]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, categories)
    aps: dict[int, float | None] = {}
    for place, number in enumerate(evaluation.params.catIds):
        defined = precision[:, :, place][precision[:, :, place] > -1]
        aps[number] = float(defined.mean()) if defined.size else None
    return stats, aps


def _truth_of(annotation: dict[str, Any], kind: str) -> dict[str, Any]:
    """Copy an annotation, which pycocotools writes into, with what this kind needs of it."""
    if kind == "segm" and "segmentation" not in annotation:
        x, y, width, height = annotation["bbox"]
        right, bottom = x + width, y + height
        corners = [[x, y, right, y, right, bottom, x, bottom]]
        return {**annotation, "segmentation": corners, "iscrowd": 1}
    if kind == "keypoints":
        points = annotation.get("keypoints", [0] * 51)
        num_labeled = sum(visibility > 0 for visibility in points[2::3])
        return {**annotation, "keypoints": points, "num_keypoints": num_labeled}
    return dict(annotation)
