"""Export a detector to ONNX or torch.export, and compare it with the original on real images.

    bigdet export runs/mine detector.onnx --size 800 1344 --check photos/
    bigdet export runs/mine detector.pt2 --size 448 448 --batch 8
    bigdet export runs/mine/checkpoints/finetune-9000 small.onnx --size 448 448

Faster and Mask R-CNN and RetinaNet, in fp32, for canvases of one size (multiples of 32) and a fixed
number of images. Inputs: ``images`` (B, 3, height, width) uint8 RGB, each image in the top left
corner and the rest 0, and ``image_sizes`` (B, 2) int64, height and width of each image. Outputs:
``boxes`` (B, D, 4) x0, y0, x1, y1 in pixels of the canvas; ``scores`` (B, D), descending;
``labels`` (B, D); ``is_valid`` (B, D), which of the D slots hold a detection; and for Mask R-CNN
``masks`` (B, D, 28, 28), probabilities on a grid over each box. An .onnx file has its classes and
the test size in its metadata, a .pt2 file in its file ``bigdet.json``. Import torchvision before
loading a .pt2 file.

--check takes files, folders, globs or a shard set. Each image is given to the exported file and to
the detector, on the same canvas; the exit code is 1 unless both find the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import command_parser, positive


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("export", __doc__)
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    parser.add_argument("out", type=Path, help="the file to write: .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        required=True,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the canvas, pixels, multiples of 32",
    )
    parser.add_argument("--batch", type=int, default=1, help="images per pass; default 1")
    parser.add_argument(
        "--candidates",
        type=positive,
        default=2000,
        help="R-CNNs: pairs of region and class that enter NMS; the detector itself takes all; "
        "default 2000",
    )
    parser.add_argument("--check", nargs="+", metavar="IMAGES", help="images to compare the two on")
    return parser.parse_args(arguments)
