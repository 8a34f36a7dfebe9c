"""Convert weights of detectors: from and to torchvision, and from detectron2 and mmdetection.

Its command line is in ``cli/arguments/convert_weights.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.convert_weights import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bigdet.cli.running import run_command
from bigdet.config.load import check_phase, load_config
from bigdet.config.run import phase_model
from bigdet.data.format.manifest import Category
from bigdet.data.making.sources.categories import load_categories
from bigdet.host.files import check_file
from bigdet.logs.log import setup_logging
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.weights import (
    load_detector,
    load_parts,
    save_detector_weights,
    weights_metadata,
)
from bigdet.pieces import tensor_file
from bigdet.weights.classes import carry_classes
from bigdet.weights.tensor_files import read_tensors
from bigdet.weights.torchvision_layout import from_torchvision, to_torchvision
from bigdet.weights.whole_detectors import (
    THEIR_SAMPLING_RATIO,
    from_framework,
    parts_to_load,
    with_sampling,
)


def main(argv: Sequence[str]) -> int:
    """Convert one file and print its number of tensors."""
    options = parse_arguments(argv)
    setup_logging(rank=0)
    num_tensors = export(options) if options.direction == "to-torchvision" else restore(options)
    print(f"{options.out}: {num_tensors} tensors")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a detector's weights with torchvision's names; return the number of tensors."""
    check_out(options.out, (".pth", ".pt", ".safetensors"))
    detector = load_detector(options.model, keep_frozen=False)
    write_state(options.out, to_torchvision(detector, detector.state_dict()))
    return len(detector.state_dict())


def restore(options: argparse.Namespace) -> int:
    """Write another program's weights as a ``model.safetensors``; return the number of tensors."""
    check_out(options.out, (".safetensors",))
    config = load_config(options.config, options.overrides)
    phase = options.phase or list(config.phases)[-1]
    check_phase(config, phase)
    categories = load_categories(options.categories)
    detector = build_detector(phase_model(config, phase), len(categories))
    if options.source == "torchvision":
        state = read_tensors(options.weights, options.ema)[0]
        detector.load_state_dict(from_torchvision(detector, state, str(options.weights)))
    else:
        parts = load_framework(detector, options, categories)
        is_chosen = any(word.startswith("model.roi.sampling_ratio=") for word in options.overrides)
        if "box_head" in parts and not is_chosen:
            config = with_sampling(config, THEIR_SAMPLING_RATIO)
            print(
                f"model.roi.sampling_ratio: {THEIR_SAMPLING_RATIO}, as {options.source} pools "
                f"regions; model.roi.sampling_ratio=N sets another"
            )
    metadata = weights_metadata(config, [asdict(category) for category in categories], phase)
    save_detector_weights(options.out, detector, metadata)
    return len(detector.state_dict())


def load_framework(
    detector: Detector, options: argparse.Namespace, categories: Sequence[Category]
) -> list[str]:
    """Load the weights of detectron2 or mmdetection, the classes in the order of categories.

    Returns:
        The parts of the detector that the file has.
    """
    source = str(options.weights)
    tensors, names = read_tensors(options.weights, options.ema)
    if names is None and options.source == "detectron2":
        names = [category.name for category in sorted(categories, key=lambda one: one.id)]
    tensors = from_framework(detector, tensors, options.source, options.pixels, source)
    own = [category.name for category in categories]
    if names is not None and names != own:
        if sorted(names) != sorted(own):
            raise ValueError(
                f"{source}: its {len(names)} classes ({', '.join(names[:3])}, ...) are not the "
                f"{len(own)} of {options.categories} ({', '.join(own[:3])}, ...). Give the "
                f"categories that it was trained on."
            )
        tensors = dict(carry_classes(detector.state_dict(), tensors, names, own)[0])
    advice = " (model.box_head=2fc or 4conv1fc, model.backbone, ...), and --categories its classes"
    parts = parts_to_load(detector, tensors)
    load_parts(detector, tensors, parts, source, advice=advice)
    return parts


def check_out(path: Path, suffixes: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the file can be written and has one of the suffixes."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}.")
    check_file(path, "out")


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a ``state_dict`` in the format of the file's suffix."""
    if path.suffix == ".safetensors":
        tensor_file.write_state(path, state)
        return
    try:
        torch.save({name: value.contiguous() for name, value in state.items()}, path)
    except RuntimeError as error:  # a full disk
        path.unlink(missing_ok=True)
        problem = str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written: {problem}. Free some space.") from error


if __name__ == "__main__":
    run_command(main)
