"""Compares the cost of computing AP with that of other programs, on synthetic detections.

The images repeat those of the validation set. The detections are masks and boxes of its objects,
moved; some have a wrong class or are where no object is. pycocotools, and hotcoco and
faster-coco-eval where they are installed, score the same results file, from reading it to the
numbers, in turn and each in its own process; as in pycocotools, the area of a detection is that of
its box. With --boxes it has no masks. The numbers must be equal to the last digit. Seconds, CPU
seconds (which depend less on the load of the machine) and memory are medians over --rounds;
``memory_gib`` is the peak of each process minus what it had after its imports, and ``cpu_ratio`` a
program's CPU seconds over bigdet's.

With --classes, objects and detections are entirely synthetic: boxes only, many of a few classes and
few of most. Only bigdet runs, and computes all that ``bigdet evaluate --analysis`` prints: for sets
that are too large for pycocotools, such as Objects365's 80,000 images.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from bigdet.benchmarks.memory import peak_memory, start_memory
from bigdet.config.run import RunConfig
from bigdet.data.format.manifest import Category
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.evaluation.coco_metrics import METRICS, measure
from bigdet.evaluation.detections import RESULT_KEYS, Kind, load_results, read_detections
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import evaluate_detections

KINDS: tuple[Kind, ...] = ("bbox", "segm")
PEERS = {
    "hotcoco": (("hotcoco", "COCO"), ("hotcoco", "COCOeval")),
    "faster_coco_eval": (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),
    "pycocotools": (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),
}
"""Other programs: the module and name of the class of a data set, and of that which scores."""
NUM_STATS = 12
"""Numbers of boxes and masks in ``COCOeval.stats``; faster-coco-eval has more after them."""
POOL = 300
"""Number of different detections of a source image."""
WRONG_CLASS, NOTHING_THERE = 0.1, 0.4
"""Fractions of the detections."""


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return seconds, memory and the ratio, after comparing all numbers."""
    if arguments.classes:
        if arguments.peers is not None:
            raise ValueError("--peers: with --classes only bigdet runs. Leave one of them out.")
        with tempfile.TemporaryDirectory() as name:
            make_boxes(Path(name), arguments)
            return in_a_process("boxes", Path(name), ())
    source = ShardSet(config.data.val.shards, cache=config.data.cache)
    peers = chosen_peers(arguments.peers)
    kinds = KINDS[:1] if arguments.boxes else KINDS
    with tempfile.TemporaryDirectory() as name:
        make_inputs(source, Path(name), arguments, kinds)
        turns = [
            {program: in_a_process(program, Path(name), kinds) for program in ("bigdet", *peers)}
            for _ in range(arguments.rounds)
        ]
    numbers = turns[0]["bigdet"]["numbers"]
    for turn in turns:
        for program, found in turn.items():
            assert found["numbers"] == numbers, (program, found["numbers"], numbers)
    cpu_seconds = _medians(turns, "cpu_seconds")
    return {
        "images": arguments.images,
        "detections": arguments.images * arguments.detections,
        "versions": {program: metadata.version(program) for program in peers},
        "seconds": _medians(turns, "seconds"),
        "cpu_seconds": cpu_seconds,
        "cpu_ratio": {program: cpu_seconds[program] / cpu_seconds["bigdet"] for program in peers},
        "memory_gib": _medians(turns, "memory_gib"),
        "numbers": {
            kind: {name: stats[place] for name, place in METRICS.items()}
            for kind, stats in numbers.items()
        },
    }


def chosen_peers(names: str | None) -> list[str]:
    """Return the programs of a list, or all that are installed.

    Raises:
        ValueError: one is unknown or not installed.
    """
    installed = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    chosen = installed if names is None else names.split(",")
    for name in chosen:
        if name not in installed:
            raise ValueError(
                f"--peers: found {name!r}, expected some of {', '.join(PEERS)} that are installed: "
                f"{', '.join(installed)}."
            )
    return chosen


def _medians(turns: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Return the median of a number over all turns, by program."""
    return {
        program: statistics.median(turn[program][key] for turn in turns) for program in turns[0]
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


def make_inputs(
    source: ShardSet, folder: Path, arguments: argparse.Namespace, kinds: Sequence[Kind]
) -> None:
    """Write shards of blank images, their annotations as a COCO file, and synthetic results."""
    left_out = {RESULT_KEYS[kind] for kind in KINDS} - {RESULT_KEYS[kind] for kind in kinds}
    random = np.random.default_rng(arguments.seed)
    records = [source.record(row) for row in range(len(source))]
    for record in records:
        record["annotations"] = [a for a in record["annotations"] if "segmentation" in a]
    pools: dict[int, list[dict[str, Any]]] = {}
    blank = blank_image()
    with (
        new_shards(folder, source.categories) as writer,
        (folder / "results.json").open("wb") as results,
    ):
        for image_id in range(1, arguments.images + 1):
            number = int(random.integers(len(records)))
            writer.add(blank, {**records[number], "image_id": image_id})
            if number not in pools:
                pools[number] = make_pool(records[number], records, source, random)
                for result in pools[number]:
                    for key in left_out:
                        del result[key]
            chosen = random.choice(len(pools[number]), arguments.detections, replace=False)
            made = [{"image_id": image_id, **pools[number][place]} for place in chosen]
            add_results(results, made)
        results.write(b"]")
    truth = coco_ground_truth(ShardSet(folder / "shards"))
    (folder / "truth.json").write_bytes(orjson.dumps(truth))


def add_results(file: IO[bytes], results: list[dict[str, Any]]) -> None:
    """Append results to a JSON list, whose end is still to be written."""
    file.write(b"," if file.tell() else b"[")
    file.write(orjson.dumps(results)[1:-1])


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
            add_results(results, made)
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


def in_a_process(program: str, folder: Path, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Run a program in a fresh process; return its numbers, seconds and peak memory in GiB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, program, folder, kinds).result()


def _measure(program: str, folder: Path, kinds: Sequence[Kind]) -> dict[str, Any]:
    own = {"bigdet": score_bigdet, "boxes": score_boxes}
    score = own[program] if program in own else peer_scorer(program)
    cpu = torch.device("cpu")
    before = start_memory(cpu)
    started, cpu_started = time.perf_counter(), time.process_time()
    numbers = score(folder, kinds)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    found = {"numbers": numbers, "seconds": seconds, "cpu_seconds": cpu_seconds}
    return {**found, "memory_gib": (peak_memory(cpu) - before) / (1 << 30)}


def score_bigdet(folder: Path, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Return our numbers."""
    truth = read_ground_truth(ShardSet(folder / "shards"), "segm" in kinds, with_keypoints=False)
    results = load_results(folder / "results.json")
    found = read_detections(results, truth, kinds, one_area=True)
    return {kind: measure(truth, found, kind).stats() for kind in kinds}


def score_boxes(folder: Path, _kinds: Sequence[Kind] = ()) -> dict[str, Any]:
    """Return our numbers of boxes, after all else that an evaluation computes."""
    results = load_results(folder / "results.json")
    return dict(evaluate_detections(ShardSet(folder / "shards"), results, ["bbox"])["bbox"])


def peer_scorer(name: str) -> Callable[[Path, Sequence[Kind]], dict[str, Any]]:
    """Import a program and return what scores with it."""
    coco, evaluator = (
        getattr(importlib.import_module(module), attribute) for module, attribute in PEERS[name]
    )

    def score(folder: Path, kinds: Sequence[Kind]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco(str(folder / "truth.json"))
            found = truth.loadRes(str(folder / "results.json"))
            for kind in kinds:
                evaluation = evaluator(truth, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                stats = [float(number) for number in evaluation.stats[:NUM_STATS]]
                numbers[kind] = [None if number < 0 else number for number in stats]
        return numbers

    return score


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
