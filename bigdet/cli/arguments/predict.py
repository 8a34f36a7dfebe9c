"""Detect objects in pictures: writes drawn copies and ``detections.json``.

    bigdet predict runs/quickstart photo.jpg holiday/ --out detected
    bigdet predict runs/x/model.safetensors "holiday/**/*.jpg" --out detected --score 0.3
    bigdet predict runs/x data/mine/val --out detected --batch 8 --no-pictures

Images are files, folders, globs (quoted, so that the shell does not expand them) or one shard set.
Pictures are turned as their EXIF tag says, and boxes refer to the turned picture. With --exif
stored they are not turned, for models trained on photos that were annotated as stored. Images of a
shard set are used as they are annotated. ``detections.json`` is in COCO results format;
``image_id`` is that of the data set, or the number of the file, whose name is given too. It has
every detection that the model reports; the pictures show those with a score of --score or more.

Images whose canvas has the same size go through the model together, up to --batch of them. An image
that cannot be read is named and skipped, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import command_parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("predict", __doc__)
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    parser.add_argument("images", nargs="+", help="files, folders, globs, or one shard set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score to draw; default 0.5"
    )
    parser.add_argument("--batch", type=int, default=1, help="images per forward pass; default 1")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--exif",
        choices=["shown", "stored"],
        default="shown",
        help="turn photos as viewers do, or not; default shown",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write detections.json only")
    return parser.parse_args(arguments)
