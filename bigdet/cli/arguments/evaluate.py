"""Measure the AP of a checkpoint on a shard set.

    bigdet evaluate runs/quickstart --shards data/shapes/val
    torchrun --nproc-per-node 8 -m bigdet.evaluate runs/x/checkpoints/train-90000 --shards data/val
    bigdet evaluate runs/x --shards data/val --out ap.json evaluation.images_per_gpu=4
    bigdet evaluate runs/x --shards data/val --tta "evaluation.tta={scales: [640, 800]}"
    bigdet evaluate runs/x --shards data/val --analysis --detections results.json
    bigdet evaluate results.json --shards data/val --max-detections 300
    bigdet evaluate runs/voc --shards data/voc/test --metric voc07

The model is a run (its final weights, or its newest checkpoint), a checkpoint folder, or a
model.safetensors. It is evaluated as its own config says. key=value changes evaluation.* (size,
batch, test-time augmentation), model.roi.* or model.retina.* (thresholds), engine.precision,
data.workers, data.worker_kind and data.cache.*. --max-detections N is the same as
evaluation.max_detections=N.

A file that ends in .json holds detections in COCO results format, written by any program. They are
scored as they are: as boxes, masks or keypoints, depending on what the first detection has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import add_overrides, command_parser, positive


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; launchers add --local_rank, which is also in the environment."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "model", type=Path, help="run folder, checkpoint, model.safetensors; or detections.json"
    )
    add_overrides(parser)
    parser.add_argument("--shards", required=True, help="folder or address of a shard set")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: several sizes, each also mirrored",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument(
        "--metric",
        choices=["coco", "voc07", "voc12"],
        help="how AP is defined; default: the config's",
    )
    parser.add_argument(
        "--analysis",
        action="store_true",
        help="also print what limits the AP: sizes, errors, calibration, confusion, classes",
    )
    parser.add_argument(
        "--max-detections",
        type=positive,
        metavar="N",
        help="detections per class and image that count, for boxes and masks; default: the "
        "config's, 100",
    )
    parser.add_argument("--detections", type=Path, help="JSON file for all detections")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)
