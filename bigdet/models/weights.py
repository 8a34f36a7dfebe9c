"""Weights in and out of files: whole detectors and parts of them.

A weights file is a ``model.safetensors`` whose metadata carry the resolved config and the
categories, so that it is a detector by itself. Names of tensors are those of the detector's state;
the first word of a name is its part (``backbone``, ``fpn``, ``rpn``, ``box_head``, ``mask_head``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigdet.config.load import dump_config, parse_config
from bigdet.config.resize import plan_of
from bigdet.config.run import RunConfig, eval_resize, phase_model
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.frozen import FROZEN, freeze_backbone, lacks_frozen, open_frozen
from bigdet.models.norms import set_norm_mode
from bigdet.ops.finite import describe_not_finite
from bigdet.pieces.index import MODEL_FILE, STATE_FILE
from bigdet.pieces.reading import open_stored
from bigdet.pieces.tensor_file import TensorFile, write_state
from bigdet.pieces.unread import Unread
from bigdet.run_dir import RunDir

FORMAT = "bigdet-1"
AVERAGE = "moving average (EMA)"
"""Under ``weights`` in the metadata of what is one."""


@dataclass(frozen=True)
class LoadedPart:
    """A row of the table of what was loaded.

    Attributes:
        part: of the detector.
        source: where it came from.
        tensors: how many parameters and buffers.
        parameters: how many numbers in the parameters.
        note: what else is to be known of them, such as their licence.
    """

    part: str
    source: str
    tensors: int
    parameters: int
    note: str = ""


def weights_metadata(
    config: RunConfig,
    categories: Sequence[Mapping[str, Any]],
    phase: str,
    frozen: str | None = None,
) -> dict[str, str]:
    """Describe a detector for its weights file.

    Args:
        config: the resolved config of the run.
        categories: of the training set, in the order of the labels.
        phase: the phase that the weights come from.
        frozen: hash of the frozen backbone, which is not among them.
    """
    found = {} if frozen is None else {FROZEN: frozen}
    if config.phases[phase].ema is not None:
        found["weights"] = AVERAGE
    return found | {
        "format": FORMAT,
        "config": dump_config(config),
        "categories": json.dumps(list(categories)),
        "phase": phase,
    }


def save_detector_weights(path: Path, detector: nn.Module, metadata: dict[str, str]) -> None:
    """Write parameters and buffers of a detector; `weights_metadata` makes the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in detector.state_dict().items()}
    write_state(path, tensors, metadata)


def load_detector(path: str | Path, *, keep_frozen: bool = True) -> Detector:
    """Build a detector and load its weights, ready to predict.

    Args:
        path: a ``model.safetensors``, a checkpoint folder, or a run folder (its final weights, or
            those of its newest checkpoint).
        keep_frozen: let a frozen backbone run in bf16 and outside of the state, as in training.
            False: in fp32, as any other.

    Returns:
        The detector on the CPU, in evaluation mode, batch normalization fixed, with its
        ``categories`` (in the order of the labels) and its ``eval_size`` (short side and longest
        long side, pixels) as the run evaluated it.
    """
    file = find_weights(Path(path))
    if file.is_file() and file.suffix != ".safetensors":
        raise ValueError(
            f"{file}: found the ending {file.suffix!r}, expected the model.safetensors of a run, a "
            f"checkpoint folder or a run folder. The file was not opened, so nothing in it was "
            f"run; `bigdet convert-weights` converts weights of others."
        )
    tensors, metadata = read_weights(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{file}: found format {metadata.get('format')!r} in its metadata, expected "
            f"{FORMAT!r}. Without the config no detector can be built: give the file of a bigdet "
            f"run, or the run's folder."
        )
    config = parse_config(metadata["config"], str(file))
    categories = json.loads(metadata["categories"])
    phase = metadata["phase"]
    detector = build_detector(phase_model(config, phase), len(categories))
    load_parts(detector, tensors, sorted({part_of(name) for name in tensors}), str(file))
    set_norm_mode(detector, "fixed")
    if FROZEN in metadata and keep_frozen:
        freeze_backbone(detector.backbone)
    detector.eval_size = plan_of(eval_resize(config, phase))
    detector.categories = categories
    return detector.eval()


def read_weights(file: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Open the weights of a detector, with its frozen backbone, and read their metadata."""
    tensors, metadata = read_safetensors(file)
    if lacks_frozen(metadata):
        frozen = open_frozen(file, metadata[FROZEN], metadata["phase"])
        tensors = Unread.changed(tensors, frozen)
    return tensors, metadata


def read_safetensors(file: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Open weights, which are read when they are used, and their metadata.

    Args:
        file: a safetensors file, or a checkpoint in pieces.
    """
    if file.is_dir():
        stored = open_stored(file)
        return stored.unread(), stored.metadata
    tensors = TensorFile(file)
    return {name: tensors.mapped(name) for name in tensors}, tensors.metadata


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, or of a checkpoint in pieces, alone."""
    return open_stored(file).metadata if file.is_dir() else TensorFile(file).metadata


def find_weights(path: Path) -> Path:
    """Return where the weights are that a path names: a file, or a checkpoint in pieces.

    Args:
        path: a file, a checkpoint, or a run (its final weights, or its newest checkpoint).
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(
            f"{path}: does not exist. Give a model.safetensors, a checkpoint folder or a run "
            f"folder."
        )
    run_dir = RunDir(path)
    folders = [path]
    if run_dir.latest.is_file():
        folders.append(run_dir.checkpoints / run_dir.latest.read_text().strip())
    for folder in folders:
        for found in (folder / MODEL_FILE, folder / STATE_FILE):
            if found.is_file():
                return found if found.name == MODEL_FILE else folder
    raise ValueError(
        f"{path}: found neither {run_dir.weights.name} nor a finished checkpoint. Give a run "
        f"folder with at least one checkpoint, a checkpoint folder, or the file."
    )


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ``ValueError`` if weights or running statistics hold NaN or infinities."""
    if found := describe_not_finite(tensors):
        raise ValueError(
            f"{source}: {found}. Such weights detect nothing and cannot be trained: the run that "
            f"wrote them had diverged, or the file is damaged. Give an earlier checkpoint, or get "
            f"the file again."
        )


def part_of(name: str) -> str:
    """Return the part of the detector that a tensor belongs to, the first word of its name."""
    return name.split(".", 1)[0]


def describe_misfits(names: Mapping[str, Sequence[str]]) -> str:
    """List names by what is wrong with them, the first three of each kind; nothing where none is.

    Such as ``2 missing (fpn.bias; rpn.bias), 1 unexpected (head.weight)``.
    """
    return ", ".join(
        f"{len(found)} {kind} ({'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''})"
        for kind, found in names.items()
        if found
    )


def load_parts(
    detector: nn.Module,
    tensors: Mapping[str, Tensor],
    parts: Sequence[str],
    source: str,
    *,
    advice: str = ", or name only the parts that fit in start_from.parts",
) -> list[LoadedPart]:
    """Copy whole parts of a detector from named tensors; the other parts stay as they are.

    Nothing is changed unless every tensor of every part fits and is finite.

    Args:
        detector: the model to fill.
        tensors: by the names of the detector's state; other parts than the wanted are ignored.
        parts: the parts to load.
        source: where the tensors come from, for messages.
        advice: what else to do where they do not fit, for messages.

    Returns:
        What was loaded, a row per part.
    """
    own = detector.state_dict()
    wanted = {name for name in own if part_of(name) in parts}
    offered = {
        name
        for name in tensors
        # torch's counter of batch normalization, which ours has no use for
        if part_of(name) in parts and not name.endswith(".num_batches_tracked")
    }
    misshaped = [
        f"{name}: {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(wanted & offered)
        if tensors[name].shape != own[name].shape
    ]
    nowhere = [part for part in parts if not any(part_of(name) == part for name in wanted)]
    misfits = describe_misfits(
        {
            "missing": sorted(wanted - offered),
            "unexpected": sorted(offered - wanted),
            "of another shape": misshaped,
            "no part of the model": nowhere,
        }
    )
    if misfits:
        raise ValueError(
            f"{source}: does not fit the model in {', '.join(parts)}: {misfits}. Make "
            f"model.* that of the weights{advice}."
        )
    values = Unread(lambda name: tensors[name].to(own[name].dtype), [n for n in own if n in wanted])
    refuse_not_finite(values, source)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    rows = []
    for part in parts:
        sizes = [p.numel() for name, p in detector.named_parameters() if part_of(name) == part]
        num_tensors = sum(part_of(name) == part for name in wanted)
        rows.append(LoadedPart(part, source, num_tensors, sum(sizes)))
    return rows
