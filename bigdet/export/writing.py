"""Exported detectors: writing them, running them, and comparing them with the detector itself.

``export/fixed.py`` defines what they compute.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigdet.config.families import DETECTORS, detector_facts
from bigdet.config.model import has_masks
from bigdet.export.fixed import FixedDetector, plain_batch
from bigdet.models.detector import Detector
from bigdet.ops.resize import resize_image
from bigdet.ops.sizes import CANVAS_MULTIPLE, eval_size
from bigdet.structures import Batch

SUFFIXES = (".onnx", ".pt2")
INPUTS = ["images", "image_sizes"]
OUTPUTS = ["boxes", "scores", "labels", "is_valid", "masks"]
METADATA = "bigdet.json"  # in a .pt2

Exported = Callable[[Tensor, Tensor], list[NDArray[Any]]]
"""Images and their sizes to the outputs, see ``FixedDetector.forward``."""


@dataclass(frozen=True)
class Differences:
    """How far an exported detector is from the detector.

    Attributes:
        detections: number of the detector's detections.
        unmatched: detections that only one of the two has.
        box: largest distance of an edge, pixels.
        score: largest difference, in [0, 1].
        mask: largest difference of a probability.
    """

    detections: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0

    def joined(self, other: Differences) -> Differences:
        """Return the differences of both together."""
        return Differences(
            self.detections + other.detections,
            self.unmatched + other.unmatched,
            max(self.box, other.box),
            max(self.score, other.score),
            max(self.mask, other.mask),
        )

    def is_within(self, limits: Differences) -> bool:
        """Return whether nothing exceeds the limits; the number of detections does not count."""
        mine = (self.unmatched, self.box, self.score, self.mask)
        most = (limits.unmatched, limits.box, limits.score, limits.mask)
        return all(value <= limit for value, limit in zip(mine, most, strict=True))

    def __str__(self) -> str:
        return (
            f"{self.detections} detections, {self.unmatched} unmatched, boxes {self.box:.1e} px, "
            f"scores {self.score:.1e}, masks {self.mask:.1e}"
        )


TOLERANCES = Differences(box=0.1, score=1e-3, mask=0.01)
"""Differences due to fp32 sums in another order. A detection whose score is this close to the
threshold, or to the last one of a full image, may be missing."""


def check_exportable(detector: Detector, out: Path, size: tuple[int, int], num_images: int) -> None:
    """Raise ``ValueError`` where a detector, a file or a size cannot be exported."""
    kind = detector.config.detector
    if not detector_facts(kind).is_exportable:
        known = [name for name, facts in DETECTORS.items() if facts.is_exportable]
        raise ValueError(f"found a {kind}, expected one of {', '.join(known)} to export.")
    if (nms := getattr(detector.eval_settings, "nms", "hard")) != "hard":
        raise ValueError(
            f"found nms: {nms}, expected hard: an exported detector has no soft-NMS. Evaluate it "
            f"with nms=hard, and train or convert it without the option."
        )
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}.")
    if any(side < 2 * CANVAS_MULTIPLE or side % CANVAS_MULTIPLE for side in size):
        raise ValueError(
            f"--size: found {size[0]} {size[1]}, expected multiples of {CANVAS_MULTIPLE}, at "
            f"least {2 * CANVAS_MULTIPLE}."
        )
    if num_images < 1:
        raise ValueError(f"--batch: found {num_images}, expected 1 or more.")
    if out.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{out}: {error.name} is not installed: pip install 'bigdet[export]'."
            ) from error


def write_exported(
    detector: Detector, out: Path, size: tuple[int, int], num_images: int, num_candidates: int
) -> None:
    """Write a detector as a file for images of one size.

    Args:
        detector: on the CPU, in evaluation mode.
        out: ``.onnx`` or ``.pt2``.
        size: height, width of the canvas.
        num_images: B, fixed in the file.
        num_candidates: n of ``FixedDetector``.
    """
    fixed = FixedDetector(detector, num_candidates).eval()
    images = torch.zeros(num_images, 3, *size, dtype=torch.uint8)
    sizes = torch.tensor([size] * num_images)
    facts = {
        "categories": json.dumps(detector.categories),
        "test_size": json.dumps(detector.eval_size),
    }
    with warnings.catch_warnings():  # of torchvision and the exporter, not for users
        warnings.simplefilter("ignore")
        program = torch.export.export(fixed, (images, sizes), strict=False)
        if out.suffix == ".pt2":
            written = io.BytesIO()  # torch's own writer ends the process on a full disk
            torch.export.save(program, written, extra_files={METADATA: json.dumps(facts)})
            out.write_bytes(written.getbuffer())
            return
        names = OUTPUTS if has_masks(detector.config) else OUTPUTS[:-1]
        logging.disable(logging.WARNING)
        try:
            onnx = torch.onnx.export(
                program, dynamo=True, input_names=INPUTS, output_names=names, verbose=False
            )
        finally:
            logging.disable(logging.NOTSET)
    assert onnx is not None
    onnx.model.metadata_props.update(facts)
    onnx.save(str(out))


def load_exported(path: Path) -> Exported:
    """Open a file that `write_exported` wrote, with onnxruntime or torch, on the CPU."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

        def run_onnx(images: Tensor, sizes: Tensor) -> list[NDArray[Any]]:
            given = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
            return list(session.run(None, given))

        return run_onnx
    module = torch.export.load(path).module()

    def run_program(images: Tensor, sizes: Tensor) -> list[NDArray[Any]]:
        return [output.numpy() for output in module(images, sizes)]

    return run_program


def on_canvas(detector: Detector, image: Tensor, size: tuple[int, int], num_images: int) -> Batch:
    """Resize an image as the detector does at test, or smaller to fit, and put it on a canvas.

    Args:
        detector: has the test size, ``eval_size``.
        image: ``(3, h, w)`` uint8.
        size: height, width of the canvas.
        num_images: B, all of them the same image.
    """
    height, width = eval_size(image.shape[1], image.shape[2], *detector.eval_size)
    scale = min(1.0, size[0] / height, size[1] / width)
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    canvas = torch.zeros(num_images, 3, *size, dtype=torch.uint8)
    canvas[:, :, :height, :width] = resize_image(image, (height, width))
    return plain_batch(canvas, torch.tensor([(height, width)] * num_images))


def compare(detector: Detector, exported: Exported, batch: Batch) -> Differences:
    """Compare the detections of both on a batch, each with the nearest one of the other."""
    outputs = exported(batch.images, batch.image_sizes)
    settings = detector.eval_settings
    total = Differences()
    with torch.no_grad():
        images = detector(batch)
    for number, found in enumerate(images):
        is_valid = outputs[3][number]
        theirs = [output[number][is_valid] for output in outputs]
        ours = [found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()]
        most = settings.detections_per_image
        full = [scores.min() for scores in (ours[1], theirs[1]) if len(scores) == most]
        cut = max([settings.score_threshold, *full]) + TOLERANCES.score
        pairs = _pairs(ours, theirs)
        left = set(range(len(theirs[0]))) - {theirs_row for _, theirs_row in pairs}
        alone = set(range(len(ours[0]))) - {ours_row for ours_row, _ in pairs}
        rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        masks = 0.0
        if found.masks is not None and len(rows):
            masks = float(np.abs(found.masks.numpy()[rows] - theirs[4][columns]).max())
        total = total.joined(
            Differences(
                detections=len(ours[0]),
                unmatched=sum(bool(ours[1][row] > cut) for row in alone)
                + sum(bool(theirs[1][row] > cut) for row in left),
                box=float(np.abs(ours[0][rows] - theirs[0][columns]).max(initial=0.0)),
                score=float(np.abs(ours[1][rows] - theirs[1][columns]).max(initial=0.0)),
                mask=masks,
            )
        )
    return total


def _pairs(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> list[tuple[int, int]]:
    """Pair detections of one label whose boxes are less than a pixel apart, best first."""
    pairs: list[tuple[int, int]] = []
    taken = np.zeros(len(theirs[0]), dtype=np.bool_)
    for row, (box, label) in enumerate(zip(ours[0], ours[2], strict=True)):
        distances = np.abs(theirs[0] - box).max(axis=1, initial=0.0)
        distances[taken | (theirs[2] != label)] = np.inf
        if len(distances) and distances.min() < 1.0:
            nearest = int(distances.argmin())
            taken[nearest] = True
            pairs.append((row, nearest))
    return pairs
