"""Values that follow from options: functions, so that nothing is stored twice."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from bigdet.config.families import backbone_facts, detector_facts
from bigdet.config.model_schema import ModelConfig, RpnConfig
from bigdet.config.phase_schema import PhaseConfig, ResizeConfig, StartCostConfig
from bigdet.config.schema import RunConfig

PLACES = (".shards", ".more_shards", ".subset.ids", ".start_from.source")
"""Ends of the keys whose values are paths or addresses of what a run reads."""

IMAGENET_COST = {
    "images": 128_000_000, "instances": 128_000_000, "pixels": 128_000_000 * 224 * 224,
}  # fmt: skip
"""What paper 1 counts for ImageNet weights: 1.28 million images, 100 passes at 224x224."""

DEFAULT_CAP = (1333, 800)
"""Longest long side, and the short side it goes with, in both papers; others in proportion."""


def plan_of(resize: ResizeConfig) -> tuple[int, int]:
    """Return how a resize looks at test time: short side and longest long side, pixels.

    The square kinds bring the long side to ``size``, and keep the aspect ratio.
    """
    if is_square(resize):
        return resize.size, resize.size
    size, cap = resize.size, resize.cap
    cap = cap if cap is not None else round(size * DEFAULT_CAP[0] / DEFAULT_CAP[1])
    divisor = resize.divide_by if resize.kind == "stitcher" else 1
    return size // divisor, cap // divisor


def is_square(resize: ResizeConfig) -> bool:
    """Tell whether training images are cropped or padded to (size, size)."""
    return resize.kind in ("direct", "jitter")


def largest_plan(resize: ResizeConfig) -> tuple[int, int]:
    """Return the largest short side and long side, pixels, at which training sees an image."""
    size, cap = plan_of(resize)
    return max([size, *(resize.sizes or []), *(resize.size_range or [])]), cap


def model_parts(model: ModelConfig) -> list[str]:
    """Return the parts of a detector, in the order in which data flows through them."""
    parts = detector_facts(model.detector).parts
    return [part for part in parts if part != "fpn" or has_fpn(model)]


def has_fpn(model: ModelConfig) -> bool:
    """Tell whether a feature pyramid stands between the backbone and the heads."""
    return backbone_facts(model.backbone).has_levels


def has_masks(model: ModelConfig) -> bool:
    """Tell whether a detector learns and predicts masks."""
    return "masks" in detector_facts(model.detector).learns


def has_keypoints(model: ModelConfig) -> bool:
    """Tell whether a detector learns and predicts keypoints."""
    return "keypoints" in detector_facts(model.detector).learns


def reported(model: ModelConfig) -> tuple[str, int] | None:
    """Return the option that limits the detections of an image, and its value; None: none does."""
    section = detector_facts(model.detector).limits
    if section is None:
        return None
    return f"model.{section}.detections_per_image", getattr(model, section).detections_per_image


def has_cascade(model: ModelConfig) -> bool:
    """Tell whether the box head of a detector is a cascade of three."""
    return detector_facts(model.detector).is_cascade


def is_class_agnostic(model: ModelConfig) -> bool:
    """Tell whether a region has one box for all classes, with the default filled in."""
    chosen = model.roi.class_agnostic
    return has_cascade(model) if chosen is None else chosen


def proposal_limits(rpn: RpnConfig, detector: str) -> RpnConfig:
    """Return the options of region proposals with all numbers of proposals filled in."""
    after_nms = rpn.train_proposals
    if after_nms is None:
        after_nms = 2000 if detector_facts(detector).is_cascade else 1000
    return dataclasses.replace(
        rpn,
        train_proposals=after_nms,
        train_candidates=rpn.train_candidates or rpn.train_proposals or 2000,
        test_candidates=rpn.test_candidates or rpn.test_proposals,
    )


def phase_model(config: RunConfig, name: str) -> ModelConfig:
    """Return the model that a phase trains: that of the run with what the phase changes.

    Boxes stay class-specific, or class-agnostic, so that a box head fits those of all phases.
    """
    model, detector = config.model, config.phases[name].model.detector
    if detector is None:
        return model
    roi = dataclasses.replace(model.roi, class_agnostic=is_class_agnostic(model))
    return dataclasses.replace(model, detector=detector, roi=roi)


def parts_with_batch_norm(model: ModelConfig) -> list[str]:
    """Return the parts of a detector that have BN layers (the RPN head never has)."""
    if model.norm != "bn":
        return []
    parts = ["backbone"] if "norm" in backbone_facts(model.backbone).heeds else []
    if model.norm_scope != "all":
        return parts
    own = detector_facts(model.detector).normalized
    if model.box_head != "4conv1fc":  # which alone has convolutions
        own = tuple(part for part in own if part != "box_head")
    return [*parts, *(part for part in own if part in model_parts(model))]


def has_batch_norm(model: ModelConfig) -> bool:
    """Tell whether the model has any BN layer, so that a phase must say its ``norm_mode``."""
    return bool(parts_with_batch_norm(model))


def phase_source(config: RunConfig, name: str) -> str:
    """Return where the weights of a phase come from, with the default filled in."""
    is_first = name == next(iter(config.phases))
    return config.phases[name].start_from.source or ("random" if is_first else "previous")


def stated_cost(cost: StartCostConfig) -> dict[str, float]:
    """Return the numbers of a stated cost that are known, by the names of its options."""
    numbers: dict[str, float] = {}
    if cost.preset == "imagenet":
        numbers |= IMAGENET_COST
    for name in ("images", "instances", "pixels", "gpu_seconds"):
        if (number := getattr(cost, name)) is not None:
            numbers[name] = number
    return numbers


def imported_cost(config: RunConfig, name: str) -> dict[str, float]:
    """Return what was stated of the weights that a phase and those before it took from elsewhere.

    A phase that starts from random weights leaves behind what came before it.
    """
    total: dict[str, float] = {}
    for phase in config.phases:
        if phase_source(config, phase) != "previous":
            total = {}
        cost = config.phases[phase].start_from.cost
        for key, number in (stated_cost(cost) if cost is not None else {}).items():
            total[key] = total.get(key, 0) + number
        if phase == name:
            break
    return total


def length_of(phase: PhaseConfig) -> tuple[str, float]:
    """Return how long a phase is: the unit (``steps``, ``passes`` or ``images``) and the number."""
    lengths = {"steps": phase.steps, "passes": phase.passes, "images": phase.images}
    found = [(unit, length) for unit, length in lengths.items() if length is not None]
    assert len(found) == 1, found  # check_config refuses others
    return found[0]


def num_steps(phase: PhaseConfig) -> int:
    """Return the optimizer steps of a phase whose length has been settled."""
    assert phase.steps is not None
    return phase.steps


def drop_points(phase: PhaseConfig) -> list[float]:
    """Return when the rate drops, in the unit of the phase's length and counted from its start."""
    length = length_of(phase)[1]
    if phase.drops is None:
        return [length * 2 / 3, length * 11 / 12]
    return [drop if drop >= 0 else length + drop for drop in phase.drops]


def in_steps(phase: PhaseConfig, steps_per_unit: float) -> PhaseConfig:
    """Return a phase with its length and its drops in steps.

    Args:
        phase: with its length in any unit.
        steps_per_unit: steps in one unit of its length.
    """
    drops = phase.drops
    if drops is not None:
        drops = [round(point * steps_per_unit) for point in drop_points(phase)]
    length = length_of(phase)[1]
    steps = math.ceil(length * steps_per_unit - 1e-6)  # 1.1 x 10 is a little more than 11
    return dataclasses.replace(phase, steps=steps, passes=None, images=None, drops=drops)


def is_timm(source: str) -> bool:
    """Tell whether a source is published weights by timm's name: ``timm`` or ``timm:NAME``."""
    return source == "timm" or source.startswith("timm:")


def place_of(path: str) -> str:
    """Return one text for all ways to write a place: links, ``..``, relative, a slash at the end.

    Args:
        path: of what lies here, or an address.
    """
    if "://" in path or path.startswith("pipe:"):
        return path.rstrip("/")
    return os.path.realpath(path)


def comparable(key: str, value: Any) -> Any:
    """Return the value of an option such that ways to write the same path are equal.

    Args:
        key: full key.
        value: as written.
    """
    if isinstance(value, list):
        return [comparable(key, each) for each in value]
    is_name = isinstance(value, str) and (value in ("random", "previous") or is_timm(value))
    if key.endswith(PLACES) and isinstance(value, str) and not is_name:
        return place_of(value)
    return value


def is_foreign_file(source: str) -> bool:
    """Tell by its name whether a source is a file that holds a backbone alone."""
    return source.endswith((".pkl", ".pth", ".pt", ".bin", ".th", ".tar"))


def start_parts(config: RunConfig, name: str) -> list[str]:
    """Return the parts that a phase loads, with the default filled in.

    By default all that the source has: of the phase before, those that its model has too.
    """
    source, parts = phase_source(config, name), config.phases[name].start_from.parts
    if source == "random":
        return []
    if is_timm(source) or is_foreign_file(source):
        return list(parts or ["backbone"])
    own = model_parts(phase_model(config, name))
    if parts is None and source == "previous":
        before = model_parts(phase_model(config, phase_before(config, name)))
        return [part for part in own if part in before]
    return list(parts or own)


def phase_before(config: RunConfig, name: str) -> str:
    """Return the name of the phase before a phase that is not the first."""
    names = list(config.phases)
    return names[names.index(name) - 1]


def num_lanes(phase: PhaseConfig) -> int:
    """Return the micro-batches of one step over all ranks; ``images_per_step`` must be known."""
    assert phase.images_per_step is not None
    return phase.images_per_step // phase.images_per_gpu


def eval_resize(config: RunConfig, name: str) -> ResizeConfig:
    """Return how the model of a phase sees the images that it is evaluated on."""
    return config.evaluation.resize or config.phases[name].resize
