"""The size at which images are seen: how training resizes them, and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from bigdet.config.rules import ConfigError, Ignored, all_positive, only_for, positive, require
from bigdet.ops.sizes import CANVAS_MULTIPLE

DEFAULT_CAP = (1333, 800)
"""Longest long side for this short side, in both papers; for others in proportion."""
FOR_TRAINING = ["sizes", "size_range", "variant", "scale_range", "jitter_range", "pad_to", "draw"]
"""Options that have an effect in training only."""


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """The size at which a phase sees its images."""

    kind: Literal["short_side", "direct", "stitcher", "jitter"] = MISSING
    """``short_side``: short side to ``size``, long side at most ``cap``. ``direct``: scaled by a
    random factor about ``size``, then cropped or padded to (size, size); paper 2, section 3.2.
    ``stitcher``: as ``short_side``, then both sides divided by ``divide_by``; paper 2's other way.
    ``jitter``: large-scale jitter: long side to ``size`` times a factor from ``jitter_range``,
    then cropped or padded to (size, size); boxes that the crop cuts shrink to what is left of
    their masks, where the model has masks."""
    size: int = MISSING
    """Pixels: of the short side, or of the square. Also the size at test time."""
    cap: int | None = field(default=None, metadata=only_for("kind", "short_side", "stitcher"))
    """Longest long side for ``short_side`` and ``stitcher``, pixels. None: 1333 / 800 of ``size``.
    """
    sizes: list[int] | None = field(default=None, metadata=only_for("kind", "short_side"))
    """For ``short_side`` in training: the short side of each step is one of these, pixels. All
    images of a step share it. None: ``size``."""
    size_range: tuple[int, int] | None = field(
        default=None, metadata=only_for("kind", "short_side")
    )
    """For ``short_side`` in training: the short side of each step is a number from the first to the
    second, pixels. None: ``size``."""
    draw: Literal["step", "image"] = field(default="step", metadata=only_for("kind", "short_side"))
    """For ``sizes`` and ``size_range``: one draw for all images of a ``step``, so that they fill
    their canvases and all ranks have equal work, or one for each ``image``, as in Detectron,
    detectron2 and mmdetection."""
    divide_by: int = field(default=2, metadata=only_for("kind", "stitcher"))
    """For ``stitcher``: both sides are divided by this."""
    variant: Literal["released", "paper"] = field(
        default="released", metadata=only_for("kind", "direct")
    )
    """For ``direct`` in training. ``released``, as in paper 2's code: the long side becomes
    ``size`` times the factor, the aspect ratio stays. ``paper``, as in its text: both sides become
    that."""
    scale_range: tuple[float, float] = field(
        default=(0.8, 1.2), metadata=only_for("kind", "direct")
    )
    """Range of the random factor of ``direct`` in training; 1 at test time."""
    jitter_range: tuple[float, float] = field(
        default=(0.1, 2.0), metadata=only_for("kind", "jitter")
    )
    """Range of the random factor of ``jitter`` in training; 1 at test time."""
    pad_to: Literal["batch", "two_shapes"] = field(
        default="batch", metadata=only_for("kind", "short_side", "stitcher")
    )
    """For ``short_side`` and ``stitcher`` in training. ``batch``: a canvas is as large as its
    images need. ``two_shapes``: it is one of two, landscape or portrait, whichever most of its
    images are; the others are made smaller to fit. With ``model.compile``, few shapes are
    better."""


def is_square(resize: ResizeConfig) -> bool:
    """Tell whether training images are cropped or padded to (size, size)."""
    return resize.kind in ("direct", "jitter")


def has_few_shapes(resize: ResizeConfig) -> bool:
    """Tell whether training sees canvases of one or two shapes only."""
    is_varied = resize.sizes is not None or resize.size_range is not None
    return is_square(resize) or (resize.pad_to == "two_shapes" and not is_varied)


def plan_of(resize: ResizeConfig) -> tuple[int, int]:
    """Return short side and longest long side at test time, pixels.

    The square kinds scale the long side to ``size``, and keep the aspect ratio.
    """
    if is_square(resize):
        return resize.size, resize.size
    size, cap = resize.size, resize.cap
    cap = cap if cap is not None else round(size * DEFAULT_CAP[0] / DEFAULT_CAP[1])
    divisor = resize.divide_by if resize.kind == "stitcher" else 1
    return size // divisor, cap // divisor


def largest_plan(resize: ResizeConfig) -> tuple[int, int]:
    """Return the largest short side and long side, pixels, at which training sees an image."""
    size, cap = plan_of(resize)
    return max([size, *(resize.sizes or []), *(resize.size_range or [])]), cap


def check_resize(key: str, resize: ResizeConfig) -> None:
    """Check the options of a resize: of a phase, or of the evaluation."""
    positive(key, resize, "size")
    if is_square(resize):
        is_multiple = resize.size % CANVAS_MULTIPLE == 0
        require(is_multiple, f"{key}.size", resize.size, f"a multiple of {CANVAS_MULTIPLE}")
    for name in ("scale_range", "jitter_range", "size_range"):
        found = getattr(resize, name)
        is_fine = found is None or 0 < found[0] <= found[1]
        require(is_fine, f"{key}.{name}", found, "two numbers above 0, rising")
    all_positive(key, resize, "sizes")
    if resize.draw == "image" and resize.pad_to == "two_shapes":
        raise ConfigError(
            f"{key}.draw: found image with pad_to: two_shapes, which needs one size for all images "
            f"of a step. Write draw: step, or pad_to: batch."
        )
    require(resize.divide_by > 1, f"{key}.divide_by", resize.divide_by, "2 or more")
    size = largest_plan(resize)[0] if resize.kind == "short_side" else resize.size
    if resize.cap is not None and resize.cap < size and not is_square(resize):
        raise ConfigError(f"{key}.cap: found {resize.cap}, expected at least size, {size}.")


def ignored_in_resize(key: str, resize: ResizeConfig) -> Ignored:
    """Yield the options without effect, except those that `only_for` declares."""
    if resize.sizes is not None:
        yield f"{key}.size_range", "sizes is set instead"
