"""Detect objects in pictures: drawn copies and ``detections.json``.

    bigdet predict runs/quickstart photo.jpg holiday/ --out detected
    bigdet predict runs/x/model.safetensors "holiday/**/*.jpg" --out detected --score 0.3
    bigdet predict runs/x data/mine/val --out detected --batch 8 --no-pictures

Images are files, folders, globs (quoted, so that the shell leaves them whole) or one shard set.
Pictures are turned as their EXIF says, and boxes are those of the turned picture; with --exif
stored they are not, for a model of photos that were annotated so. Images of a shard set are seen as
they are annotated. ``detections.json`` is in the COCO results format; ``image_id`` is the data
set's, or the number of the file, whose name it gives too. It has every detection that the model
reports, the pictures those from --score on.

Images whose canvas has the same size go through the model together, up to --batch of them. One that
cannot be read is named and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bigdet predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model.safetensors")
    parser.add_argument("images", nargs="+", help="files, folders, globs, or one shard set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score drawn (0.5)")
    parser.add_argument("--batch", type=int, default=1, help="images in one forward pass (1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument(
        "--exif", choices=["shown", "stored"], default="shown", help="turn photos, or not (shown)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write detections.json alone")
    return parser.parse_args(arguments)
