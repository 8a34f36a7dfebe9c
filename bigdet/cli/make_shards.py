"""Convert annotated images to a shard set.

bigdet shards coco --images DIR --annotations FILE [--keypoints FILE] --out DIR
bigdet shards coco --images DIR --annotations FILE --categories FILE --out DIR
bigdet shards objects365 --images DIR --annotations FILE --out DIR
bigdet shards voc --root DIR --split trainval [--categories FILE] --out DIR
bigdet shards deeppcb --root PCBData --split trainval --out DIR
bigdet shards my_package.readers:convert --out DIR [options of its own]
bigdet shards shapes --split train --out DIR [--images 1200] [--seed 0] [--size 128]

After a kill, the same command continues, and the result is the same, byte for byte. On 3 machines:

bigdet shards coco ... --out DIR --part 1/3       (2/3 and 3/3 on the others)
bigdet shards merge --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import add_processes, command_parser, positive
from bigdet.cli.progress_bar import ProgressBar
from bigdet.cli.running import run_command
from bigdet.cli.source_options import Convert, add_options, call_source, import_source
from bigdet.config.own import is_own
from bigdet.data.format.class_counts import counts_of
from bigdet.data.format.manifest import Manifest
from bigdet.data.format.orientation import exif_warning
from bigdet.data.format.shard_set import SKIPPED_NAME
from bigdet.data.making.annotations import box_warning
from bigdet.data.making.conversion import Making, merge_parts
from bigdet.data.making.reencoding import Reencoding
from bigdet.data.making.sources.coco import convert_coco, convert_objects365
from bigdet.data.making.sources.deeppcb import convert_deeppcb
from bigdet.data.making.sources.shapes import NUM_IMAGES, make_shapes
from bigdet.data.making.sources.voc import convert_voc

SOURCES: dict[str, tuple[str, Convert]] = {
    "coco": ("images and a COCO annotation file", convert_coco),
    "objects365": ("Objects365, v1 or v2", convert_objects365),
    "voc": ("a folder in PASCAL VOC's layout", convert_voc),
    "deeppcb": ("DeepPCB's lists and text files of boxes", convert_deeppcb),
}
"""What can be converted: a description, and the function, whose parameters become options."""


def main(argv: Sequence[str]) -> int:
    """Make shards as the arguments say."""
    arguments = _parser(argv).parse_args(argv)
    manifest = _make(arguments)
    if manifest is None:
        print(
            f"{arguments.out}: part {arguments.part} is complete. When all parts are in one "
            "folder, run `bigdet shards merge --out` with it"
        )
    else:
        print_counts(arguments.out, manifest)
    return 0


def print_counts(folder: str, manifest: Manifest) -> None:
    """Print what a shard set contains and what was left out of it."""
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
    if counts := counts_of(manifest):
        print(f"  objects per class: {counts.line()}")
        for line in counts.warnings("learned"):
            print(f"  warning: {line}")
    for warning in (box_warning(manifest), exif_warning(manifest.changed)):
        if warning:
            print(f"  warning: {warning}")
    if manifest.skipped or manifest.changed:
        print(f"  images skipped or changed are listed in {folder}/{SKIPPED_NAME}")


def _make(arguments: argparse.Namespace) -> Manifest | None:
    progress = ProgressBar()
    if arguments.source == "merge":
        return merge_parts(arguments.out)
    if arguments.source == "shapes":
        return make_shapes(
            Path(arguments.out),
            split=arguments.split,
            images=arguments.images or NUM_IMAGES[arguments.split],
            seed=arguments.seed,
            size=arguments.size,
            progress=progress,
        )
    _, function = _source(arguments.source)
    return call_source(arguments.source, function, arguments, _making(arguments), progress)


def _source(name: str) -> tuple[str, Convert]:
    """Return description and function of a source; a name with a colon is a user's own."""
    return SOURCES[name] if name in SOURCES else ("your own", import_source(name))


def _making(arguments: argparse.Namespace) -> Making:
    if arguments.quality is not None and arguments.long_side is None:
        raise ValueError("--quality applies to images that --long-side makes smaller; give both.")
    reencoding = None
    if arguments.long_side is not None:
        reencoding = Reencoding(arguments.long_side, arguments.quality or 95)
    return Making(
        arguments.shard_megabytes, arguments.processes, arguments.part, reencoding, arguments.exif
    )


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = command_parser("shards", __doc__)
    sources = parser.add_subparsers(dest="source", required=True)
    for name in [*SOURCES, *(word for word in argv[:1] if is_own(word))]:
        purpose, function = _source(name)
        source = sources.add_parser(name, help=purpose)
        add_options(source, function)
        _add_options(source)
    shapes = sources.add_parser("shapes", help="synthetic images to try things out")
    shapes.add_argument("--out", required=True, help="folder for the shards")
    shapes.add_argument("--split", choices=list(NUM_IMAGES), default="train", help="which images")
    shapes.add_argument("--images", type=positive, help="default: 1200 for train, 200 for val")
    shapes.add_argument("--seed", type=int, default=0, help="other seed, other images")
    shapes.add_argument("--size", type=positive, default=128, help="long side, pixels")
    merge = sources.add_parser("merge", help="join the parts of a set")
    merge.add_argument("--out", required=True, help="folder with all of the parts")
    for name, source in sources.choices.items():
        source.formatter_class = argparse.RawDescriptionHelpFormatter
        words = f"bigdet shards {name} "
        examples = [f"    {line}" for line in str(__doc__).splitlines() if words in line]
        if examples:
            source.epilog = "\n".join(["examples:", *examples])
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all sources of files have."""
    parser.add_argument("--out", required=True, help="folder for the shards, or s3://..., gs://...")
    parser.add_argument("--shard-megabytes", type=positive, default=256, help="size of a tar")
    add_processes(parser)
    parser.add_argument("--part", metavar="I/N", help="make only the I-th of N parts; then merge")
    parser.add_argument(
        "--long-side",
        type=positive,
        metavar="PIXELS",
        help="make larger images smaller, to train at low resolution (not for evaluation)",
    )
    parser.add_argument(
        "--exif",
        choices=["shown", "stored"],
        default="shown",
        help="what annotations refer to if EXIF turns the image and its recorded size does not "
        "decide: the image as viewers and annotation tools show it (default), or as stored",
    )
    parser.add_argument(
        "--quality", type=positive, help="JPEG quality (4:4:4) of images made smaller; default 95"
    )


if __name__ == "__main__":
    run_command(main, interrupted="stopped; start it again to continue")
