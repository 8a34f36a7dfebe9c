"""The reader of what bigdet wrote: a run, a checkpoint or a ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigdet.config.compare import flat_options
from bigdet.config.families import LACKS
from bigdet.config.load import parse_config
from bigdet.config.model import ModelConfig, has_cascade, is_class_agnostic, lacking
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

_HEAD = ("norm", "roi.sampling_ratio")
_HIDDEN: dict[str, tuple[str, ...]] = {
    "backbone": (
        "norm", "taps", "token_window", "rope_window", "global_blocks", "image_windows",
        "pad_to_square", "stride_in_1x1",
    ),
    "fpn": ("norm", "neck"),
    "rpn": ("rpn.anchor_sizes", "rpn.anchor_ratios"),
    "box_head": _HEAD,
    "mask_head": _HEAD,
    "keypoint_head": _HEAD,
    "retina_head": (
        "norm", "retina.anchor_sizes", "retina.scales_per_octave", "retina.anchor_ratios",
    ),
}  # fmt: skip
"""Options of ``model`` by the parts whose weights they change, but not the shapes of them."""


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


def hidden_differences(detector: Detector, path: Path, parts: Sequence[str]) -> str:
    """Say which options of loaded parts, that shapes do not show, were others in training."""
    trained = _trained_model(read_metadata(find_weights(path)), path)
    if trained is None:
        return ""
    own, theirs = flat_options(detector.config), flat_options(trained)
    keys = {key: None for part in parts for key in _hidden(part, detector.config)}
    differing = [key for key in keys if key in own and key in theirs and own[key] != theirs[key]]
    if "norm" in differing and {own["norm"], theirs["norm"]} != {"gn", "ln"}:
        differing.remove("norm")  # other pairs differ in shapes where a part has any
    if not differing:
        return ""
    found = "; ".join(
        f"model.{key}: {theirs[key]}, and this run has {own[key]}" for key in differing
    )
    written = ", ".join(f"model.{key}: {theirs[key]}" for key in differing)
    return (
        f"{path} was trained with {found}. Its weights fit either way. Write {written} to use them "
        f"as they were trained."
    )


def _hidden(part: str, model: ModelConfig) -> list[str]:
    """List the options of a part that shapes do not show; for a backbone those that it takes."""
    keys = _HIDDEN.get(part, ())
    if part != "backbone":
        return list(keys)
    return [key for key in keys if key not in LACKS or not lacking(model, key)]


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
