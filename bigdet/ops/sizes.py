"""Sizes of images on a canvas, in plain numbers: without torch, as the checks of a config use them.

All sizes are ``(height, width)`` in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

CANVAS_MULTIPLE = 32
"""Height and width of a canvas are multiples of the coarsest stride of a backbone."""


def eval_size(height: int, width: int, size: int, cap: int) -> tuple[int, int]:
    """Return the ``(height, width)`` whose short side is ``size`` and long side at most ``cap``.

    The aspect ratio is kept up to rounding down, as torchvision's detectors do: 480x640 at
    (800, 1333) becomes 800x1066. In whole numbers: a float scale makes 799 of some short sides.
    """
    short, long = min(height, width), max(height, width)
    target, of = (size, short) if long * size <= cap * short else (cap, long)
    return max(1, height * target // of), max(1, width * target // of)


def canvas_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest canvas that holds images of these sizes."""
    height, width = (
        -(-max(sides) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for sides in zip(*sizes, strict=True)
    )
    return height, width
