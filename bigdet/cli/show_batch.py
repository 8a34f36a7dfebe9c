"""Show what a run is, was or will be trained on: the exact batch of any step of a phase.

Its command line is in ``cli/arguments/show_batch.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.show_batch import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from bigdet.cli.running import run_command
from bigdet.config.load import check_phase, load_config
from bigdet.config.phase import in_steps, length_of, num_steps
from bigdet.config.run import phase_data
from bigdet.data.examples.batch_picture import draw_batch
from bigdet.data.format.mix import open_train_set
from bigdet.data.ordering.groups import lanes_of_rank
from bigdet.data.streams.stream import TrainStream
from bigdet.host.files import check_folder
from bigdet.run_dir import RunDir
from bigdet.training.phase_stream import stream_for_phase


def main(argv: Sequence[str]) -> int:
    """Write the pictures or print the ids that the arguments ask for."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_phase(config, arguments.phase)
    if arguments.step < 1:
        raise ValueError(f"--step {arguments.step}: steps are counted from 1.")
    if arguments.world < 1:
        raise ValueError(f"--world {arguments.world}: expected a number of ranks, 1 or more.")
    if arguments.rank is not None and not 0 <= arguments.rank < arguments.world:
        raise ValueError(
            f"--rank {arguments.rank}: expected 0 to {arguments.world - 1}, as of --world."
        )
    phase = config.phases[arguments.phase]
    shards = open_train_set(phase_data(config, arguments.phase).train, config.data.cache)
    ranks = range(arguments.world) if arguments.rank is None else [arguments.rank]
    # One stream makes the groups of all ranks: they do not depend on who asks.
    stream = stream_for_phase(config, arguments.phase, shards, world_size=arguments.world)
    num_lanes = len(stream.lanes) * arguments.world
    units = {
        "steps": 1,
        "passes": stream.steps_per_pass,
        "images": 1 / num_lanes / phase.images_per_gpu,
    }
    last = num_steps(in_steps(phase, units[length_of(phase)[0]]))
    if arguments.step > last:
        raise ValueError(f"--step {arguments.step}: phase {arguments.phase} has {last} steps.")
    lanes = {rank: lanes_of_rank(num_lanes, rank, arguments.world) for rank in ranks}
    if arguments.ids:
        ids = {str(rank): _ids(stream, arguments.step, lanes[rank]) for rank in ranks}
        print(json.dumps(ids))
        return 0
    folder = arguments.out
    if folder is None:
        folder = RunDir(Path(config.output)).pictures / f"batch-{arguments.phase}-{arguments.step}"
    check_folder(folder, "--out")
    categories = shards.manifest.categories
    for rank in ranks:
        for lane in lanes[rank]:
            path = folder / f"rank-{rank}-lane-{lane}.png"
            batch = stream.read_group(arguments.step, lane)
            draw_batch(batch, categories).save(path)
            print(f"{path}: image ids {batch.image_ids.tolist()}, weights {batch.weights.tolist()}")
    return 0


def _ids(stream: TrainStream, step: int, lanes: Iterable[int]) -> list[int | None]:
    """Return the image ids of some lanes of a step, None for masked slots."""
    return [image_id for lane in lanes for image_id in stream.group_ids(step, lane)]


if __name__ == "__main__":
    run_command(main)
