"""Small random scenes as batches, for tests of the model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bigdet.structures import Batch, Masks, Targets


def ellipse(height: int, width: int) -> Tensor:
    """The bitmap ``(height, width)`` uint8 of an ellipse that fills its box."""
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    return (y[:, None] ** 2 + x**2 <= 1).to(torch.uint8)


def pack_masks(bitmaps: list[Tensor], origins: list[tuple[int, int]]) -> Masks:
    """Pack bitmaps ``(h, w)`` whose first pixels lie at ``origins`` (x, y)."""
    lengths = torch.tensor([0] + [bitmap.numel() for bitmap in bitmaps])
    flat = [bitmap.flatten().to(torch.uint8) for bitmap in bitmaps]
    return Masks(
        bits=torch.cat([*flat, torch.zeros(0, dtype=torch.uint8)]),
        offsets=lengths.cumsum(0),
        origins=torch.tensor(origins, dtype=torch.int64).view(-1, 2),
        sizes=torch.tensor([tuple(b.shape) for b in bitmaps], dtype=torch.int64).view(-1, 2),
    )


def make_scene(
    objects: list[list[tuple[int, int, int, int]]],
    image_sizes: list[tuple[int, int]],
    canvas_size: tuple[int, int],
    num_classes: int = 3,
    seed: int = 0,
    num_keypoints: int | None = None,
) -> Batch:
    """A batch of noise with elliptic objects; ``objects`` are xyxy whole pixels, by image.

    With keypoints they lie anywhere in their object; some are hidden or not labeled.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(objects), 3, *canvas_size, dtype=torch.uint8)
    for image, (height, width) in zip(images, image_sizes, strict=True):
        noise = torch.randint(0, 256, (3, height, width), generator=generator)
        image[:, :height, :width] = noise.to(torch.uint8)
    boxes = [box for of_image in objects for box in of_image]
    counts = torch.tensor([0] + [len(of_image) for of_image in objects])
    keypoints = None
    if num_keypoints is not None:
        edges = torch.tensor(boxes, dtype=torch.float32).view(-1, 1, 4)
        parts = torch.rand(len(boxes), num_keypoints, 2, generator=generator)
        points = edges[..., :2] + parts * (edges[..., 2:] - edges[..., :2])
        seen = torch.randint(0, 3, (*points.shape[:2], 1), generator=generator)
        keypoints = torch.cat([points, seen.float()], dim=2)
    targets = Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.arange(len(boxes)) % num_classes,
        is_crowd=torch.zeros(len(boxes), dtype=torch.bool),
        offsets=counts.cumsum(0),
        masks=pack_masks(
            [ellipse(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes],
            [(x0, y0) for x0, y0, _, _ in boxes],
        ),
        keypoints=keypoints,
    )
    return Batch(
        images=images,
        image_sizes=torch.tensor(image_sizes),
        original_sizes=torch.tensor(image_sizes),
        image_ids=torch.arange(len(objects)),
        weights=torch.ones(len(objects)),
        targets=targets,
        seed=seed,
    )


def assert_weight_zero_hides_an_image(detector: nn.Module, batch: Batch, other: Batch) -> None:
    """Two images; the batches differ in the objects of the second one, which gets weight 0."""
    first = replace(batch, weights=torch.tensor([1.0, 0.0]))
    assert detector(first) == detector(replace(first, targets=other.targets))
    nothing = detector(replace(first, weights=torch.zeros(2)))
    assert all(loss == 0 for loss in nothing.values())
