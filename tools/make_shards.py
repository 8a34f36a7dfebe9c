"""Make a shard set.

python tools/make_shards.py coco --images DIR --annotations FILE --out DIR [--shard-megabytes 256]
python tools/make_shards.py shapes --split train --out DIR [--images 1200] [--seed 0] [--size 128]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bigdet.commands import run_command
from bigdet.data.shard_writer import ShardWriter
from bigdet.data.shards import SKIPPED_NAME, Manifest
from bigdet.data.sources.coco import convert_coco
from bigdet.data.sources.shapes import NUM_IMAGES, make_shapes


class ProgressLine:
    """Prints how far a conversion is: once a second on a terminal, twice a minute to a file."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._is_terminal = sys.stdout.isatty()

    def __call__(self, writer: ShardWriter, num_images: int) -> None:
        """Print a line if it is time for one, and the last one in any case."""
        done = writer.images + writer.skipped.total()
        now = time.monotonic()
        if done < num_images and now - self._last < (1.0 if self._is_terminal else 30.0):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        left_minutes = (num_images - done) / rate / 60 if rate else 0.0
        line = f"{done} / {num_images} images, {rate:.0f} a second, {left_minutes:.1f} min left"
        end = "\r" if self._is_terminal and done < num_images else "\n"
        print(f"{line:70}", end=end, flush=True)


def main(argv: Sequence[str]) -> int:
    """Make shards as the arguments say."""
    arguments = _parser().parse_args(argv)
    progress = ProgressLine()
    if arguments.source == "coco":
        manifest = convert_coco(
            arguments.images,
            arguments.annotations,
            arguments.out,
            shard_megabytes=arguments.shard_megabytes,
            progress=progress,
        )
    else:
        manifest = make_shapes(
            arguments.out,
            split=arguments.split,
            images=arguments.images or NUM_IMAGES[arguments.split],
            seed=arguments.seed,
            size=arguments.size,
            progress=progress,
        )
    print_counts(arguments.out, manifest)
    return 0


def print_counts(folder: Path, manifest: Manifest) -> None:
    """Print what a shard set holds and what was left out of it."""
    size_mb = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{folder}: {len(manifest.shards)} shards, {size_mb:.1f} MB")
    rows = [
        ("images", manifest.images),
        ("instances", manifest.instances),
        ("crowd regions", manifest.crowd),
        ("classes", len(manifest.categories)),
        *((f"skipped images: {reason}", count) for reason, count in manifest.skipped.items()),
        *manifest.changed.items(),
    ]
    for name, count in rows:
        print(f"  {count:>10}  {name}")
    if manifest.skipped or manifest.changed:
        print(f"  the last are listed in {folder / SKIPPED_NAME}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True)
    coco = sources.add_parser("coco", help="images and a COCO annotation file")
    coco.add_argument("--images", type=Path, required=True, help="folder of the images")
    coco.add_argument("--annotations", type=Path, required=True, help="instances_*.json")
    coco.add_argument("--out", type=Path, required=True, help="folder for the shards")
    coco.add_argument("--shard-megabytes", type=_positive, default=256, help="size of a tar")
    shapes = sources.add_parser("shapes", help="synthetic images to try things on")
    shapes.add_argument("--out", type=Path, required=True, help="folder for the shards")
    shapes.add_argument("--split", choices=list(NUM_IMAGES), default="train", help="which images")
    shapes.add_argument("--images", type=_positive, help=f"how many; default {NUM_IMAGES}")
    shapes.add_argument("--seed", type=int, default=0, help="other seed, other images")
    shapes.add_argument("--size", type=_positive, default=128, help="long side, pixels")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    run_command(main)
