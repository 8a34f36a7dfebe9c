"""Rules of the heads, and of phases that hand over to another detector."""

from __future__ import annotations

import dataclasses

from bigdet.config.derived import (
    has_cascade,
    has_keypoints,
    model_parts,
    phase_before,
    phase_model,
)
from bigdet.config.families import DETECTORS, detector_facts
from bigdet.config.load import ConfigError
from bigdet.config.rules import not_negative, positive, require, unused
from bigdet.config.schema import RunConfig


def check_heads(config: RunConfig) -> None:
    """Check the losses of the heads, and that each option has a head that heeds it."""
    rpn, roi = config.model.rpn, config.model.roi
    not_negative("model.rpn.box_beta", rpn.box_beta)
    for key, number in (
        ("model.rpn.border", rpn.border or 0),
        ("model.roi.sampling_ratio", roi.sampling_ratio),
    ):
        not_negative(key, number)
    for key, fraction in (
        ("model.rpn.low_quality_iou", rpn.low_quality_iou),
        ("model.roi.crowd_coverage", roi.crowd_coverage or 0),
    ):
        require(0 <= fraction <= 1, key, fraction, "in [0, 1]")
    positive("model.roi.box_beta", roi.box_beta)
    positive("model.roi.box_loss_weight", roi.box_loss_weight)
    if roi.box_loss != "smooth_l1":
        unused("model.roi", roi, "box_beta", "is for box_loss: smooth_l1")
    for name in ("num_keypoints", "width"):
        positive(f"model.keypoint.{name}", getattr(config.model.keypoint, name))
    not_negative("model.keypoint.min_visible", config.model.keypoint.min_visible)
    models = [phase_model(config, name) for name in config.phases]
    for option in ("cascade", "keypoint"):
        if not any(option in detector_facts(model.detector).options for model in models):
            known = [name for name, facts in DETECTORS.items() if option in facts.options]
            section, reason = getattr(config.model, option), f"is for {' and '.join(known)}"
            for field in dataclasses.fields(section):
                unused(f"model.{option}", section, field.name, reason)
    if not any(has_keypoints(model) for model in models):
        unused("data.train", config.data.train, "min_keypoints", "is for keypoint_rcnn")
    if models and all(has_cascade(model) for model in models):
        reason = "the stages of a cascade have their own, 0.5, 0.6 and 0.7"
        unused("model.roi", roi, "positive_iou", reason)


def check_detector(config: RunConfig, name: str) -> None:
    """Check that a phase changes the detector within the family that shares its parts."""
    detectors = (config.model.detector, phase_model(config, name).detector)
    is_shared = all("rpn" in detector_facts(detector).parts for detector in detectors)
    if detectors[0] != detectors[1] and not is_shared:
        raise ConfigError(
            f"phases.{name}.model.detector: found {detectors[1]} where model.detector is "
            f"{detectors[0]}, expected two of the R-CNN family, which share their parts. Write "
            f"two runs instead; the second may start from parts of the first."
        )


def check_hand_over(config: RunConfig, name: str, parts: list[str]) -> None:
    """Check that the phase before has the parts that a phase loads from it."""
    key, before = f"phases.{name}", phase_before(config, name)
    earlier, model = phase_model(config, before), phase_model(config, name)
    absent = [part for part in parts if part not in model_parts(earlier)]
    if absent:
        raise ConfigError(
            f"{key}.start_from.parts: the phase {before} trains a {earlier.detector}, which has no "
            f"{', '.join(absent)}. Leave them out; they start anew."
        )
    if has_cascade(earlier) and not has_cascade(model) and "box_head" in parts:
        raise ConfigError(
            f"{key}.model.detector: the three box heads of {before}'s {earlier.detector} do not "
            f"become the one of a {model.detector}. Write {earlier.detector} here too, or list "
            f"start_from.parts without box_head, which then starts anew."
        )
