"""The evaluation: when AP is measured, how, and of which views of an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigdet.config.resize import FOR_TRAINING, ResizeConfig, check_resize, ignored_in_resize
from bigdet.config.rules import (
    ConfigError,
    Ignored,
    all_positive,
    not_negative,
    positive,
    positive_fraction,
    require,
)

Metric = Literal["coco", "voc07", "voc12"]
MAX_DETECTIONS = 100  # of a class on an image, as COCO counts


@dataclass(frozen=True, kw_only=True)
class TtaConfig:
    """Test-time augmentation: several views of each image, merged."""

    flip: bool = True
    """Also use the mirror image of every size."""
    scales: list[int] = field(
        default_factory=lambda: [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
    )
    """Short sides of the views, pixels."""
    cap: int = 2000
    """Longest long side of the views, pixels. With ``pool: candidates`` the view at the size of the
    plain evaluation keeps the cap of that one, 1333 for a short side of 800."""
    pool: Literal["candidates", "detections"] = "candidates"
    """What is merged. ``candidates``: all boxes of all views above ``model.roi.score_threshold``,
    then NMS and voting, and the best ``detections_per_image`` are kept, as in Detectron.
    ``detections``: the detections of each view after its own NMS, as in detectron2; faster."""
    vote_iou: float | None = 0.9
    """A box becomes the mean of the boxes of other views that overlap it by at least this. None: no
    voting."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how AP is measured; every phase also ends with an evaluation."""

    every: int | None = None
    """Steps between evaluations. None: only at the end of a phase."""
    images_per_gpu: int = 1
    """Images in one forward pass of one rank. They are padded to the size of the largest, and
    another padding changes AP a little: compare runs with the same value."""
    resize: ResizeConfig | None = None
    """Size of the images. None: as in the phase."""
    tta: TtaConfig | None = None
    """Test-time augmentation in every evaluation; ``--tta`` of ``bigdet evaluate`` uses it once. It
    takes two passes per view. None: one view at the size of ``resize``."""
    metric: Metric = "coco"
    """How AP is defined. ``coco``: as COCO does. ``voc07`` and ``voc12``: AP of boxes as PASCAL VOC
    defines it, over 11 recalls or over all; AP50 is VOC's own number."""
    precise_bn: int | None = None
    """Before an evaluation during training, measure the running statistics of BN with the current
    weights on the training images of this many steps, instead of using the moving average over past
    weights (detectron2: 200). For ``norm_mode`` live and sync only. The order of training does not
    change. None: the moving average."""
    max_detections: int = MAX_DETECTIONS
    """How many detections per class and image AP and AR count, best first, for boxes and masks; 10
    to 10,000. COCO's value is 100; another value gives another AP, like ``maxDets`` of pycocotools.
    ``detections_per_image`` limits what the model reports. VOC's AP counts all."""
    pictures: int = 8
    """Validation images drawn with ground truth and detections at the end of a phase: half of them
    the worst, half the best."""


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check when and how AP is measured."""
    key = "evaluation"
    positive(key, evaluation, "every", "images_per_gpu", "precise_bn")
    not_negative(key, evaluation, "pictures")
    check_max_detections(evaluation.max_detections, evaluation.metric)
    if evaluation.tta is not None:
        _check_tta(evaluation.tta)
    if evaluation.resize is not None:
        if evaluation.tta is not None:
            raise ConfigError(
                f"{key}.resize: with test-time augmentation the sizes are evaluation.tta.scales, "
                f"so it would be ignored. Remove one of them."
            )
        check_resize(f"{key}.resize", evaluation.resize)


def check_max_detections(value: int, metric: Metric) -> None:
    """Check how many detections count; VOC's metrics have no limit."""
    key = "evaluation.max_detections"
    require(10 <= value <= 10_000, key, value, "10 to 10000")
    if metric != "coco" and value != MAX_DETECTIONS:
        raise ConfigError(
            f"{key}: found {value}, but {metric} counts all detections, so it would be ignored. "
            f"Write {MAX_DETECTIONS}, or leave it out."
        )


def _check_tta(tta: TtaConfig) -> None:
    key, scales = "evaluation.tta", tta.scales
    all_positive(key, tta, "scales")
    require(tta.cap >= max(scales), f"{key}.cap", tta.cap, f"at least {max(scales)}")
    positive_fraction(key, tta, "vote_iou")


def ignored_in_evaluation(evaluation: EvaluationConfig, *, has_live_norms: bool) -> Ignored:
    """Yield the options without effect; ``has_live_norms``: a phase updates BN's statistics."""
    if not has_live_norms:
        yield "evaluation.precise_bn", "no phase has norm_mode live or sync"
    if evaluation.resize is not None:
        yield from ignored_in_resize("evaluation.resize", evaluation.resize)
        for name in FOR_TRAINING:
            yield f"evaluation.resize.{name}", "is for training"
