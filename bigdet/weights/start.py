"""Weights of one list of classes for a detector of another, and the table of what was loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from bigdet.config.derived import phase_model
from bigdet.config.load import flat_options, parse_config
from bigdet.config.schema import RunConfig
from bigdet.data.format.mix import name_key
from bigdet.models.weights import LoadedPart, find_weights, part_of, read_metadata
from bigdet.weights.classes import carry_classes, class_rows


def to_own_classes(
    detector: nn.Module,
    tensors: Mapping[str, Tensor],
    source_classes: Sequence[str],
    classes: Sequence[str],
) -> tuple[dict[str, Tensor], int]:
    """Move the weights of classes to this run's labels, by name.

    Args:
        detector: whose weights stay where the source does not have a class.
        tensors: of the source, by the names of the detector's state.
        source_classes: names in the order of the source's labels.
        classes: names in the order of the detector's labels.

    Returns:
        The tensors to load, and how many classes both have.
    """
    place = {name_key(name): label for label, name in enumerate(source_classes)}
    labels = [place.get(name_key(name)) for name in classes]
    carried = carry_classes(detector.state_dict(), tensors, len(source_classes), labels)
    return carried, sum(label is not None for label in labels)


def other_options(path: Path, config: RunConfig, name: str) -> str:
    """Say in which options of the model the weights of a run differ from a phase.

    Args:
        path: of the run, checkpoint or file.
        config: of this run.
        name: of the phase.

    Returns:
        A sentence after a blank, or nothing where they do not differ.
    """
    metadata = read_metadata(find_weights(path))
    if "config" not in metadata:
        return ""
    theirs, own = (
        flat_options(dataclasses.replace(each, model=phase_model(each, phase)))
        for each, phase in (
            (parse_config(metadata["config"], str(path)), metadata["phase"]), (config, name)
        )
    )  # fmt: skip
    differing = [
        f"{key}={value} (here {own.get(key)})"
        for key, value in theirs.items()
        if key.startswith("model.") and own.get(key) != value
    ]
    return f" They were trained with {', '.join(differing)}." if differing else ""


def other_sampling(path: Path, config: RunConfig, name: str) -> str:
    """Say that a phase pools regions otherwise than weights of a detector were trained to.

    Args:
        path: of the run, checkpoint or file.
        config: of this run.
        name: of the phase.

    Returns:
        A sentence, or nothing where it does not, or the file does not say.
    """
    metadata = read_metadata(find_weights(path))
    if "config" not in metadata:
        return ""
    theirs = parse_config(metadata["config"], str(path)).model.roi.sampling_ratio
    own = phase_model(config, name).roi.sampling_ratio
    if theirs == own:
        return ""
    return (
        f"{path} was trained with model.roi.sampling_ratio: {theirs}, and this run has {own}. "
        f"Write model.roi.sampling_ratio: {theirs} to pool regions as its heads have learned them."
    )


def start_table(
    detector: nn.Module, rows: Sequence[LoadedPart], num_classes: int, kept: int | None
) -> list[str]:
    """Return the lines of a table: each part of a detector, where it came from, how large it is.

    Args:
        detector: with its weights in place.
        rows: what was loaded; the other parts are random.
        num_classes: K.
        kept: classes that kept the weights of the source; None where it has the same ones.
    """
    sources = {row.part: row.source for row in rows}
    state, parameters = detector.state_dict(), dict(detector.named_parameters())
    lines = [("part", "tensors", "parameters", "classes kept", "from")]
    for part in dict.fromkeys(part_of(name) for name in state):
        names = [name for name in state if part_of(name) == part]
        count = sum(parameters[name].numel() for name in names if name in parameters)
        has_classes = any(
            state[name].ndim and class_rows(name, len(state[name]), num_classes) is not None
            for name in names
        )
        classes = ""
        if has_classes and part in sources:
            classes = "all" if kept is None else f"{kept} of {num_classes}"
        lines.append((part, f"{len(names)}", f"{count:,}", classes, sources.get(part, "random")))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return [
        f"{part:{widths[0]}}  {tensors:>{widths[1]}}  {count:>{widths[2]}}  "
        f"{classes:>{widths[3]}}  {source}"
        for part, tensors, count, classes, source in lines
    ]
