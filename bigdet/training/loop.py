"""One phase, step by step: where batches, engine, checkpoints and evaluation meet."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from bigdet import distributed
from bigdet.config.schema import PhaseConfig, RunConfig
from bigdet.data.shards import ShardSet
from bigdet.data.stream import TrainStream
from bigdet.engine.base import Engine, StepResult
from bigdet.log import MetricsWriter
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import measuring, optim, saving
from bigdet.training.metrics import StepMeter, mean_losses, progress_line
from bigdet.training.state import RunState
from bigdet.training.stopping import stop_requested

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseRun:
    """Everything that one phase works with.

    Attributes:
        config: of the run, resolved.
        name: of the phase.
        run_dir: where everything is written.
        detector: the model that the engine trains.
        engine: does the steps.
        stream: gives this rank's groups.
        val_set: what AP is measured on.
        metrics: rank 0's log for machines, None on the other ranks.
        state: where the run is; changed in place.
        device: of this rank.
    """

    config: RunConfig
    name: str
    run_dir: RunDir
    detector: Detector
    engine: Engine
    stream: TrainStream
    val_set: ShardSet
    metrics: MetricsWriter | None
    state: RunState
    device: torch.device

    @property
    def phase(self) -> PhaseConfig:
        """The phase's own section."""
        return self.config.phases[self.name]


def train_phase(run: PhaseRun) -> bool:
    """Train from ``run.state.step`` to the end of the phase.

    Returns:
        True when the phase is complete, False when the run was asked to stop. Either way a
        checkpoint is written.

    Raises:
        SharedError: too many steps were not finite, or too many samples damaged.
    """
    config, phase, state = run.config, run.phase, run.state
    assert phase.images_per_step is not None
    lanes_of_rank = phase.images_per_step // phase.images_per_gpu // distributed.world_size()
    lr = optim.scaled_lr(phase, phase.images_per_step)
    batches, meter = iter(run.stream), StepMeter()
    for step in range(state.step + 1, phase.steps + 1):
        started = time.perf_counter()
        micro_batches = list(islice(batches, lanes_of_rank))
        data_seconds = time.perf_counter() - started

        step_lr = lr * optim.lr_factor(phase, step)
        run.engine.set_lr(step_lr)
        result = run.engine.train_step([batch.to(run.device) for batch in micro_batches])
        _finish_step(run, result, micro_batches, step)
        meter.add(micro_batches, time.perf_counter() - started, data_seconds)

        is_last = step == phase.steps
        if is_last or step % config.log.every == 0:
            _log_step(run, result, meter, step_lr)
        must_stop = not is_last and stop_requested(run.run_dir.stop)
        is_best = False
        if is_last or (config.evaluation.every and step % config.evaluation.every == 0):
            is_best = _evaluate(run)
        if is_last or is_best or must_stop or step % config.checkpoint.every == 0:
            meter.sync(state)
            saving.save_checkpoint(config, run.run_dir, run.engine, run.val_set, state, is_best)
        if must_stop:
            logger.info("stopped on request at %s; start again to go on", state.position)
            return False
    return True


def _finish_step(
    run: PhaseRun, result: StepResult, micro_batches: Sequence[Batch], step: int
) -> None:
    """Move the state on; a step that was not finite changed no weight and leaves no statistics."""
    run.state.step = step
    run.state.total_steps += 1
    if result.is_finite:
        norms.update_running_statistics(run.detector)
        return
    norms.discard_statistics(run.detector)
    run.state.bad_steps += 1
    ids = [number for batch in micro_batches for number in batch.image_ids.tolist()]
    logger.warning(
        "%s: loss or gradient not finite, step skipped (%d so far); images of this rank: %s",
        run.state.position, run.state.bad_steps, ids,
    )  # fmt: skip
    if run.state.bad_steps > run.config.engine.max_bad_steps:
        raise distributed.SharedError(
            f"{run.state.position}: {run.state.bad_steps} steps had a loss or gradient that is not "
            f"finite, more than engine.max_bad_steps. Lower phases.{run.name}.lr, or set "
            f"engine.clip_norm. Last good checkpoint: {saving.newest(run.run_dir) or 'none'}."
        )


def _log_step(run: PhaseRun, result: StepResult, meter: StepMeter, lr: float) -> None:
    """Write one line for people and one object for machines (a collective)."""
    state, phase = run.state, run.phase
    meter.sync(state)
    _count_damage(run)
    values = {
        "phase": run.name,
        "step": state.step,
        **mean_losses(result.losses),
        "lr": lr,
        **meter.rates(),
        "seen/images": state.seen.images,
        "seen/instances": state.seen.instances,
        "seen/pixels": state.seen.pixels,
        "seen/gpu_seconds": state.seen.gpu_seconds,
        "bad_steps": state.bad_steps,
        "damaged_samples": sum(state.damaged.values()),
    }
    seconds_left = values["time/step_seconds"] * (phase.steps - state.step)
    logger.info(progress_line(values, phase.steps, seconds_left))
    if run.metrics is not None:
        run.metrics.write(values, state.total_steps)


def _count_damage(run: PhaseRun) -> None:
    """Add up over the ranks the damaged samples that were replaced (a collective)."""
    for kinds in distributed.all_gather_objects(run.stream.take_damaged()):
        for kind, count in kinds.items():
            run.state.damaged[kind] = run.state.damaged.get(kind, 0) + count
    total = sum(run.state.damaged.values())
    if total > run.config.data.train.max_damaged:
        raise distributed.SharedError(
            f"{run.config.data.train.shards}: {total} damaged samples had to be replaced "
            f"({run.state.damaged}), more than data.train.max_damaged. The logs name them; "
            f"tools/check_shards.py lists all that is damaged."
        )


def _evaluate(run: PhaseRun) -> bool:
    """Measure AP, write it down, and tell whether it is the best box AP so far."""
    state, config = run.state, run.config
    size_cap = measuring.test_size(config, run.name)
    metrics = measuring.evaluate(config, run.detector, run.val_set, size_cap)
    flat = measuring.flat_metrics(metrics)
    logger.info("%s: %s", state.position, measuring.one_line(flat))
    if run.metrics is not None:
        measuring.write_evaluation(metrics, run.run_dir.evaluation(run.name, state.step))
        run.metrics.write({"phase": run.name, "step": state.step, **flat}, state.total_steps)
        if state.step == run.phase.steps:
            measuring.draw_validation(
                run.detector, run.val_set, size_cap, config.evaluation.pictures,
                run.run_dir, run.name,
            )  # fmt: skip
    box_ap = flat["bbox/AP"] or 0.0
    is_best = state.best_ap is None or box_ap > state.best_ap
    if is_best:
        state.best_ap = box_ap
    return is_best
