"""Weights in and out of files: whole detectors, parts of them, published backbones.

A weights file is a ``model.safetensors`` whose metadata carry the resolved config and the
categories, so that it is a detector by itself. Names of tensors are those of the detector's state;
the first word of a name is its part (``backbone``, ``fpn``, ``rpn``, ``box_head``, ``mask_head``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bigdet.config.derived import phase_model, plan_of, test_resize
from bigdet.config.load import dump_config, parse_config
from bigdet.config.schema import RunConfig
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.norms import set_norm_mode
from bigdet.run_dir import RunDir

logger = logging.getLogger(__name__)

FORMAT = "bigdet-1"

PUBLISHED = {
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "resnext101_32x8d": "resnext101_32x8d.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in1k",
}
"""timm's names of ImageNet-1k weights, of the plain recipes that detection papers start from."""


@dataclass(frozen=True)
class LoadedPart:
    """A row of the table of what was loaded.

    Attributes:
        part: of the detector.
        source: where it came from.
        tensors: how many parameters and buffers.
        parameters: how many numbers in the parameters.
    """

    part: str
    source: str
    tensors: int
    parameters: int


def weights_metadata(
    config: RunConfig, categories: Sequence[Mapping[str, Any]], phase: str
) -> dict[str, str]:
    """Describe a detector for its weights file.

    Args:
        config: the resolved config of the run.
        categories: of the training set, in the order of the labels.
        phase: the phase that the weights come from.
    """
    return {
        "format": FORMAT,
        "config": dump_config(config),
        "categories": json.dumps(list(categories)),
        "phase": phase,
    }


def save_detector_weights(path: Path, detector: nn.Module, metadata: dict[str, str]) -> None:
    """Write parameters and buffers of a detector; `weights_metadata` makes the metadata."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in detector.state_dict().items()}
    save_file(tensors, path, metadata=metadata)


def load_detector(path: str | Path) -> Detector:
    """Build a detector and load its weights, ready to predict.

    Args:
        path: a ``model.safetensors``, a checkpoint folder, or a run folder (its final weights, or
            those of its newest checkpoint).

    Returns:
        The detector on the CPU, in evaluation mode, batch normalization fixed, with its
        ``categories`` (in the order of the labels) and its ``test_size`` (short side and longest
        long side, pixels) as the run evaluated it.
    """
    file = find_weights(Path(path))
    tensors, metadata = _read(file)
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
    detector.test_size = plan_of(test_resize(config, phase))
    detector.categories = categories
    return detector.eval()


def find_weights(path: Path) -> Path:
    """Return the weights file that a path stands for: the file, or that of a checkpoint or run."""
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(
            f"{path}: does not exist. Give a model.safetensors, a checkpoint folder or a run "
            f"folder."
        )
    run_dir = RunDir(path)
    if run_dir.weights.is_file():  # a checkpoint's weights have the name of a run's
        return run_dir.weights
    if run_dir.latest.is_file():
        newest = RunDir(run_dir.checkpoints / run_dir.latest.read_text().strip()).weights
        if newest.is_file():
            return newest
    raise ValueError(
        f"{path}: found neither {run_dir.weights.name} nor a finished checkpoint. Give a run "
        f"folder with at least one checkpoint, a checkpoint folder, or the file."
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file, a checkpoint or a run, onto the CPU."""
    return read_weights(path)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Read the tensors of a weights file, and the names of its classes where it has them."""
    tensors, metadata = _read(find_weights(Path(path)))
    if "categories" not in metadata:
        return tensors, None
    return tensors, [category["name"] for category in json.loads(metadata["categories"])]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: cannot be read as safetensors ({error}). Nothing else is read, because "
            f"pickled files can run code; a cut file has to be copied again."
        ) from error


def part_of(name: str) -> str:
    """Return the part of the detector that a tensor belongs to, the first word of its name."""
    return name.split(".", 1)[0]


def load_parts(
    detector: nn.Module, tensors: Mapping[str, Tensor], parts: Sequence[str], source: str
) -> list[LoadedPart]:
    """Copy whole parts of a detector from named tensors; the other parts stay as they are.

    Nothing is changed unless every tensor of every part fits.

    Args:
        detector: the model to fill.
        tensors: by the names of the detector's state; other parts than the wanted are ignored.
        parts: the parts to load.
        source: where the tensors come from, for messages.

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
    misfits = [
        f"{len(names)} {kind} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", sorted(wanted - offered)),
            ("unexpected", sorted(offered - wanted)),
            ("of another shape", misshaped),
            ("no part of the model", nowhere),
        )
        if names
    ]
    if misfits:
        raise ValueError(
            f"{source}: does not fit the model in {', '.join(parts)}: {', '.join(misfits)}. Make "
            f"model.* that of the weights, or name only the parts that fit in start_from.parts."
        )
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(tensors[name])
    rows = []
    for part in parts:
        sizes = [p.numel() for name, p in detector.named_parameters() if part_of(name) == part]
        num_tensors = sum(part_of(name) == part for name in wanted)
        rows.append(LoadedPart(part, source, num_tensors, sum(sizes)))
    return rows


def check_published(name: str) -> None:
    """Raise ``ValueError`` if timm has no weights for a backbone."""
    if name not in PUBLISHED:
        raise ValueError(
            f"start_from.source: timm has no weights for model.backbone {name}, only for "
            f"{', '.join(PUBLISHED)}. Choose one of them, or start from random."
        )


def load_timm_backbone(detector: nn.Module, name: str) -> list[LoadedPart]:
    """Load the published ImageNet weights of a backbone into the detector's.

    timm downloads them into the Hugging Face cache of this machine, once.

    Args:
        detector: a detector whose backbone is ``name``.
        name: ``model.backbone`` of the config.
    """
    check_published(name)
    model_name = PUBLISHED[name]
    try:
        timm_model = timm.create_model(model_name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"start_from.source: timm could not download {model_name} ({error}). Without a network "
            f'here, fetch it on another machine with python -c "import timm; timm.create_model('
            f"'{model_name}', pretrained=True)\", copy its Hugging Face cache folder "
            f"(~/.cache/huggingface) to this one, and point HF_HOME at it."
        ) from error
    return load_parts(detector, from_timm(timm_model.state_dict()), ["backbone"], model_name)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a timm classifier as those of a detector's backbone.

    The classifier is dropped, and Swin's final norm with it: the norms of the four outputs are the
    detector's own, and start at scale 1 and shift 0.
    """
    tensors = {
        f"backbone.{name}": tensor
        for name, tensor in state.items()
        if part_of(name) not in ("fc", "head", "norm")
    }
    if "norm.weight" in state:
        width = len(state["norm.weight"])
        for index in range(4):
            channels = width // 2 ** (3 - index)
            tensors[f"backbone.norm{index}.weight"] = torch.ones(channels)
            tensors[f"backbone.norm{index}.bias"] = torch.zeros(channels)
    return tensors
