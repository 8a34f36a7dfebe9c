"""What is done to the images of a group together: mosaic, copy-paste, color.

Each image already has its view (``Scene``). Random numbers here have keys of their own, so that
drawing them changes no view. All results are functions of the group.

Letters: M objects of one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigdet.config.augment import AugmentConfig
from bigdet.data.examples.objects import (
    Objects,
    Wanted,
    clip,
    join,
    objects_in_views,
    select,
    shift,
    tighten,
)
from bigdet.data.examples.views import Size, View, crop_view
from bigdet.ops.random import Words

COLOR_FACTORS = (0.6, 1.4)
"""Range of the factors of brightness, contrast and saturation."""
PASTED_PART = 0.5
"""Probability that an object of the other image is pasted."""
MOSAIC_CENTER = (0.3, 0.7)
"""Where the four images of a mosaic meet, in widths and heights of the canvas."""
MOSAIC_FILL = (124, 116, 104)
"""Color where a mosaic has no image: about the mean of all images, 0 after normalization."""
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Scene:
    """A sample as it was read, and its view.

    Attributes:
        image: ``(3, H, W)`` uint8, maybe decoded smaller than it is stored.
        record: its annotations, as in the shards.
        view: how the image is laid on its canvas.
        weight: 0 for a masked slot, else 1.
        key: seed, phase, pass and row, for random numbers about mixing and colors.
    """

    image: Tensor
    record: dict[str, Any]
    view: View
    weight: float
    key: tuple[int | str, ...]


@dataclass(frozen=True)
class Example:
    """One image as the model sees it, with its objects.

    Attributes:
        image: ``(3, h, w)`` uint8.
        original_size: height, width as stored.
        image_id: that of the data set.
        weight: 0 for a masked slot, else 1.
        objects: those in view.
    """

    image: Tensor
    original_size: tuple[int, int]
    image_id: int
    weight: float
    objects: Objects


def make_examples(
    scenes: Iterable[Scene], augment: AugmentConfig, canvas: Size | None, wanted: Wanted
) -> list[Example]:
    """Make the examples of a group.

    Args:
        scenes: those of all images of the group, taken one by one if nothing is mixed, because
            pixels that were just decoded are still in the processor's cache.
        augment: probabilities of mosaic, copy-paste and color changes.
        canvas: height, width of a mosaic; None for those of the image's view.
        wanted: what to compute for the objects.
    """
    if augment == AugmentConfig():
        return _alone(scenes, wanted)
    scenes = list(scenes)
    examples = alone = _alone(scenes, wanted)
    words = [Words("mix", *scene.key) for scene in scenes]
    if augment.mosaic or augment.copy_paste:
        examples = [
            _mixed(scenes, alone, number, augment, canvas, wanted, words[number])
            for number in range(len(scenes))
        ]
    if augment.color_jitter:
        examples = [
            _with_colors(example, own_words, augment.color_jitter)
            for example, own_words in zip(examples, words, strict=True)
        ]
    return examples


def _alone(scenes: Iterable[Scene], wanted: Wanted) -> list[Example]:
    """Return the example that each scene gives by itself."""
    looks = [
        (scene.view.move_image(scene.image), scene.record, scene.view, scene.weight)
        for scene in scenes
    ]
    objects = objects_in_views(
        [record["annotations"] for _, record, _, _ in looks],
        [view for _, _, view, _ in looks],
        wanted,
    )
    return [
        Example(image, view.original_size, record["image_id"], weight, found)
        for (image, record, view, weight), found in zip(looks, objects, strict=True)
    ]


def _mixed(
    scenes: Sequence[Scene],
    alone: Sequence[Example],
    number: int,
    augment: AugmentConfig,
    canvas: Size | None,
    wanted: Wanted,
    words: Words,
) -> Example:
    """Return one image of a group, maybe with parts of others."""
    if words.uniform(0.0, 1.0) < augment.mosaic:
        chosen = [number, *_draw_others(len(scenes), number, 3, words)]
        size = canvas or scenes[number].view.size
        return _mosaic([scenes[i] for i in chosen], alone[number], size, wanted, words)
    if words.uniform(0.0, 1.0) < augment.copy_paste:
        (other,) = _draw_others(len(scenes), number, 1, words)
        return paste(alone[number], alone[other], words)
    return alone[number]


def _draw_others(count: int, number: int, num_drawn: int, words: Words) -> list[int]:
    """Draw some of ``0..count-1``, all different and none of them ``number``."""
    left = [i for i in range(count) if i != number]
    return [left.pop(words.integer(len(left))) for _ in range(num_drawn)]


def _mosaic(
    scenes: Sequence[Scene], own: Example, size: Size, wanted: Wanted, words: Words
) -> Example:
    """Lay four images around a point, each at half the size of its own view.

    Args:
        scenes: top left, top right, bottom left, bottom right.
        own: the example that the mosaic replaces.
        size: height, width of the canvas.
        wanted: what to compute for the objects.
        words: random numbers of this image.
    """
    height, width = size
    x = max(1, round(width * words.uniform(*MOSAIC_CENTER)))
    y = max(1, round(height * words.uniform(*MOSAIC_CENTER)))
    image = torch.tensor(MOSAIC_FILL, dtype=torch.uint8).repeat(height, width, 1).permute(2, 0, 1)
    views, places = [], []
    for number, scene in enumerate(scenes):
        is_right, is_below = number % 2, number // 2
        room = (height - y if is_below else y, width - x if is_right else x)
        view = _half_view(scene, room, words)
        high, wide = view.size
        left, top = x if is_right else x - wide, y if is_below else y - high
        image[:, top : top + high, left : left + wide] = view.move_image(scene.image)
        views.append(view)
        places.append((left, top))
    found = objects_in_views([scene.record["annotations"] for scene in scenes], views, wanted)
    parts = [shift(objects, *place) for objects, place in zip(found, places, strict=True)]
    return replace(own, image=image, objects=join(parts))


def _half_view(scene: Scene, room: Size, words: Words) -> View:
    """Return the view of a scene at half its size, cropped to at most ``room``."""
    scaled = scene.view.scaled_size
    if scene.view.window is not None:  # of the whole image, not of the window alone
        scale, stored = scene.view.scale, scene.view.original_size
        scaled = (round(stored[0] * scale[1]), round(stored[1] * scale[0]))
    half = (max(1, scaled[0] // 2), max(1, scaled[1] // 2))
    whole = View(scene.view.original_size, half, (0, 0), half, scene.view.is_flipped)
    return crop_view(whole, (min(half[0], room[0]), min(half[1], room[1])), scene.record, words)


def paste(below: Example, above: Example, words: Words) -> Example:
    """Paste some objects of one image into another, at the same places.

    What they hide is removed from the masks below, and boxes shrink to what is left; an object that
    is hidden completely is dropped and counted. There is no blending: Ghiasi et al., *Simple
    Copy-Paste is a Strong Data Augmentation Method*, found no gain from it. Both images have masks;
    crowds, and objects without a mask or a pixel of it on this image, are not pasted.
    """
    assert above.objects.masks is not None
    is_drawn = [words.uniform(0.0, 1.0) < PASTED_PART for _ in above.objects.labels]
    has_mask = [bool(mask.any()) for mask in above.objects.masks]
    drawn = np.flatnonzero(np.logical_and(is_drawn, has_mask))
    size = (below.image.shape[1], below.image.shape[2])
    pasted = clip(select(above.objects, drawn), size)
    pasted = select(pasted, np.flatnonzero([mask.any() for mask in pasted.masks or []]))
    cover = _cover(pasted, size)
    image = below.image.clone()
    rows, columns = np.nonzero(cover)
    image[:, rows, columns] = above.image[:, rows, columns]
    objects = join([_hidden(below.objects, cover), replace(pasted, num_dropped=0)])
    return replace(below, image=image, objects=objects)


def _cover(objects: Objects, size: Size) -> NDArray[np.uint8]:
    """Return which pixels of a canvas objects cover, ``(H, W)`` 0 or 1."""
    cover = np.zeros(size, dtype=np.uint8)
    for (x, y), mask in zip(objects.mask_origins, objects.masks or [], strict=True):
        cover[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask
    return cover


def _hidden(objects: Objects, cover: NDArray[np.uint8]) -> Objects:
    """Return objects behind a cover, with what is left of their masks and boxes."""
    masks, is_changed = [], np.zeros(len(objects), dtype=np.bool_)
    for i, ((x, y), mask) in enumerate(zip(objects.mask_origins, objects.masks or [], strict=True)):
        above = cover[y : y + mask.shape[0], x : x + mask.shape[1]]
        is_changed[i] = (mask & above).any()
        masks.append(mask & ~above)
    keypoints = objects.keypoints
    if keypoints is not None:
        x, y = np.moveaxis(keypoints[..., :2].astype(np.int64), -1, 0)
        is_hidden = (keypoints[..., 2] > 1) & (cover[y, x] > 0)
        keypoints = keypoints.copy()
        keypoints[is_hidden, 2] = 1
    return tighten(replace(objects, masks=masks, keypoints=keypoints), is_changed)


def _with_colors(example: Example, words: Words, probability: float) -> Example:
    """Return an example in other colors, or as it is."""
    if words.uniform(0.0, 1.0) >= probability:
        return example
    brightness, contrast, saturation = (words.uniform(*COLOR_FACTORS) for _ in range(3))
    return replace(example, image=change_colors(example.image, brightness, contrast, saturation))


def change_colors(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Change the colors of an image: factors of 1 leave it as it is.

    As torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` in this
    order, but without clipping between them, so that all three are one matrix.

    Args:
        image: ``(3, H, W)`` uint8.
        brightness: factor of all values.
        contrast: factor of distances to the mean luma of the image.
        saturation: factor of distances to each pixel's own luma.
    """
    luma = torch.tensor(_LUMA)
    pixels = image.permute(1, 2, 0).float()  # (H, W, 3)
    mean = brightness * float(pixels.mean(dim=(0, 1)) @ luma)
    to_gray = luma[:, None].expand(3, 3)
    matrix = saturation * torch.eye(3) + (1 - saturation) * to_gray
    changed = pixels @ (brightness * contrast * matrix) + (1 - contrast) * mean
    return changed.round_().clamp_(0, 255).to(torch.uint8).permute(2, 0, 1)
