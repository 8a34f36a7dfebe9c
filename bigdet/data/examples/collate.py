"""Packs the examples of a group into a few flat tensors, and unpacks these into a ``Batch``.

A loader process or thread passes on four tensors per group, however many objects it has: many small
ones cost more than their bytes (one process gave 459 images per second with 114 tensors, 2797 with
4).

Letters: B images of the group, M objects of all of them, H and W the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigdet.data.examples.transforms import Example
from bigdet.ops.sizes import canvas_size
from bigdet.structures import Batch, Masks, Targets

Allocate = Callable[[int], Tensor]
"""Returns memory of that many bytes, ``(bytes,)`` uint8."""


class PackedGroup(NamedTuple):
    """A group as its reader passes it on; only ``pack`` and ``unpack`` know its layout.

    Attributes:
        images: ``(B, 3, H, W)`` uint8, channels_last memory.
        floats: float32, flat: weights, boxes, keypoints.
        integers: int64, flat: ``B, M, 1 with masks, keypoints of an object or -1 without, boxes
            dropped, seed``, sizes, ids, labels, ...
        bytes: uint8, flat: is_crowd, mask bits.
        notes: other small values from the sender, such as damaged samples.
    """

    images: Tensor
    floats: Tensor
    integers: Tensor
    bytes: Tensor
    notes: list[Any]


_HEAD = 6  # integers before the first array


def fresh_memory(num_bytes: int) -> Tensor:
    """Return ordinary memory."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def pack(
    examples: Sequence[Example],
    *,
    canvas: tuple[int, int] | None,
    seed: int,
    notes: Sequence[Any] = (),
    allocate: Allocate = fresh_memory,
) -> PackedGroup:
    """Pack a group.

    Args:
        examples: at least one; all with masks or all without, keypoints likewise.
        canvas: height and width; None is the smallest that fits.
        seed: for the model's random numbers, in ``[0, 2**63)``.
        notes: passed on unchanged.
        allocate: returns the memory for the tensors.
    """
    sizes = [(example.image.shape[1], example.image.shape[2]) for example in examples]
    objects = [example.objects for example in examples]
    offsets = np.cumsum([0, *(len(found.labels) for found in objects)])
    boxes = np.concatenate([found.boxes for found in objects])
    weights = np.array([example.weight for example in examples], dtype=np.float32)
    is_crowd = np.concatenate([found.is_crowd for found in objects])
    has_masks = objects[0].masks is not None
    crops = [crop for found in objects for crop in found.masks or []]
    keypoints = [found.keypoints for found in objects if found.keypoints is not None]
    num_keypoints = keypoints[0].shape[1] if keypoints else -1
    num_dropped = sum(found.num_dropped for found in objects)
    integers: list[Any] = [
        [len(examples), len(boxes), has_masks, num_keypoints, num_dropped, seed],
        sizes,
        [example.original_size for example in examples],
        [example.image_id for example in examples],
        offsets,
        np.concatenate([found.labels for found in objects]),
    ]
    if has_masks:
        integers += [
            np.cumsum([0, *(crop.size for crop in crops)]),
            np.concatenate([found.mask_origins for found in objects]),
            [crop.shape for crop in crops],
        ]
    return PackedGroup(
        _lay_on_canvas(
            [example.image for example in examples], canvas or canvas_size(sizes), allocate
        ),
        _lay_flat([weights, boxes, *keypoints], torch.float32, allocate),
        _lay_flat([np.asarray(part, np.int64) for part in integers], torch.int64, allocate),
        _lay_flat([is_crowd.view(np.uint8), *crops], torch.uint8, allocate),
        list(notes),
    )


def _lay_flat(arrays: Sequence[NDArray[Any]], dtype: torch.dtype, allocate: Allocate) -> Tensor:
    """Return arrays one after the other, flat; each is copied once, whatever its strides."""
    flat = allocate(dtype.itemsize * sum(array.size for array in arrays)).view(dtype)
    whole, start = flat.numpy(), 0
    for array in arrays:
        whole[start : start + array.size].reshape(array.shape)[...] = array
        start += array.size
    return flat


def _lay_on_canvas(images: Sequence[Tensor], size: tuple[int, int], allocate: Allocate) -> Tensor:
    """Return ``(B, 3, H, W)``: each image in the top left corner, zeros right and below."""
    shape = (len(images), *size, 3)
    canvas = allocate(math.prod(shape)).view(shape)
    for place, image in zip(canvas, images, strict=True):
        height, width = image.shape[1:]
        place[:height, :width] = image.permute(1, 2, 0)
        place[:height, width:] = 0
        place[height:] = 0
    return canvas.permute(0, 3, 1, 2)


def group_bytes(num_images: int, plan: tuple[int, int], *, with_masks: bool) -> int:
    """Return an upper estimate of the bytes of a packed group; many overlapping masks take more.

    ``plan`` is the short side and the longest long side, pixels.
    """
    area = math.prod(canvas_size([plan]))
    return num_images * ((4 if with_masks else 3) * area + 65_536)


def num_dropped(packed: PackedGroup) -> int:
    """Return how many boxes of a group were dropped because the crop does not show them."""
    return int(packed.integers[4])


def pinned(packed: PackedGroup) -> PackedGroup:
    """Return a group in page-locked memory, from which copies to a GPU need no wait."""
    images, floats, integers, flags = (tensor.pin_memory() for tensor in packed[:4])
    return PackedGroup(images, floats, integers, flags, packed.notes)


def unpack(packed: PackedGroup) -> Batch:
    """Return a packed group as a ``Batch`` of views of the same memory; nothing is copied."""
    num_images, num_objects, has_masks, num_keypoints, _, seed = packed.integers[:_HEAD].tolist()
    lengths = [2 * num_images, 2 * num_images, num_images, num_images + 1, num_objects]
    if has_masks:
        lengths += [num_objects + 1, 2 * num_objects, 2 * num_objects]
    parts = torch.split(packed.integers[_HEAD:], lengths)
    num_floats = [num_images, 4 * num_objects, 3 * max(num_keypoints, 0) * num_objects]
    weights, boxes, keypoints = torch.split(packed.floats, num_floats)
    masks = None
    if has_masks:
        bits = packed.bytes[num_objects:]
        masks = Masks(bits, parts[5], parts[6].view(-1, 2), parts[7].view(-1, 2))
    return Batch(
        images=packed.images,
        image_sizes=parts[0].view(-1, 2),
        original_sizes=parts[1].view(-1, 2),
        image_ids=parts[2],
        weights=weights,
        targets=Targets(
            boxes=boxes.view(-1, 4),
            labels=parts[4],
            is_crowd=packed.bytes[:num_objects].view(torch.bool),
            offsets=parts[3],
            masks=masks,
            keypoints=keypoints.view(-1, num_keypoints, 3) if num_keypoints >= 0 else None,
        ),
        seed=seed,
    )
