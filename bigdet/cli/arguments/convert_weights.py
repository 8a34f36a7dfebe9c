r"""Convert weights of detectors: from and to torchvision, and from detectron2 and mmdetection.

    bigdet convert-weights to-torchvision runs/x mask_rcnn.pth
    bigdet convert-weights from-torchvision mask_rcnn.pth runs/x/config.yaml \
        --categories data/train/manifest.json --out model.safetensors
    bigdet convert-weights from-detectron2 model_final_f10217.pkl \
        configs/r50_imagenet.yaml model.box_head=2fc model.stride_in_1x1=true --pixels bgr_255 \
        --categories instances_val2017.json --out model.safetensors
    bigdet convert-weights from-mmdetection mask_rcnn_swin-t-p4-w7_fpn_1x_coco.pth \
        configs/swin_t_imagenet.yaml model.box_head=2fc --pixels rgb \
        --categories instances_val2017.json --out model.safetensors

The config is that of any run with the same model; key=value changes its options. The result is a
model.safetensors like that of a finished run: predict, evaluate, export and start_from.source take
it.

torchvision: Faster, Mask and Keypoint R-CNN and RetinaNet on ResNets and ResNeXts, or R-CNNs on
VGG-16. to-torchvision writes a ``state_dict`` for torchvision's model with the same settings, with
torch.save (.pth) or as safetensors. torchvision pools regions without bigdet's half-pixel shift and
rounds its anchors, so the detections of its own model differ a little.

detectron2 (.pkl, .pth) and mmdetection 2 and 3 (.pth): Faster, Mask and Cascade R-CNN and RetinaNet
with a feature pyramid, and detectron2's Keypoint R-CNN, on ResNets, ResNeXts (without deformable
convolutions) and Swin. --pixels says how images were fed to the network, which most files do not
record: ``rgb``, ``bgr``, or ``bgr_255`` (not divided by the deviation: R-50 and R-101 of
detectron2, 'caffe' in mmdetection, both with model.stride_in_1x1=true). Classes are reordered to
match --categories; mmdetection's files name their classes, detectron2 orders them by ascending id.
No code in a file is executed. If a file has both plain weights and their moving average, --ema
takes the average.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from bigdet.cli.parsing import add_overrides, command_parser
from bigdet.config.start import Pixels


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("convert-weights", __doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    there = directions.add_parser(
        "to-torchvision",
        help="from a run, checkpoint or safetensors",
        epilog="example: bigdet convert-weights to-torchvision runs/x mask_rcnn.pth",
    )
    there.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    there.add_argument("out", type=Path, help=".pth or .safetensors")
    for source in ("torchvision", "detectron2", "mmdetection"):
        pixels = "" if source == "torchvision" else "--pixels rgb "
        parser_of = directions.add_parser(
            f"from-{source}",
            help="to a model.safetensors of bigdet",
            epilog=f"example: bigdet convert-weights from-{source} mask_rcnn.pth "
            f"runs/x/config.yaml {pixels}--categories data/train/manifest.json "
            "--out model.safetensors",
        )
        _add_source(parser_of, source)
    return parser.parse_args(arguments)


def _add_source(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the options of a conversion to bigdet."""
    files = ".pkl or .pth" if source == "detectron2" else ".pth"
    parser.add_argument("weights", type=Path, help=f"{files} or .safetensors")
    parser.add_argument("config", type=Path, help="config of a run with this model")
    add_overrides(parser)
    parser.add_argument(
        "--categories",
        type=Path,
        required=True,
        help="manifest.json of a shard set, a COCO annotation file, or a JSON list of {id, name}",
    )
    parser.add_argument("--phase", help="phase whose model and size to use; default: the last")
    parser.add_argument("--out", type=Path, required=True, help="the model.safetensors to write")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of a file with both, take the moving average (EMA) of the weights, or the plain ones",
    )
    parser.set_defaults(source=source, pixels=None)
    if source != "torchvision":
        parser.add_argument(
            "--pixels", choices=get_args(Pixels), help="how images were fed to the network"
        )
