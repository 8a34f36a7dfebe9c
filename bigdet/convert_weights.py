r"""Weights of a detector for torchvision's detection models, and back; detectron2's, mmdetection's.

    python tools/convert_weights.py to-torchvision runs/x mask_rcnn.pth
    python tools/convert_weights.py from-torchvision mask_rcnn.pth runs/x/config.yaml \
        --categories data/train/manifest.json --out model.safetensors
    python tools/convert_weights.py from-detectron2 model_final_f10217.pkl \
        configs/r50_imagenet.yaml model.box_head=2fc model.stride_in_1x1=true --pixels bgr_255 \
        --categories instances_val2017.json --out model.safetensors
    python tools/convert_weights.py from-mmdetection mask_rcnn_swin-t-p4-w7_fpn_1x_coco.pth \
        configs/swin_t_imagenet.yaml model.box_head=2fc --pixels rgb \
        --categories instances_val2017.json --out model.safetensors

The config is that of any run with this model; key=value changes it. The model.safetensors is one as
a run leaves it: predict, evaluate, export and start_from.source take it.

torchvision: Faster, Mask and Keypoint R-CNN and RetinaNet, on ResNets and ResNeXts, or R-CNNs on
VGG-16. What to-torchvision writes is a ``state_dict`` of torchvision's model of the same settings,
with torch.save (.pth) or as safetensors. torchvision pools regions without bigdet's half-pixel
shift and rounds its anchors: ``bigdet.models.torchvision_model.torchvision_twin(detector)`` is its
model without either, with the same detections as bigdet's.

detectron2 (.pkl, .pth) and mmdetection 2 and 3 (.pth): Faster, Mask and Cascade R-CNN and RetinaNet
on a pyramid, detectron2's Keypoint R-CNN too, on ResNets, ResNeXts (without deformable
convolutions) and Swin. --pixels says how images were given to the network, which most files do
not: ``rgb``, ``bgr``, or ``bgr_255`` (not divided by the deviation: R-50 and R-101 of detectron2,
'caffe' in mmdetection, both with model.stride_in_1x1=true). Classes are moved to the order of
--categories; mmdetection's files name theirs, detectron2 has them by rising id. Nothing in a file
is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bigdet.commands import run_command
from bigdet.config.check import check_config
from bigdet.config.derived import phase_model
from bigdet.config.load import check_phase, load_config
from bigdet.config.phase_schema import Pixels
from bigdet.data.manifest import Category
from bigdet.data.sources.categories import load_categories
from bigdet.log import setup_logging
from bigdet.models.build import build_detector
from bigdet.models.classes import carry_classes
from bigdet.models.detector import Detector
from bigdet.models.framework_layouts import from_framework, parts_to_load
from bigdet.models.torchvision_layout import from_torchvision, to_torchvision
from bigdet.models.weight_files import read_tensors_and_classes
from bigdet.models.weights import (
    load_detector,
    load_parts,
    save_detector_weights,
    weights_metadata,
)
from bigdet.run_dir import check_file


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
    for source in ("torchvision", "detectron2", "mmdetection"):
        pixels = "" if source == "torchvision" else "--pixels rgb "
        parser_of = directions.add_parser(
            f"from-{source}", help="to a model.safetensors of bigdet",
            epilog=f"example: python tools/convert_weights.py from-{source} mask_rcnn.pth "
            f"runs/x/config.yaml {pixels}--categories data/train/manifest.json "
            "--out model.safetensors",
        )  # fmt: skip
        add_source(parser_of, source)
    options = parser.parse_args(argv)
    setup_logging(rank=0)
    num_tensors = export(options) if options.direction == "to-torchvision" else restore(options)
    print(f"{options.out}: {num_tensors} tensors")
    return 0


def add_source(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the options of a conversion to bigdet."""
    files = ".pkl or .pth" if source == "detectron2" else ".pth"
    parser.add_argument("weights", type=Path, help=f"{files} or .safetensors")
    parser.add_argument("config", type=Path, help="of a run with this model")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options to change"
    )
    parser.add_argument(
        "--categories", type=Path, required=True,
        help="manifest.json of a shard set, a COCO annotation file, or a JSON list of {id, name}",
    )  # fmt: skip
    parser.add_argument("--phase", help="the phase whose model and size it is; default: the last")
    parser.add_argument("--out", type=Path, required=True, help="the model.safetensors to write")
    parser.set_defaults(source=source, pixels=None)
    if source != "torchvision":
        parser.add_argument(
            "--pixels", choices=get_args(Pixels), help="how images were given to the network"
        )


def export(options: argparse.Namespace) -> int:
    """Write a detector's weights by torchvision's names; return how many tensors."""
    check_out(options.out, (".pth", ".pt", ".safetensors"))
    detector = load_detector(options.model)
    write_state(options.out, to_torchvision(detector, detector.state_dict()))
    return len(detector.state_dict())


def restore(options: argparse.Namespace) -> int:
    """Write weights of others as those of a detector; return how many tensors."""
    check_out(options.out, (".safetensors",))
    config = load_config(options.config, options.overrides)
    check_config(config)
    phase = options.phase or list(config.phases)[-1]
    check_phase(config, phase)
    categories = load_categories(options.categories)
    detector = build_detector(phase_model(config, phase), len(categories))
    if options.source == "torchvision":
        state = read_tensors_and_classes(options.weights)[0]
        detector.load_state_dict(from_torchvision(detector, state, str(options.weights)))
    else:
        load_framework(detector, options, categories)
    metadata = weights_metadata(config, [asdict(category) for category in categories], phase)
    save_detector_weights(options.out, detector, metadata)
    return len(detector.state_dict())


def load_framework(
    detector: Detector, options: argparse.Namespace, categories: Sequence[Category]
) -> None:
    """Load the weights of detectron2 or mmdetection, the classes in the order of categories."""
    source = str(options.weights)
    tensors, names = read_tensors_and_classes(options.weights)
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
        places = [names.index(name) for name in own]
        tensors = carry_classes(detector.state_dict(), tensors, len(names), places)
    advice = " (model.box_head=2fc or 4conv1fc, model.backbone, ...), and --categories its classes"
    parts = parts_to_load(detector, tensors)
    load_parts(detector, tensors, parts, source, advice=advice)


def check_out(path: Path, suffixes: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a file can be written there whose name says its format."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}.")
    check_file(path, "out")


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a ``state_dict`` in the format that the file's name says."""
    contiguous = {name: value.contiguous() for name, value in state.items()}
    try:
        if path.suffix == ".safetensors":
            save_file(contiguous, path)
        else:
            torch.save(contiguous, path)
    except (SafetensorError, RuntimeError) as error:  # a full disk
        path.unlink(missing_ok=True)
        problem = str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written: {problem}. Make room for it.") from error


if __name__ == "__main__":
    run_command(main)
