"""The data passed between data stream, model and evaluation: frozen dataclasses of tensors.

Letters: B images of a group, M ground-truth objects of all of them, N detections of one image,
H and W the padded canvas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", "Targets", "Masks", "Batch", "Detections")


def _map_tensors(bundle: T, move: Callable[[Tensor], Tensor]) -> T:
    """Return the bundle with ``move`` applied to every tensor in it, nested bundles too."""
    moved: dict[str, Any] = {}
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = move(value)
        elif isinstance(value, (Targets, Masks)):
            moved[field.name] = _map_tensors(value, move)  # type: ignore[type-var]
    return replace(bundle, **moved)


class _Copies:
    """Copies of tensors that share memory, such as those of a packed group: 4 copies and not 13."""

    def __init__(self, bundle: Batch, device: torch.device) -> None:
        self._device = device
        self._used: Counter[int] = Counter()  # bytes of each memory that the bundle has
        self._copies: dict[int, torch.UntypedStorage] = {}
        _map_tensors(bundle, self._count)

    def _count(self, tensor: Tensor) -> Tensor:
        self._used[tensor.untyped_storage().data_ptr()] += tensor.nbytes
        return tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor, with its strides."""
        memory = tensor.untyped_storage()
        place = memory.data_ptr()
        if 2 * self._used[place] < memory.nbytes():  # a part of something larger
            return tensor.to(self._device, non_blocking=True)
        if place not in self._copies:
            whole = torch.empty(0, dtype=torch.uint8).set_(memory)  # type: ignore[call-overload]
            self._copies[place] = whole.to(self._device, non_blocking=True).untyped_storage()
        copy = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return copy.set_(
            self._copies[place], tensor.storage_offset(), tensor.shape, tensor.stride()
        )


@dataclass(frozen=True)
class Masks:
    """Bitmaps of M objects, each cropped to its own box, stored one after another.

    Attributes:
        bits: ``(S,)`` uint8, 0 or 1: the crops, row by row, object after object.
        offsets: ``(M + 1,)`` int64: the crop of object i is ``bits[offsets[i]:offsets[i + 1]]``.
        origins: ``(M, 2)`` int64 x, y of the crop's first pixel on the canvas.
        sizes: ``(M, 2)`` int64 height, width of the crop; 0, 0 for an object without a mask.
    """

    bits: Tensor
    offsets: Tensor
    origins: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Targets:
    """The objects of a group of images, flat.

    Attributes:
        boxes: ``(M, 4)`` float32 xyxy, pixels of the padded canvas, continuous edges.
        labels: ``(M,)`` int64 in ``0..K-1``.
        is_crowd: ``(M,)`` bool; a crowd region is not an object to find.
        offsets: ``(B + 1,)`` int64: image b has rows ``offsets[b]:offsets[b + 1]``.
        masks: the objects' masks, or None where the model has no use for them.
        keypoints: ``(M, K, 3)`` float32 x, y, visibility: pixels of the canvas, the center of the
            first one at 0.5, and 0 not labeled or out of view (x and y are 0 too), 1 labeled but
            hidden, 2 visible. None where the model has no use for them.
        most: objects of the image that has most of them. None where the host has to ask the device.
    """

    boxes: Tensor
    labels: Tensor
    is_crowd: Tensor
    offsets: Tensor
    masks: Masks | None = None
    keypoints: Tensor | None = None
    most: int | None = None


@dataclass(frozen=True)
class Batch:
    """One group: the images that one rank runs through the model at once.

    Attributes:
        images: ``(B, 3, H, W)`` uint8 RGB 0..255, images in the top left corner, rest 0.
        image_sizes: ``(B, 2)`` int64 height, width of each image on the canvas.
        original_sizes: ``(B, 2)`` int64 height, width of each image in the shards.
        image_ids: ``(B,)`` int64, the data set's own ids.
        weights: ``(B,)`` float32: 0 for a masked slot, whose losses count nothing; else 1.
        targets: the objects of all B images.
        seed: key of the model's randomness for this group: a function of (seed, phase, step,
            lane), so that it depends on neither ranks nor workers.
    """

    images: Tensor
    image_sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    weights: Tensor
    targets: Targets
    seed: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``; copies from pinned memory overlap."""
        if self.images.is_cuda or device.type != "cuda":
            return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        moved = _map_tensors(self, _Copies(self, device).of)
        most = int(self.targets.offsets.diff().max())
        return replace(moved, targets=replace(moved.targets, most=most))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work queued on a stream is done."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        _map_tensors(self, record)


@dataclass(frozen=True)
class Detections:
    """What the model found on one image, best first.

    Attributes:
        boxes: ``(N, 4)`` float32 xyxy pixels of the image (or of the canvas, before rescaling).
        scores: ``(N,)`` float32 in [0, 1], descending.
        labels: ``(N,)`` int64 in ``0..K-1``.
        masks: ``(N, 28, 28)`` float32 in [0, 1], probabilities on a grid over the box, or None.
        keypoints: ``(N, K, 3)`` float32 x, y in the boxes' pixels, and the logit at the peak of the
            heat map (above 2 or so the model is sure), or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def to(self, device: torch.device) -> Detections:
        """Return the detections with their tensors on ``device``."""
        return _map_tensors(self, lambda tensor: tensor.to(device))
