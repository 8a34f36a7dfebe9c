"""Where a run begins: at its start, or at a checkpoint whose config fits."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigdet import distributed
from bigdet.config.checkpoint import check_checkpoint
from bigdet.config.earlier import keep_former
from bigdet.config.load import dump_config, parse_config
from bigdet.config.log import check_log
from bigdet.config.phase import PhaseConfig, check_length, in_steps, num_lanes, num_steps
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig, phase_before, phase_data, phase_model, phase_source
from bigdet.data.format.phase_sets import DataSets, phases_by_sets
from bigdet.data.streams.stream import TrainStream
from bigdet.engine.checkpoint import Checkpoint
from bigdet.host.files import write_text
from bigdet.logs.log import MetricsWriter, cut_metrics
from bigdet.run_dir import RunDir
from bigdet.training import optim, same_hosts
from bigdet.training.forks import (
    BATCH_OPTIONS,
    changeable_options,
    changed_options,
    check_fork,
    is_fork,
)
from bigdet.training.showing import note_start, open_boards
from bigdet.training.state import NEWEST, RunState
from bigdet.weights.start import check_hand_over, check_start

logger = logging.getLogger(__name__)


def check_same_everywhere(config: RunConfig, sets: Mapping[str, DataSets]) -> None:
    """Check that all hosts have the same code, config and data (collective).

    Raises:
        SharedError: with the first difference, and its values by host.
    """
    models = [phase_model(config, name) for name in config.phases]
    names = [name for model in models for name in (model.backbone, model.detector)]
    digits = same_hosts.SHOWN_HASH
    shards = {
        f"{what} shards {each.address}": each.index_hash()[:digits]
        for data in phases_by_sets(sets)
        for what, each in (("training", data.train), ("validation", data.val))
    }
    config_hash = same_hosts.text_hash(dump_config(config))
    same_hosts.check_same({**same_hosts.own_code(names), "config": config_hash, **shards})


def check_same_stream(state: dict[str, Any], key: str) -> None:
    """Check that all ranks take their batches from the same samples in the same order (collective).

    Args:
        state: ``TrainStream.state()`` of this rank.
        key: the section that the set is of.

    Raises:
        SharedError: hosts have different copies of the data.
    """
    states = distributed.all_gather_objects(state)
    for rank, other in enumerate(states):
        if differing := [name for name, value in states[0].items() if other[name] != value]:
            raise distributed.SharedError(
                f"{key}: rank {rank} has another {', '.join(differing)} than rank 0, so they "
                f"would not train on each image once. Copy the same shards to every host."
            )


def check_phases(config: RunConfig, sets: Mapping[str, DataSets], saved: Checkpoint | None) -> None:
    """Check each phase to come now, as its errors would otherwise appear hours later.

    Args:
        config: resolved.
        sets: of each phase.
        saved: the checkpoint to continue from; its phase has begun already.

    Raises:
        ValueError: too few images for a step, or start weights that are missing or do not fit.
    """
    names = list(config.phases)
    first = 0 if saved is None else names.index(saved.run["run"]["phase"]) + 1
    for name in names[first:]:
        _any_stream(config, sets, name, config.phases[name])
        source, classes = phase_source(config, name), sets[name].classes
        if source == "previous":
            check_hand_over(config, name, sets[phase_before(config, name)].classes, classes)
        elif source != "random":
            check_start(config, name, classes)


def settle_config(
    config: RunConfig,
    saved: Checkpoint | None,
    folder: Path | None,
    sets: Mapping[str, DataSets] | None = None,
) -> RunConfig:
    """Fill in ``images_per_step`` and lengths in steps; check them against ranks and checkpoint.

    Args:
        config: as the user wrote it.
        saved: the checkpoint to continue from, which keeps its images per step. None for a fresh
            start: by default a step has one micro-batch of each rank.
        folder: the checkpoint's path, for messages.
        sets: of each phase; None leaves lengths in passes as they are.
    """
    world_size = distributed.world_size()
    before, begun = None, None
    if saved is not None:
        before, begun = _config_of(saved.run["config"]), saved.run["run"]["phase"]
        config = keep_former(config, before)
    phases = {}
    for name, phase in config.phases.items():
        images_per_step = phase.images_per_step
        if images_per_step is None and before is not None and name in before.phases:
            images_per_step = before.phases[name].images_per_step
        if images_per_step is None:
            images_per_step = phase.images_per_gpu * world_size
        phase = dataclasses.replace(phase, images_per_step=images_per_step)
        if num_lanes(phase) % world_size:
            raise ConfigError(
                f"phases.{name}.images_per_step: {images_per_step} images are "
                f"{num_lanes(phase)} micro-batches of {phase.images_per_gpu}, which "
                f"{world_size} ranks cannot share equally. Change images_per_step, images_per_gpu "
                f"or the number of ranks."
            )
        if config.change_batch and name == begun and phase.steps is None:
            raise ConfigError(
                f"phases.{name}.steps: not set, but with change_batch a phase that has begun needs "
                f"its length in steps. Write steps, and null for passes and images."
            )
        phases[name] = _settle_length(config, name, phase, sets)
    config = dataclasses.replace(config, phases=phases)
    check_checkpoint(config.checkpoint, phases)  # steps are compared with lengths in steps only
    check_log(config.log, phases)
    if before is not None:
        assert saved is not None
        _check_unchanged(config, before, saved, folder)
    return config


def _settle_length(
    config: RunConfig, name: str, phase: PhaseConfig, sets: Mapping[str, DataSets] | None
) -> PhaseConfig:
    """Return a phase with its length in steps; its ``images_per_step`` is set."""
    if phase.passes is not None:
        if sets is None:
            return phase
        steps_per_unit: float = _any_stream(config, sets, name, phase).steps_per_pass
    else:
        assert phase.images_per_step is not None
        steps_per_unit = 1 if phase.steps is not None else 1 / phase.images_per_step
    settled = in_steps(phase, steps_per_unit)
    check_length(f"phases.{name}", settled)
    return settled


def note_changes(
    config: RunConfig, sets: Mapping[str, DataSets], saved: Checkpoint, state: RunState
) -> None:
    """Adapt a resumed run to another number of ranks or another batch, and log what changed.

    The order of a pass is a function of the batch. With another batch, the remaining images of the
    present pass are left out; every later pass has each image once, as always.

    Args:
        config: resolved; with ``change_batch`` its batch may differ from the checkpoint's.
        sets: of each phase.
        saved: the checkpoint.
        state: read from the checkpoint; changed in place.
    """
    name, ranks = state.phase, distributed.world_size()
    now = config.phases[name]
    before = _config_of(saved.run["config"]).phases[name]
    if state.ranks not in (0, ranks):
        logger.info(
            f"{ranks} ranks instead of {state.ranks}: each runs {num_lanes(now) / ranks:g} "
            f"micro-batches of {now.images_per_gpu} per step instead of "
            f"{num_lanes(before) / state.ranks:g}; {before.images_per_step} images per step as "
            f"before"
        )
    state.ranks = ranks
    if (now.images_per_step, now.images_per_gpu) == (before.images_per_step, before.images_per_gpu):
        return
    assert now.images_per_step is not None
    assert before.images_per_step is not None
    if now.images_per_step != before.images_per_step and now.reference_images_per_step is None:
        raise ConfigError(
            f"phases.{name}.images_per_step: changes from {before.images_per_step} to "
            f"{now.images_per_step}, but lr would stay, as reference_images_per_step is not set. "
            f"Set phases.{name}.reference_images_per_step, to {before.images_per_step} if lr is "
            f"the rate for that batch."
        )
    old, new = (_any_stream(config, sets, name, phase) for phase in (before, now))
    old.check_state(state.stream)
    position = state.step + state.stream_shift
    passes = -(-position // old.steps_per_pass)
    state.stream_shift = passes * new.steps_per_pass - state.step
    state.stream = new.state()
    new_lr = optim.scaled_lr(now, now.images_per_step)
    old_lr = optim.scaled_lr(before, before.images_per_step)
    logger.info(
        f"batch of phase {name} changed at step {state.step}: {now.images_per_step} images per "
        f"step instead of {before.images_per_step}, {now.images_per_gpu} per GPU instead of "
        f"{before.images_per_gpu}, lr {new_lr:.3g} instead of {old_lr:.3g}; pass {passes + 1} "
        f"begins, the last {passes * old.steps_per_pass - position} steps of the pass before it "
        f"are left out; step N is step N + {state.stream_shift} of `bigdet show-batch`"
    )


def _any_stream(
    config: RunConfig, sets: Mapping[str, DataSets], name: str, phase: PhaseConfig
) -> TrainStream:
    """Return a phase's stream as of a run on one rank, for its order of images."""
    return TrainStream(
        sets[name].train,
        phase_data(config, name),
        phase,
        name=name,
        with_masks=False,
        seed=config.seed,
        rank=0,
        world_size=1,
    )


@functools.cache  # parsing takes a second
def _config_of(text: str) -> RunConfig:
    """Return the config in a checkpoint."""
    return parse_config(text, "the config of the checkpoint")


def begin(
    config: RunConfig, run_dir: RunDir, sets: Mapping[str, DataSets], saved: Checkpoint | None
) -> tuple[RunState, MetricsWriter | None]:
    """Prepare the run folder; return the run's state and, on rank 0, the writer of its metrics.

    The resolved config is written, and ``metrics.jsonl`` is cut back to the present step.
    """
    names = list(config.phases)
    if saved is None:
        state = RunState(names[0], ranks=distributed.world_size())
    else:
        state = RunState.from_json(saved.run["run"])
        note_changes(config, sets, saved, state)
        if is_fork(config, saved):
            # The best AP and an evaluation that waits for its numbers are of the other run.
            state.best_ap = state.best_checkpoint = state.best_by = state.unscored = None
            state.started, state.good_seconds = time.time(), 0.0
            state.needs_evaluation |= state.step == num_steps(config.phases[state.phase])
    if not distributed.is_main():
        return state, None
    if saved is None:
        run_dir.metrics.unlink(missing_ok=True)
        for shown in (run_dir.tensorboard, run_dir.wandb, run_dir.boards):
            shutil.rmtree(shown, ignore_errors=True)
        run_dir.environment.unlink(missing_ok=True)
    here = (names.index(state.phase), state.step)

    def was_before(line: Mapping[str, Any]) -> bool:
        place = (names.index(line["phase"]), line["step"])
        is_ap = "bbox/AP" in line or f"{NEWEST}bbox/AP" in line
        if "bbox/AP" in line and run_dir.detections(line["phase"], line["step"]).is_file():
            return False  # about to be scored again
        return place < here or (place == here and not (is_ap and state.needs_evaluation))

    cut_metrics(run_dir.metrics, was_before)
    write_text(run_dir.config, dump_config(config))
    note_start(run_dir.environment)
    boards = open_boards(config, run_dir, first_step=state.total_steps + 1)
    return state, MetricsWriter(run_dir.metrics, boards)


def _check_unchanged(
    config: RunConfig, before: RunConfig, saved: Checkpoint, folder: Path | None
) -> None:
    """Refuse options that would make it another run; phases that have not begun may change."""
    if list(config.phases) != list(before.phases):
        raise ConfigError(
            f"{folder}: the run has the phases {', '.join(before.phases)}, the config "
            f"{', '.join(config.phases)}. Set them back, or choose another output."
        )
    position = saved.run["run"]
    current = position["phase"]
    if begins_here := is_fork(config, saved):
        check_fork(current, position.get("step", 0), config.phases[current], before.phases[current])
    changeable = changeable_options(config, current, begins_here)
    if changed := changed_options(config, before, changeable):
        batch = ", ".join(f"phases.{current}.{name}" for name in BATCH_OPTIONS)
        also = "" if config.change_batch else f"; with change_batch=true also {batch}"
        raise ConfigError(
            f"{folder}: the run was started with other options: {', '.join(changed)}. Set them "
            f"back, or choose another output. A resumed run may change only "
            f"{', '.join(changeable)}{also}. To continue with the options that it was started "
            f"with, give the config in its folder, {Path(before.output) / 'config.yaml'}, in "
            f"place of yours."
        )
