"""The reader of what bigdet wrote: a run, a checkpoint or a ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigdet.config.compare import flat_options
from bigdet.config.load import parse_config
from bigdet.config.model import ModelConfig, has_cascade, is_class_agnostic, used
from bigdet.config.run import phase_model
from bigdet.models.detector import Detector
from bigdet.models.heads.cascade import spread_over_stages
from bigdet.models.weights import (
    AVERAGE,
    LoadedPart,
    find_weights,
    load_parts,
    read_metadata,
    read_weights,
)
from bigdet.weights.classes import carry_classes


def load_run(
    detector: Detector, path: Path, parts: Sequence[str], classes: Sequence[str]
) -> tuple[list[LoadedPart], int | None]:
    """Load parts of a detector from one that bigdet trained, the rows of classes by their names.

    The path is a run's, a checkpoint's or a file's; ``classes`` are in the order of the detector's
    labels.

    Returns:
        A row per part, and how many classes kept their weights: None where both have the same
        classes, or the file does not say which.
    """
    tensors, metadata = read_weights(find_weights(path))
    source = f"{path} ({AVERAGE})" if metadata.get("weights") == AVERAGE else str(path)
    if has_cascade(detector.config):
        tensors = spread_over_stages(tensors)
    kept = None
    theirs = [category["name"] for category in json.loads(metadata.get("categories", "[]"))]
    if theirs and theirs != list(classes):
        models = (detector.config, _trained_model(metadata, path))
        is_agnostic = "box_head" in parts and any(
            model is not None and model.roi is not None and is_class_agnostic(model)
            for model in models
        )
        tensors, kept = carry_classes(
            detector.state_dict(), tensors, theirs, classes, is_agnostic=is_agnostic
        )
    try:
        return load_parts(detector, tensors, parts, source), kept
    except ValueError as error:
        raise ValueError(f"{error}{_other_options(detector, metadata, path)}") from error


def other_sampling(detector: Detector, path: Path) -> str:
    """Say that a detector pools regions otherwise than its weights were trained to, if it does."""
    trained = _trained_model(read_metadata(find_weights(path)), path)
    own = used(detector.config.roi).sampling_ratio
    theirs = own if trained is None or trained.roi is None else trained.roi.sampling_ratio
    if theirs == own:
        return ""
    return (
        f"{path} was trained with model.roi.sampling_ratio: {theirs}, and this run has {own}. "
        f"Write model.roi.sampling_ratio: {theirs} to pool regions as its heads have learned them."
    )


def _other_options(detector: Detector, metadata: Mapping[str, str], path: Path) -> str:
    """Say, in a sentence after a blank, which options of the model were others in training."""
    if (trained := _trained_model(metadata, path)) is None:
        return ""
    own = flat_options(detector.config)
    differing = [
        f"model.{key}={value} (here {own.get(key)})"
        for key, value in flat_options(trained).items()
        if own.get(key) != value
    ]
    return f" They were trained with {', '.join(differing)}." if differing else ""


def _trained_model(metadata: Mapping[str, str], path: Path) -> ModelConfig | None:
    if "config" not in metadata:
        return None
    return phase_model(parse_config(metadata["config"], str(path)), metadata["phase"])
