"""Pictures and boards of a run, and its record of starts."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from bigdet import distributed
from bigdet.config.compare import flat_options
from bigdet.config.own import import_callable, parameters_of, type_name
from bigdet.config.run import RunConfig
from bigdet.data.examples.batch_picture import draw_batch
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.saved import SavedResults
from bigdet.evaluation.telling_images import draw_results, read_pixels, results_of
from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.logs.boards import Board, TensorBoard, WeightsAndBiases
from bigdet.logs.log import MetricsWriter
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import same_hosts
from bigdet.training.state import RunState

NUM_SHOWN = 4  # images with detections, the same ones at each evaluation
LONG_SIDE = 640  # pixels of one of them
SHEET_LONG_SIDE = 1600  # pixels of a batch


def open_boards(config: RunConfig, run_dir: RunDir, first_step: int) -> list[Board]:
    """Return the boards that the config asks for (rank 0).

    Args:
        config: ``config.log`` has the boards.
        run_dir: where their files go.
        first_step: over all phases; what an earlier start showed from this step on is removed.
    """
    boards: list[Board] = []
    if (wandb := config.log.wandb) is not None:  # first: it may not be installed
        name = wandb.name or run_dir.root.resolve().name
        options = flat_options(config)
        boards.append(
            WeightsAndBiases(run_dir.wandb, wandb.project, name, wandb.entity, wandb.mode, options)
        )
    boards += [_own_board(name, config, run_dir, first_step) for name in config.log.boards]
    if config.log.tensorboard:
        boards.append(TensorBoard(run_dir.tensorboard, first_step))
    return boards


def _own_board(name: str, config: RunConfig, run_dir: RunDir, first_step: int) -> Board:
    """Make a user's own board; see ``Board``."""
    key, given = "log.boards", ("folder", "first_step", "options")
    make = import_callable(key, name)
    parameters = parameters_of(key, name, make)
    if sorted(parameters) != sorted(given):
        raise ValueError(
            f"{key}: {name} takes ({', '.join(parameters)}), expected ({', '.join(given)})."
        )
    folder = run_dir.board(name)
    folder.mkdir(parents=True, exist_ok=True)
    board: Board = make(folder=folder, first_step=first_step, options=flat_options(config))
    methods = ("add_scalars", "add_picture", "close")
    if lacking := [each for each in methods if not callable(getattr(board, each, None))]:
        raise ValueError(
            f"{key}: {name} returned {type_name(board)} without {', '.join(lacking)}, expected the "
            f"methods {', '.join(methods)}."
        )
    return board


def note_start(file: Path) -> None:
    """Append time, ranks, host and versions of this start to a JSON list (rank 0)."""
    starts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    time = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"time": time, "ranks": distributed.world_size(), **same_hosts.environment()}
    write_text(file, to_json([*starts, start], indent=1))


def show_batch(metrics: MetricsWriter, batch: Batch, train_set: ShardSet, state: RunState) -> None:
    """Show a batch as the model sees it, with its targets, if there are boards."""
    if metrics.boards:
        sheet = draw_batch(batch, train_set.categories)
        sheet.thumbnail((SHEET_LONG_SIDE, SHEET_LONG_SIDE))
        metrics.show(f"batch/{state.phase}", np.asarray(sheet), state.total_steps)


def show_detections(
    metrics: MetricsWriter, results: SavedResults, val_set: ShardSet, state: RunState
) -> None:
    """Show the detections of the first validation images, if there are boards."""
    if not metrics.boards:
        return
    ids = list(islice(val_set.index["image_id"].tolist(), NUM_SHOWN))
    found = results_of(results.of_images(ids), ids)  # few: training waits
    for row, image_id in enumerate(ids):
        picture: Image.Image = draw_results(read_pixels(val_set, row), found[image_id], val_set)
        picture.thumbnail((LONG_SIDE, LONG_SIDE))
        metrics.show(f"detections/{val_set.key(row)}", np.asarray(picture), state.total_steps)
