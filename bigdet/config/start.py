"""The weights that a phase starts from, which parts are loaded, and what they cost to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigdet.config.families import DETECTORS
from bigdet.config.model import ModelConfig, has_cascade, has_fpn, model_parts
from bigdet.config.rules import CHOICES, ConfigError, Ignored, positive

Pixels = Literal["rgb", "bgr", "bgr_255"]
PARTS = tuple(dict.fromkeys(part for facts in DETECTORS.values() for part in facts.parts))
"""Parts of bigdet's detectors; a user's own may have others."""
_IMAGES = 128_000_000
IMAGENET_COST = {"images": _IMAGES, "instances": _IMAGES, "pixels": _IMAGES * 224 * 224}
"""The cost of ImageNet weights in paper 1: 1.28 million images, 100 passes at 224x224."""


_COSTS = ("images", "instances", "pixels", "gpu_seconds")


@dataclass(frozen=True, kw_only=True)
class StartCostConfig:
    """What it cost to train imported weights, as far as known."""

    preset: Literal["imagenet"] | None = None
    """``imagenet``: 1.28 million images of one object, 100 passes at 224x224 (paper 1)."""
    images: int | None = None
    """Images seen, repeats counted."""
    instances: int | None = None
    """Objects seen."""
    pixels: int | None = None
    """Pixels seen."""
    gpu_seconds: float | None = None
    """Seconds of training times GPUs."""


@dataclass(frozen=True, kw_only=True)
class StartFromConfig:
    """Which weights a phase starts from."""

    source: str | None = None
    """``random``; ``timm`` (the backbone's published ImageNet weights) or ``timm:NAME`` (others by
    timm's name); ``previous`` (the phase before); the path of a run or a ``model.safetensors``; or
    the file of a backbone from another codebase: ``.safetensors``, ``.pth``, ``.pkl``. None:
    ``random`` in the first phase, ``previous`` in the others."""
    parts: list[str] | None = field(default=None, metadata={CHOICES: PARTS})
    """The parts that are loaded; the others start anew. None: all parts of the model, or the
    backbone from ``timm`` and files of other codebases (which for ``vgg16`` also have fc6 and fc7,
    of ``box_head``)."""
    pixels: Pixels | None = None
    """For the file of a backbone from another codebase: how images were given to the network.
    ``rgb``: as in torchvision and bigdet; ``bgr``: in reversed order (X-101-32x8d, X-152-32x8d);
    ``bgr_255``: reversed and not divided by the deviation (MSRA's R-50 and R-101, mmdetection's
    caffe models). Needed for ``.pkl`` files, and for files with detectron2's names that do not say
    it. None: what the file says (its ``pixel_mean`` and ``pixel_std``), else ``rgb``."""
    ema: bool | None = None
    """For files with both plain weights and their moving average (EMA): true for the average, false
    for the plain ones. None: the plain ones, but the average for files of mmengine, which puts it
    in their place. The log says what a file has and what was taken. A phase of bigdet with ``ema``
    gives its average alone."""
    cost: StartCostConfig | None = None
    """For ``timm`` and paths: what the weights cost, reported next to the run's own cost in
    ``metrics.jsonl`` (``imported/images``, ...). None: unknown."""


def is_timm(source: str) -> bool:
    """Tell whether a source is published weights by timm's name: ``timm`` or ``timm:NAME``."""
    return source == "timm" or source.startswith("timm:")


def is_foreign_file(source: str) -> bool:
    """Tell by its name whether a source is a file that holds a backbone alone."""
    return source.endswith((".pkl", ".pth", ".pt", ".bin", ".th", ".tar"))


def source_of(start: StartFromConfig, *, is_first: bool) -> str:
    """Return where the weights of a phase come from, with the default filled in."""
    return start.source or ("random" if is_first else "previous")


def loaded_parts(
    start: StartFromConfig, source: str, model: ModelConfig, before: ModelConfig | None
) -> list[str]:
    """Return the parts that are loaded, with the default filled in: all that the source has.

    ``model`` is that of the phase, ``before`` that of the phase before, None for the first phase.
    """
    if source == "random":
        return []
    if start.parts:
        return list(start.parts)
    if is_timm(source) or is_foreign_file(source):
        return ["backbone"]
    own = model_parts(model)
    if source == "previous" and start.parts is None and before is not None:
        return [part for part in own if part in model_parts(before)]
    return own


def stated_cost(cost: StartCostConfig) -> dict[str, float]:
    """Return the known numbers of a cost by the names of its options."""
    preset = IMAGENET_COST if cost.preset == "imagenet" else {}
    own = {name: getattr(cost, name) for name in _COSTS}
    return preset | {name: number for name, number in own.items() if number is not None}


def check_start(
    key: str, start: StartFromConfig, source: str, model: ModelConfig, before: ModelConfig | None
) -> None:
    """Check where weights come from and which parts are loaded; see `loaded_parts`."""
    key = f"{key}.start_from"
    if source == "previous" and before is None:
        raise ConfigError(
            f"{key}.source: found previous, but this is the first phase. Write random, timm, or "
            f"the path of a run or a model.safetensors."
        )
    _check_parts(f"{key}.parts", start.parts, source, model)
    if source.endswith(".pkl") and start.pixels is None:
        raise ConfigError(
            f"{key}.pixels: found none with source {source}. Such files do not say how images were "
            f"given to the network: write rgb, bgr (X-101-32x8d, X-152-32x8d) or bgr_255 (MSRA's "
            f"R-50 and R-101 and what was trained from them)."
        )
    is_file = is_foreign_file(source) or source.endswith(".safetensors")
    if start.pixels is not None and not is_file:
        raise ConfigError(
            f"{key}.pixels: found {start.pixels} with source {source}. It is for a file of "
            f"another codebase. Remove it."
        )
    if start.ema is not None and (source in ("random", "previous") or is_timm(source)):
        raise ConfigError(
            f"{key}.ema: is for files of weights, but the source is {source}, so it would be "
            f"ignored. Remove it."
        )
    if start.cost is not None:
        _check_cost(f"{key}.cost", start.cost, source)
    if source == "previous" and before is not None:
        parts = loaded_parts(start, source, model, before)
        _check_hand_over(key, parts, model, before)


def _check_parts(key: str, parts: list[str] | None, source: str, model: ModelConfig) -> None:
    if parts is None:
        return
    if not parts:
        raise ConfigError(f"{key}: found none. Write source: random instead.")
    own = model_parts(model)
    if absent := [part for part in parts if part not in own]:
        raise ConfigError(
            f"{key}: {model.detector} has no {', '.join(absent)}. It has {', '.join(own)}."
        )
    if source == "random":
        raise ConfigError(
            f"{key}: found {parts}, but source is random, so nothing is loaded. Remove parts, or "
            f"name a source."
        )
    if is_timm(source) or is_foreign_file(source):
        fc_layers = [] if has_fpn(model) else ["box_head"]
        if sorted(parts) not in (["backbone"], ["backbone", *fc_layers]):
            also = " and of box_head (fc6, fc7) only" if fc_layers else " only"
            raise ConfigError(
                f"{key}: found {', '.join(parts)}, but {source} has weights of the backbone{also}."
            )


def _check_hand_over(key: str, parts: list[str], model: ModelConfig, before: ModelConfig) -> None:
    """Check that the phase before has the parts that a phase loads from it."""
    if absent := [part for part in parts if part not in model_parts(before)]:
        raise ConfigError(
            f"{key}.parts: the phase before trains a {before.detector}, which has no "
            f"{', '.join(absent)}. Leave them out; they start anew."
        )
    if has_cascade(before) and not has_cascade(model) and "box_head" in parts:
        raise ConfigError(
            f"{key.removesuffix('start_from')}model.detector: the three box heads of the phase "
            f"before, a {before.detector}, cannot become the one of a {model.detector}. Write "
            f"{before.detector} here too, or list start_from.parts without box_head, which then "
            f"starts anew."
        )


def _check_cost(key: str, cost: StartCostConfig, source: str) -> None:
    """Check the stated cost of weights from elsewhere."""
    if source in ("random", "previous"):
        raise ConfigError(
            f"{key}: is for weights from elsewhere, but the source is {source}, whose cost is "
            f"counted. Remove it, or name a source."
        )
    if not stated_cost(cost):
        raise ConfigError(f"{key}: is empty. Write preset: imagenet, images: NUMBER, ...")
    positive(key, cost, *_COSTS)


def ignored_in_start(key: str, start: StartFromConfig) -> Ignored:
    """Yield the numbers of a cost that its preset sets already."""
    if start.cost is not None and start.cost.preset is not None:
        for name in IMAGENET_COST:
            yield f"{key}.start_from.cost.{name}", f"preset: {start.cost.preset} sets it"
