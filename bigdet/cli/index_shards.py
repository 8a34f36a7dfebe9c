"""Make index and manifest for WebDataset tars that were made elsewhere.

bigdet index-shards DIR --categories FILE

Each sample of the tars is an image (KEY.jpg, .jpeg, .png or .webp) and a KEY.json with image_id,
file_name, height, width and annotations: [{id, label, bbox (xywh pixels), area, iscrowd, and
segmentation and keypoints if there are any}]. They refer to the image as its EXIF tag shows it or
as it is stored: the recorded size decides, otherwise --exif. FILE is a JSON list of objects with id
and name (or an annotation file that has one as "categories"); label is the position in it. Samples
that cannot be used are printed, one line each, and listed in skipped.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bigdet.cli.parsing import add_processes, command_parser
from bigdet.cli.running import run_command
from bigdet.data.format.class_counts import counts_of
from bigdet.data.format.shard_set import SKIPPED_NAME
from bigdet.data.making.indexing import index_shards
from bigdet.data.making.sources.categories import load_categories

MAX_LINES = 100


def main(argv: Sequence[str]) -> int:
    """Index the tars of a folder."""
    parser = command_parser("index-shards", __doc__)
    parser.add_argument("folder", type=Path, help="folder with the tars")
    parser.add_argument("--categories", type=Path, required=True, help="JSON list of categories")
    add_processes(parser)
    parser.add_argument(
        "--exif",
        choices=["shown", "stored"],
        default="shown",
        help="what records refer to where their size cannot decide; default: the image as shown",
    )
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    categories = load_categories(arguments.categories)
    manifest = index_shards(folder, categories, processes=arguments.processes, exif=arguments.exif)
    if manifest.skipped:
        lines = (folder / SKIPPED_NAME).read_text().splitlines()
        lines = [line for line in lines if "skipped" in json.loads(line)]
        for line in map(json.loads, lines[:MAX_LINES]):
            place = f"{line['shard']} {line.get('key', line.get('image_id'))}"
            print(f"{place}: left out: {line['skipped']}")
        if len(lines) > MAX_LINES:
            print(f"... and {len(lines) - MAX_LINES} more in {folder / SKIPPED_NAME}")
    for what, count in manifest.changed.items():
        print(f"{folder}: {count} x {what}")
    print(
        f"{folder}: {len(manifest.shards)} shards, {manifest.images} images, "
        f"{manifest.instances} instances, {manifest.crowd} crowd regions, "
        f"{sum(manifest.skipped.values())} left out. `bigdet check-shards` decodes every image."
    )
    if counts := counts_of(manifest):
        print(f"objects per class: {counts.line()}")
        for line in counts.warnings("learned"):
            print(f"warning: {line}")
    return 0


if __name__ == "__main__":
    run_command(main)
