"""Check a shard set: read every byte, compare hashes, decode every image, count.

bigdet check-shards DIR
bigdet check-shards https://host/path        (or s3://..., pipe:...; nothing is kept)

Exits with 1 if anything is wrong, with one line per problem: shard, key, what.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from bigdet.cli.parsing import add_processes, command_parser
from bigdet.cli.progress_bar import ProgressBar
from bigdet.cli.running import run_command
from bigdet.data.format.class_counts import ClassCounts
from bigdet.data.format.remote import shown
from bigdet.data.making.shard_check import check_shards, load_manifest

MAX_LINES = 100


def main(argv: Sequence[str]) -> int:
    """Check one shard set and return the exit code."""
    parser = command_parser("check-shards", __doc__)
    parser.add_argument("path", help="folder or address of the shard set")
    add_processes(parser)
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    num_problems = 0
    progress = ProgressBar(shows_end=False)
    tally: Counter[str] = Counter()
    for problem in check_shards(
        arguments.path, processes=arguments.processes, progress=progress, tally=tally
    ):
        num_problems += 1
        if num_problems <= MAX_LINES:
            print(f"{problem.place}: {problem.what}", flush=True)
    if num_problems > MAX_LINES:
        print(f"... and {num_problems - MAX_LINES} more")
    manifest = load_manifest(arguments.path)
    labels = range(len(manifest.categories))
    per_class = ([tally[f"{kind} of label {k}"] for k in labels] for kind in ("instances", "crowd"))
    counts = ClassCounts(manifest.categories, *per_class)
    warnings = counts.warnings("learned")
    verdict = f"nothing is damaged, {len(warnings)} warnings" if warnings else "all is well"
    if num_problems:
        verdict = f"{num_problems} problems"
    else:  # all of it could be counted
        print(f"objects per class: {counts.line()}")
        for line in warnings:
            print(f"warning: {line}")
    print(
        f"{shown(arguments.path)}: {len(manifest.shards)} shards, {manifest.images} images, "
        f"{manifest.instances} instances, {manifest.crowd} crowd regions, "
        f"{len(manifest.categories)} classes; read and decoded in "
        f"{time.monotonic() - start:.1f} s: {verdict}"
    )
    return 1 if num_problems else 0


if __name__ == "__main__":
    run_command(main)
