"""The model over a whole split: every image once, on whichever rank, detections on rank 0.

Detections go to a file on disk as they come, so memory does not grow with the images. Also the one
place where a model's output (labels, 28x28 masks) becomes COCO results (category ids, masks of the
image as run lengths).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from bigdet import distributed
from bigdet.config.engine import Precision
from bigdet.config.run import RunConfig
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import EvalStream
from bigdet.engine.precision import autocast
from bigdet.evaluation.coco_metrics import category_ids
from bigdet.evaluation.detections import Result
from bigdet.evaluation.saved import SavedResults
from bigdet.models.detector import evaluating, scale_detections
from bigdet.ops.masks import paste_mask
from bigdet.structures import Batch, Detections

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Passes:
    """How a module sees images.

    Attributes:
        size_cap: short side and longest long side at which images are seen, pixels; None for
            modules that resize images themselves.
        images_per_gpu: images in one forward pass of one rank.
        workers: loader processes per rank.
        precision: of activations and matrix products; weights are as they are.
    """

    size_cap: tuple[int, int] | None
    images_per_gpu: int
    workers: int = 0
    precision: Precision = "fp32"


def passes_of(config: RunConfig, size_cap: tuple[int, int] | None) -> Passes:
    """Return how the images of an evaluation are seen."""
    images_per_gpu, precision = config.evaluation.images_per_gpu, config.engine.precision
    return Passes(size_cap, images_per_gpu, config.data.workers, precision)


@torch.no_grad()
def predict_split(
    module: nn.Module,
    shards: ShardSet,
    passes: Passes,
    device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
    folder: Path | None = None,
    ids: Sequence[int | None] | None = None,
) -> SavedResults | None:
    """Detect the objects on every image of a shard set; every rank must call it.

    Args:
        module: the detector; in evaluation mode meanwhile, then as it was.
        shards: the validation set.
        passes: how the module sees the images.
        device: of the module.
        must_stop: asked on all ranks after every batch (a collective); the same answer on all.
        folder: where detections wait on disk, None for the system's place for temporary files.
            Nothing is left there, whatever happens.
        ids: the set's category id of each label of the module; detections of a label that has None
            are left out. None for a module whose labels are those of the set.

    Returns:
        On rank 0 the COCO results of all images, by image id, best first within an image; nothing
        on the other ranks. None on all when they had to stop.

    Raises:
        SharedError: on every rank, when one of them cannot read an image: a number over fewer
            images would be another number.
    """
    batches = EvalStream(
        shards,
        size_cap=passes.size_cap,
        images_per_gpu=passes.images_per_gpu,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=passes.workers,
    )
    results = SavedResults(folder)
    collected = _Collected(category_ids(shards) if ids is None else ids, len(shards), results)
    problem: Exception | None = None
    with evaluating(module):
        source = iter(batches)
        for _ in range(len(batches)):  # equally many on all ranks, as are the collectives
            try:
                batch = next(source)
            except (ValueError, OSError) as error:
                problem = error
            # Before the forward pass: where weights are sharded, that is a collective too.
            if distributed.any_rank(problem is not None):
                break
            with autocast(device, passes.precision):
                found = module(batch.to(device))
            try:
                collected.add(batch, found)
            except OSError as error:  # a full disk: told with the next batch
                problem = error
            if must_stop():
                return None
    with distributed.together():
        if problem is not None:
            raise problem
    if collected.num_not_finite:
        logger.warning(
            "evaluation: %d detections of this rank were not finite and left out; the model may "
            "have diverged", collected.num_not_finite,
        )  # fmt: skip
    results.gather()
    if distributed.is_main():
        seen = results.image_ids()
        assert seen == sorted(shards.index["image_id"].tolist()), "images left out or seen twice"
    return results


def coco_results(
    detections: Detections, image_id: int, size: tuple[int, int], ids: Sequence[int | None]
) -> list[Result]:
    """Return the detections of one image as COCO results.

    Args:
        detections: on the CPU, boxes in pixels of the image.
        image_id: the data set's number of it.
        size: height and width of the image.
        ids: the data set's category id of each label.
    """
    boxes = detections.boxes.numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]  # xywh
    results: list[Result] = [
        {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            detections.labels.tolist(),
            boxes.tolist(),
            detections.scores.tolist(),
            strict=True,
        )
    ]
    if detections.masks is not None:
        # One at a time: 100 bitmaps of a large photo would be gigabytes.
        for result, mask, box in zip(results, detections.masks, detections.boxes, strict=True):
            result["segmentation"] = _run_lengths(mask, box, size)
    if detections.keypoints is not None:
        # COCO counts pixels: its 0 is the center of the first, where ours is 0.5.
        shifted = detections.keypoints - detections.keypoints.new_tensor([0.5, 0.5, 0.0])
        for result, points in zip(results, shifted.flatten(1).tolist(), strict=True):
            result["keypoints"] = points
    return results


def finite_detections(found: Detections) -> tuple[Detections, int]:
    """Leave out detections that no metric can take, which a diverging model makes.

    Returns:
        The others, and how many were left out.
    """
    is_finite = found.boxes.isfinite().all(dim=1) & found.scores.isfinite()
    if found.keypoints is not None:
        is_finite &= found.keypoints.isfinite().flatten(1).all(dim=1)
    return _only(found, is_finite), int((~is_finite).sum())


class _Collected:
    """What this rank has found so far.

    Attributes:
        num_not_finite: detections left out because no metric can take them.
    """

    def __init__(self, ids: Sequence[int | None], num_images: int, results: SavedResults) -> None:
        """Begin with nothing.

        Args:
            ids: the data set's category id of each label; None for a class that it does not have.
            num_images: of all ranks, for the progress line.
            results: where detections go.
        """
        self._ids, self._num_images, self._results = ids, num_images, results
        self._is_known = torch.tensor([number is not None for number in ids])
        self.num_not_finite = 0
        self._start = self._reported = time.monotonic()

    def add(self, batch: Batch, found: Sequence[Detections]) -> None:
        """Take the detections of a batch, boxes in pixels of its canvas."""
        for slot, detections in enumerate(found):
            if batch.weights[slot] == 0:
                continue  # it only makes this rank's number of passes that of the others
            image_id = int(batch.image_ids[slot])
            image_size, size = _size(batch.image_sizes[slot]), _size(batch.original_sizes[slot])
            detections = detections.to(torch.device("cpu"))
            detections = _only(detections, self._is_known[detections.labels])
            moved = scale_detections(detections, image_size, size)
            moved, num_left_out = finite_detections(moved)
            self.num_not_finite += num_left_out
            self._results.add(image_id, coco_results(moved, image_id, size, self._ids))
        now = time.monotonic()
        if self._results.num_images and now - self._reported > PROGRESS_SECONDS:
            self._reported = now
            num_done = self._results.num_images * distributed.world_size()
            _log_progress(num_done, self._num_images, now - self._start)


def _only(found: Detections, is_kept: Tensor) -> Detections:
    """Return those of the detections that a mask ``(N,)`` keeps."""
    if is_kept.all():
        return found
    parts = {
        field.name: value[is_kept]
        for field in fields(found)
        if (value := getattr(found, field.name)) is not None
    }
    return Detections(**parts)


def _size(height_and_width: Tensor) -> tuple[int, int]:
    height, width = height_and_width.tolist()
    return height, width


def _run_lengths(prob: Tensor, box: Tensor, size: tuple[int, int]) -> dict[str, object]:
    """Return a mask ``(28, 28)`` over a box as compressed RLE of the whole image.

    Only the pixels around the box are drawn: 2.5 times as fast as the whole image at 480x640, 4
    times at 3000x4000. The counts are text, as JSON wants them.
    """
    height, width = size
    x0, y0, x1, y1 = box.tolist()
    left, top = math.floor(x0), math.floor(y0)
    right, bottom = math.ceil(x1), math.ceil(y1)
    shift = box.new_tensor([left, top, left, top])
    bitmap = np.zeros((height, width), dtype=np.uint8, order="F")  # RLE runs down the columns
    crop = paste_mask(prob, box - shift, bottom - top, right - left)
    bitmap[top:bottom, left:right] = crop.numpy()
    return {"size": [height, width], "counts": coco_mask.encode(bitmap)["counts"].decode()}


def _log_progress(num_done: int, num_images: int, seconds: float) -> None:
    """Log one line; other ranks are taken to be as far as this one."""
    num_done = min(num_done, num_images)
    speed = num_done / seconds
    logger.info(
        "evaluation: %d of %d images, %.1f images/s, %.0f s left",
        num_done, num_images, speed, (num_images - num_done) / speed,
    )  # fmt: skip
