"""Detections in the COCO results format, checked, as flat arrays.

A result is a dict with ``image_id``, ``category_id``, ``score`` and one or more of ``bbox`` (xywh,
pixels of the original image), ``segmentation`` (RLE, compressed or not, or polygons) and
``keypoints`` (x, y, and a third number that is ignored). As in pycocotools, if the first result has
no box, boxes are computed from the masks; the mask of a result without one is its box.

Letters: N detections, P keypoints of a detection.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from bigdet.evaluation.ground_truth import GroundTruth
from bigdet.evaluation.json_numbers import are_finite_numbers, as_integers, as_numbers, is_whole
from bigdet.evaluation.run_lengths import all_counts, are_outlines, mask_areas, mask_counts

Kind = Literal["bbox", "segm", "keypoints"]
Result = dict[str, Any]  # one detection in the COCO results format

RESULT_KEYS: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""The key of a result that each kind needs."""

_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
CHUNK = 4096  # results converted to arrays at once
PART_BYTES = 1 << 18  # bytes of a file of results parsed at once: their objects fit into a cache
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*\{")
_TAIL_BYTES = 1 << 14  # where the end of the last object but one is searched first


class ResultsError(ValueError):
    """A detection that cannot be scored."""


@dataclass(frozen=True)
class DetectionTable:
    """Detections of a whole split, in their original order.

    Attributes:
        images: ``(N,)`` int64, indices into ``GroundTruth.image_ids``.
        labels: ``(N,)`` int64.
        scores: ``(N,)`` float64.
        boxes: ``(N, 4)`` float64 xywh, pixels; ``(0, 4)`` if boxes are not scored, and the same
            for masks and keypoints.
        masks: N counts of compressed RLE.
        mask_areas: ``(N,)`` float64, pixels.
        keypoints: ``(N, P, 3)`` float64; the third number is ignored.
        areas: ``(N,)`` float64, pixels: whether a detection is small, medium or large for all
            kinds; None: each kind has its own area.
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    boxes: NDArray[np.float64]
    masks: list[bytes]
    mask_areas: NDArray[np.float64]
    keypoints: NDArray[np.float64]
    areas: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Switch off garbage collection, which would scan millions of new objects: 3 times as fast."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_results(file: Path) -> Iterator[Result]:
    """Yield the detections of a COCO results file; only a part is in memory at a time."""
    return itertools.chain.from_iterable(_lists(file))  # no step of Python for each


def _lists(file: Path) -> Iterator[list[Result]]:
    try:
        with file.open("rb") as opened:
            for part in _parts(opened):
                if not isinstance(part, list):
                    raise ResultsError(
                        f"{file}: found a {type(part).__name__}, expected a list of detections, "
                        f"each with image_id, category_id, score and bbox, segmentation or "
                        f"keypoints."
                    )
                yield part
    except FileNotFoundError as error:
        raise ResultsError(f"{file}: there is no such results file.") from error
    except orjson.JSONDecodeError as error:
        found = error.doc[error.pos : error.pos + 20]
        raise ResultsError(
            f"{file}: not a readable JSON file: {error.msg} at {found or 'its end'!r}. Leave "
            f"detections with NaN or Infinity out: they are not JSON. Write it again if it is cut."
        ) from error
    except OSError as error:
        raise ResultsError(f"{file}: cannot be read ({error}).") from error


def _parts(opened: IO[bytes]) -> Iterator[Any]:
    """Yield a JSON list as several shorter lists; any other JSON value as it is."""
    text = b""
    while more := opened.read(max(PART_BYTES, len(text))):
        text += more
        tail = max(len(text) - _TAIL_BYTES, 0)
        for cut in _last_cut(text, tail) or _last_cut(text, 0):
            try:  # if valid, the cut was not inside a string or an inner list
                part = orjson.loads(text[: cut.start() + 1] + b"]")
            except orjson.JSONDecodeError:
                continue
            yield part
            text = b"[" + text[cut.end() - 1 :]
    yield orjson.loads(text)


def _last_cut(text: bytes, first: int) -> collections.deque[re.Match[bytes]]:
    return collections.deque(_BETWEEN_OBJECTS.finditer(text, first), maxlen=1)


def read_detections(
    results: Iterable[Result],
    truth: GroundTruth,
    kinds: Sequence[Kind],
    where: str = "results",
    one_area: bool = False,
) -> DetectionTable:
    """Check detections and convert them to arrays; only a few exist as dicts at a time.

    Args:
        results: of images of the ground truth, in any order.
        truth: the ground truth.
        kinds: each result must have the keys of these kinds.
        where: origin of the results, for messages.
        one_area: a detection has the same area for all kinds, as in pycocotools' ``loadRes``: that
            of the box if the first detection has one, else that of the mask.

    Raises:
        ResultsError: with the first detection that has something missing or wrong.
    """
    reader = _Reader(truth, kinds, where, one_area)
    with without_collector():
        parts = [reader.read(chunk) for chunk in _chunks(results)] or [reader.read([])]
    areas = [part.areas for part in parts if part.areas is not None]
    return DetectionTable(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        boxes=np.concatenate([part.boxes for part in parts]),
        masks=[mask for part in parts for mask in part.masks],
        mask_areas=np.concatenate([part.mask_areas for part in parts]),
        keypoints=np.concatenate([part.keypoints for part in parts]),
        areas=np.concatenate(areas) if areas else None,
    )


def _chunks(results: Iterable[Result]) -> Iterator[list[Result]]:
    source = iter(results)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield chunk


class _Reader:
    """Converts results to arrays, many at a time; if that fails, finds the wrong result."""

    def __init__(
        self, truth: GroundTruth, kinds: Sequence[Kind], where: str, one_area: bool
    ) -> None:
        self._truth, self._kinds, self._where = truth, kinds, where
        self._one_area = one_area
        self._area_kind: Kind | None = None  # whose area is that of all kinds
        self._num_points = truth.keypoints.shape[1]
        self._num_pixels = truth.sizes.prod(axis=1)
        self._ids = np.array([category.id for category in truth.categories], dtype=np.int64)
        self._by_id = np.argsort(self._ids)
        self._num_read = 0
        self._boxes_masks = False  # boxes are computed from the masks

    def read(self, chunk: Sequence[Result]) -> DetectionTable:
        if self._num_read == 0 and chunk and isinstance(chunk[0], dict):
            has_box = chunk[0].get("bbox") not in (None, [])
            self._boxes_masks = not has_box and _has_mask(chunk[0])
            if self._one_area and (has_box or self._boxes_masks):
                self._area_kind = "bbox" if has_box else "segm"
        try:
            table = self._read(chunk)
        except _UNREADABLE:
            for number, result in enumerate(chunk, self._num_read + 1):
                if problem := self._problem(result) or self._other_problem(result):
                    raise ResultsError(f"{self._where}: detection {number}: {problem}") from None
            raise
        self._num_read += len(chunk)
        return table

    def _read(self, chunk: Sequence[Result]) -> DetectionTable:
        """Return the table; one of ``_UNREADABLE`` if a detection is wrong."""
        count = len(chunk)
        ids, labels = as_integers(_column(chunk, "image_id")), self._labels(chunk)
        known = self._truth.image_ids
        images = np.searchsorted(known, ids)
        if count and (images.max() == len(known) or (known[images] != ids).any()):
            raise ValueError("unknown image")
        scores = as_numbers(_column(chunk, "score"), (count,))
        boxes, keypoints = np.zeros((0, 4)), np.zeros((0, self._num_points, 3))
        masks: list[bytes] = []
        areas = np.zeros(0)
        if "bbox" in self._kinds:
            if self._boxes_masks:
                chunk = [self._boxed(r, n) for r, n in zip(chunk, images.tolist(), strict=True)]
            boxes = as_numbers(_column(chunk, "bbox"), (count, 4))
            if (boxes[:, 2:] < 0).any():
                raise ValueError("negative size")
        if "keypoints" in self._kinds:
            shape = (count, 3 * self._num_points)
            points = as_numbers(_column(chunk, "keypoints"), shape)
            keypoints = points.reshape(count, self._num_points, 3)
        if "segm" in self._kinds or self._area_kind == "segm":
            sizes = self._truth.sizes[images].tolist()
            masks = all_counts([r.get("segmentation") or _outline(r) for r in chunk], sizes)
            areas, is_mask = mask_areas(masks, self._num_pixels[images])
            if not is_mask.all():
                raise ValueError("not a mask of the image")
        own = {"bbox": boxes[:, 2] * boxes[:, 3], "segm": areas}.get(self._area_kind or "")
        return DetectionTable(images, labels, scores, boxes, masks, areas, keypoints, own)

    def _boxed(self, result: Result, place: int) -> Result:
        """Return a result with a box: its own, or that of its mask."""
        if result.get("bbox") or not _has_mask(result):
            return result
        size = self._truth.sizes[place].tolist()
        counts = mask_counts(result["segmentation"], size)
        if not mask_areas([counts], self._num_pixels[[place]])[1].all():
            raise ValueError("not a mask of the image")
        return result | {"bbox": coco_mask.toBbox({"size": size, "counts": counts}).tolist()}

    def _other_problem(self, result: Result) -> str:
        """Return a message if a detection is wrong in an unforeseen way; empty if it is right."""
        try:
            self._read([result])
        except _UNREADABLE:
            return f"found {_shown(result)}, expected a detection in the COCO results format."
        return ""

    def _labels(self, chunk: Sequence[Result]) -> NDArray[np.int64]:
        ids = as_integers(_column(chunk, "category_id"))
        places = np.searchsorted(self._ids, ids, sorter=self._by_id)
        labels: NDArray[np.int64] = self._by_id[np.minimum(places, len(self._ids) - 1)]
        if (self._ids[labels] != ids).any():
            raise ValueError("unknown category")
        return labels

    def _problem(self, result: Any) -> str:
        """Return what is wrong with a detection and what to do; empty if nothing is found."""
        truth = self._truth
        if not isinstance(result, dict):
            return (
                f"found {_shown(result)}, expected an object with image_id, category_id and score."
            )
        is_boxed = self._boxes_masks and not result.get("bbox") and _has_mask(result)
        keys = {RESULT_KEYS[kind]: None for kind in self._kinds}
        if "segm" in self._kinds and not _has_mask(result):
            keys = {"bbox": None, **keys}  # its box is its mask
            del keys["segmentation"]
        if is_boxed:
            keys = {"segmentation": None, **keys}
            keys.pop("bbox", None)
        for key in ("image_id", "category_id", "score", *keys):
            if key not in result:
                return f"has no {key}. Each detection needs one" + (
                    "; ground truth is not a results file." if key == "score" else "."
                )
        image_id, score = result["image_id"], result["score"]
        place = int(np.searchsorted(truth.image_ids, image_id)) if is_whole(image_id) else -1
        if place not in range(len(truth.image_ids)) or truth.image_ids[place] != image_id:
            return (
                f"image_id is {_shown(image_id)}, which none of the {len(truth.image_ids)} images "
                f"of {truth.address} has. Give results of the same images."
            )
        category_id = result["category_id"]
        if not is_whole(category_id) or category_id not in self._ids.tolist():
            return (
                f"category_id is {_shown(category_id)}, which none of the "
                f"{len(self._ids)} categories of {truth.address} has. Use the data set's ids."
            )
        if not are_finite_numbers([score], 1):
            return f"score is {_shown(score)}, expected a number."
        box = result.get("bbox")
        if "bbox" in keys and not (are_finite_numbers(box, 4) and min(result["bbox"][2:]) >= 0):
            return f"bbox is {_shown(box)}, expected four numbers: x, y, width, height in pixels."
        expected = 3 * self._num_points
        if "keypoints" in self._kinds and not are_finite_numbers(result["keypoints"], expected):
            return (
                f"keypoints are {_shown(result['keypoints'])}, expected {expected} numbers: x, y "
                f"and a score of each of {self._num_points} points."
            )
        return self._mask_problem(result["segmentation"], place) if "segmentation" in keys else ""

    def _mask_problem(self, mask: Any, place: int) -> str:
        size = self._truth.sizes[place].tolist()
        if isinstance(mask, list):
            if are_outlines(mask, size):
                return ""
            return (
                f"segmentation is {_shown(mask)}, expected polygons: lists of x, y of at least "
                f"three points in the image of height and width {size}, or compressed RLE."
            )
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (str, bytes, list)):
            return (
                f"segmentation is {_shown(mask)}, expected compressed RLE: an object with size and "
                f"counts, a string. pycocotools.mask.encode makes it from a bitmap."
            )
        if mask.get("size") != size:
            return (
                f"the mask has size {_shown(mask.get('size'))}, but its image has height and width "
                f"{size}. Give masks of the original images."
            )
        try:
            counts = mask_counts(mask, size)
        except _UNREADABLE:
            counts = b""
        if not mask_areas([counts], self._num_pixels[[place]])[1].all():
            return f"the counts of the mask do not make an image of {size[0]} x {size[1]} pixels."
        return ""


def _has_mask(result: Result) -> bool:
    return result.get("segmentation") not in (None, [])


def _outline(result: Result) -> Any:
    """Return the mask of a result, or its box as a polygon, in pycocotools' order."""
    if _has_mask(result):
        return result["segmentation"]
    x, y, width, height = result["bbox"]
    right, bottom = x + width, y + height
    return [[x, y, x, bottom, right, bottom, right, y]]


def _column(chunk: Sequence[Result], key: str) -> list[Any]:
    return list(map(operator.itemgetter(key), chunk))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
