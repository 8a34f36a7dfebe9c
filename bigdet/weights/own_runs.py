"""The reader of what bigdet wrote: a run, a checkpoint or a ``model.safetensors``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigdet.config.derived import has_cascade, phase_model
from bigdet.config.load import flat_options, parse_config
from bigdet.models.detector import Detector
from bigdet.models.heads.cascade import spread_over_stages
from bigdet.models.weights import (
    LoadedPart,
    find_weights,
    load_parts,
    read_metadata,
    read_safetensors,
)
from bigdet.weights.classes import to_own_classes

logger = logging.getLogger(__name__)


def load_run(
    detector: Detector, path: Path, parts: Sequence[str], classes: Sequence[str]
) -> tuple[list[LoadedPart], int | None]:
    """Load parts of a detector from one that bigdet trained, the rows of classes by their names.

    Args:
        detector: to fill.
        path: of the run, checkpoint or file.
        parts: to load.
        classes: names in the order of the detector's labels.

    Returns:
        A row per part, and how many classes kept their weights: None where both have the same
        classes, or the file does not say which.
    """
    tensors, metadata = read_safetensors(find_weights(path))
    if has_cascade(detector.config):
        tensors = spread_over_stages(tensors)
    kept = None
    theirs = [category["name"] for category in json.loads(metadata.get("categories", "[]"))]
    if theirs and theirs != list(classes):
        tensors, kept = to_own_classes(detector.state_dict(), tensors, theirs, classes)
    try:
        return load_parts(detector, tensors, parts, str(path)), kept
    except ValueError as error:
        raise ValueError(f"{error}{_other_options(detector, metadata, path)}") from error


def _other_options(detector: Detector, metadata: Mapping[str, str], path: Path) -> str:
    """Say, in a sentence after a blank, which options of the model were others in training."""
    if "config" not in metadata:
        return ""
    trained = parse_config(metadata["config"], str(path))
    theirs = flat_options(phase_model(trained, metadata["phase"]))
    own = flat_options(detector.config)
    differing = [
        f"model.{key}={value} (here {own.get(key)})"
        for key, value in theirs.items()
        if own.get(key) != value
    ]
    return f" They were trained with {', '.join(differing)}." if differing else ""


def warn_of_sampling(detector: Detector, path: Path) -> None:
    """Say so where a detector pools regions otherwise than its weights were trained to.

    Args:
        detector: with a box head out of the file.
        path: of the run, checkpoint or file.
    """
    metadata = read_metadata(find_weights(path))
    if "config" not in metadata:
        return
    theirs = parse_config(metadata["config"], str(path)).model.roi.sampling_ratio
    own = detector.config.roi.sampling_ratio
    if theirs != own:
        logger.warning(
            "%s was trained with model.roi.sampling_ratio: %s, and this run has %s. Write "
            "model.roi.sampling_ratio: %s to pool regions as its heads have learned them.",
            path, theirs, own, theirs,
        )  # fmt: skip
