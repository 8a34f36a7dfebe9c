"""Weights of a detector for torchvision's detection models, and back.

    python tools/convert_weights.py to-torchvision runs/x mask_rcnn.pth
    python tools/convert_weights.py from-torchvision mask_rcnn.pth runs/x/config.yaml \
        --categories data/train/manifest.json --out model.safetensors

Faster, Mask and Keypoint R-CNN and RetinaNet, on ResNets and ResNeXts, or R-CNNs on VGG-16. The
result is a ``state_dict`` of torchvision's model of the same settings, written with torch.save
(.pth) or as safetensors. torchvision pools regions without bigdet's half-pixel shift and rounds its
anchors: ``bigdet.models.torchvision_model.torchvision_twin(detector)`` is its model without either,
with the same detections as bigdet's.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigdet.commands import run_command
from bigdet.config.check import check_config
from bigdet.config.derived import phase_model
from bigdet.config.load import load_config
from bigdet.models.build import build_detector
from bigdet.models.torchvision_layout import from_torchvision, to_torchvision
from bigdet.models.weights import load_detector, save_detector_weights, weights_metadata


def main(argv: Sequence[str]) -> int:
    """Convert one file and say what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    there = directions.add_parser(
        "to-torchvision", help="from a run, checkpoint or safetensors",
        epilog="example: python tools/convert_weights.py to-torchvision runs/x mask_rcnn.pth",
    )  # fmt: skip
    there.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    there.add_argument("out", type=Path, help=".pth or .safetensors")
    back = directions.add_parser(
        "from-torchvision", help="to a model.safetensors of bigdet",
        epilog="example: python tools/convert_weights.py from-torchvision mask_rcnn.pth "
        "runs/x/config.yaml --categories data/train/manifest.json --out model.safetensors",
    )  # fmt: skip
    back.add_argument("weights", type=Path, help="state_dict as .pth or .safetensors")
    back.add_argument("config", type=Path, help="of a run with this model")
    back.add_argument("overrides", nargs="*", metavar="key=value", help="options to change")
    back.add_argument(
        "--categories", type=Path, required=True,
        help="manifest.json of a shard set, or a JSON list of {id, name}, in the order of labels",
    )  # fmt: skip
    back.add_argument("--phase", help="the phase whose model and size it is; default: the last")
    back.add_argument("--out", type=Path, required=True, help="the model.safetensors to write")
    options = parser.parse_args(argv)
    num_tensors = export(options) if options.direction == "to-torchvision" else restore(options)
    print(f"{options.out}: {num_tensors} tensors")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a detector's weights by torchvision's names; return how many tensors."""
    detector = load_detector(options.model)
    write_state(options.out, to_torchvision(detector, detector.state_dict()))
    return len(detector.state_dict())


def restore(options: argparse.Namespace) -> int:
    """Write torchvision's weights as those of a detector; return how many tensors."""
    config = load_config(options.config, options.overrides)
    check_config(config)
    phase = options.phase or list(config.phases)[-1]
    if phase not in config.phases:
        raise ValueError(
            f"--phase: {options.config} has no phase {phase}, only {', '.join(config.phases)}."
        )
    categories = read_categories(options.categories)
    detector = build_detector(phase_model(config, phase), len(categories))
    state = read_state(options.weights)
    detector.load_state_dict(from_torchvision(detector, state, str(options.weights)))
    save_detector_weights(options.out, detector, weights_metadata(config, categories, phase))
    return len(detector.state_dict())


def read_categories(path: Path) -> list[dict[str, Any]]:
    """Read the categories of a manifest, or of a list of them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    categories = content.get("categories") if isinstance(content, dict) else content
    is_list = isinstance(categories, list) and bool(categories)
    if not is_list or not all("id" in entry and "name" in entry for entry in categories):
        raise ValueError(
            f"--categories {path}: found no list of categories with id and name. Give the "
            f"manifest.json of the training set."
        )
    return list(categories)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a ``state_dict``; nothing but tensors is unpickled."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path}: cannot be read as a state_dict of tensors ({str(error).splitlines()[0]}). "
            f"Save it with torch.save(model.state_dict(), PATH)."
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds more than tensors. Save model.state_dict() alone.")
    return dict(state)


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a ``state_dict`` in the format that the file's name says."""
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{path}: expected a name that ends in .pth, .pt or .safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(contiguous, path)
    else:
        torch.save(contiguous, path)


if __name__ == "__main__":
    run_command(main)
