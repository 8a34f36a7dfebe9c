"""One phase, step by step: where batches, engine, checkpoints and evaluation meet."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.derived import num_lanes
from bigdet.config.schema import RunConfig
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
from bigdet.training.prefetch import OnDevice, prefetch
from bigdet.training.state import RunState
from bigdet.training.stopping import stop_requested

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What all phases of a run share.

    Attributes:
        config: resolved.
        run_dir: where everything is written.
        train_set: the images to learn from.
        val_set: the images to measure on.
        metrics: rank 0's log for machines, None on the other ranks.
        state: where the run is; changed in place.
    """

    config: RunConfig
    run_dir: RunDir
    train_set: ShardSet
    val_set: ShardSet
    metrics: MetricsWriter | None
    state: RunState

    def log_start(self, folder: Path | None) -> None:
        """Log the decisions that the run was started with.

        Args:
            folder: of the checkpoint it goes on from, None for a fresh start.
        """
        logger.info("run folder %s, %s", self.run_dir.root,
                    "a fresh start" if folder is None else f"going on from {folder}")  # fmt: skip
        for what, shards in (("training", self.train_set), ("validation", self.val_set)):
            logger.info(
                "%s: %s images, %s instances, %d categories, %d shards in %s",
                what, f"{len(shards):,}", f"{shards.manifest.instances:,}", shards.num_classes,
                len(shards.manifest.shards), shards.folder,
            )  # fmt: skip
        engine = self.config.engine
        logger.info(
            "%d ranks on %s, %s ZeRO-%d, %s",
            distributed.world_size(), distributed.device().type, engine.kind, engine.zero_stage,
            engine.precision,
        )  # fmt: skip
        for name, phase in self.config.phases.items():
            assert phase.images_per_step is not None
            lr = optim.scaled_lr(phase, phase.images_per_step)
            logger.info(
                "phase %s: %d steps of %d images (%d ranks x %d micro-batches of %d), lr %.3g%s",
                name, phase.steps, phase.images_per_step, distributed.world_size(),
                num_lanes(phase) // distributed.world_size(), phase.images_per_gpu, lr,
                "" if lr == phase.lr else
                f" ({phase.lr:.3g} at {phase.reference_images_per_step} images per step)",
            )  # fmt: skip


class PhaseTrainer:
    """Trains the current phase of a run, from ``run.state.step`` to its end."""

    def __init__(
        self,
        run: Run,
        detector: Detector,
        engine: Engine,
        stream: TrainStream,
        device: torch.device,
    ) -> None:
        """Take what the phase works with.

        Args:
            run: at the phase ``run.state.phase``.
            detector: the model that the engine trains.
            engine: does the steps.
            stream: gives this rank's groups, from the step after ``run.state.step`` on.
            device: of this rank.
        """
        self.run, self.config, self.state = run, run.config, run.state
        self.name = run.state.phase
        self.phase = run.config.phases[self.name]
        self.detector, self.engine, self.stream, self.device = detector, engine, stream, device
        self.meter = StepMeter()
        assert self.phase.images_per_step is not None
        self.lr = optim.scaled_lr(self.phase, self.phase.images_per_step)

    def train(self) -> bool:
        """Take all steps that are left.

        Returns:
            True when the phase is complete, False when the run was asked to stop. Either way a
            checkpoint is written.

        Raises:
            SharedError: too many steps were not finite, or too many samples damaged.
        """
        state, batches = self.state, prefetch(self.stream, self.device)
        if state.needs_evaluation:  # a request to stop came between the step and its evaluation
            self._save(is_best=self._evaluate())
        while state.step < self.phase.steps:
            result, lr = self._step(batches)
            is_last = state.step == self.phase.steps
            state.needs_evaluation = is_last or _is_due(state.step, self.config.evaluation.every)
            if is_last or _is_due(state.step, self.config.log.every):
                self._log(result, lr)
            if stop_requested(self.run.run_dir.stop):
                self._save(is_best=False)
                logger.info("stopped on request at %s; start again to go on", state.position)
                return False
            is_best = self._evaluate() if state.needs_evaluation else False
            if is_last or is_best or _is_due(state.step, self.config.checkpoint.every):
                self._save(is_best)
        return True

    def _step(self, batches: Iterator[OnDevice]) -> tuple[StepResult, float]:
        """Take one optimizer step; return what it saw and its learning rate."""
        started = time.perf_counter()
        taken = list(islice(batches, len(self.stream.lanes)))
        micro_batches = [batch for batch, _ in taken]
        data_seconds = time.perf_counter() - started
        lr = self.lr * optim.lr_factor(self.phase, self.state.step + 1)
        self.engine.set_lr(lr)
        result = self.engine.train_step([batch for _, batch in taken])
        self.state.step += 1
        self.state.total_steps += 1
        if result.is_finite:
            norms.update_running_statistics(self.detector)
        else:
            self._note_bad_step(micro_batches)
        self.meter.add(micro_batches, time.perf_counter() - started, data_seconds)
        return result, lr

    def _note_bad_step(self, micro_batches: Sequence[Batch]) -> None:
        """Count a step that changed no weight, on all ranks alike; too many stop the run."""
        norms.discard_statistics(self.detector)
        self.state.bad_steps += 1
        ids = [number for batch in micro_batches for number in batch.image_ids.tolist()]
        logger.warning(
            "%s: loss or gradient not finite, step skipped (%d so far); images of this rank: %s",
            self.state.position, self.state.bad_steps, ids,
        )  # fmt: skip
        if self.state.bad_steps > self.config.engine.max_bad_steps:
            last = saving.newest_checkpoint(self.run.run_dir)
            raise distributed.SharedError(
                f"{self.state.position}: {self.state.bad_steps} steps had a loss or gradient that "
                f"is not finite, more than engine.max_bad_steps. Lower phases.{self.name}.lr, or "
                f"set engine.clip_norm. Last good checkpoint: {last or 'none'}."
            )

    def _log(self, result: StepResult, lr: float) -> None:
        """Write one line for people and one object for machines (a collective)."""
        self.meter.sync(self.state, self.stream.damaged)
        self._check_damage()
        seen = {f"seen/{name}": value for name, value in asdict(self.state.seen).items()}
        values: dict[str, Any] = {
            "phase": self.name,
            "step": self.state.step,
            **mean_losses(result.losses),
            "grad_norm": result.grad_norm if result.is_finite else None,
            "lr": lr,
            **self.meter.rates(),
            **seen,
            "bad_steps": self.state.bad_steps,
            "damaged_samples": sum(self.state.damaged.values()),
        }
        logger.info(progress_line(values, self.phase.steps))
        if self.run.metrics is not None:
            self.run.metrics.write(values, self.state.total_steps)

    def _check_damage(self) -> None:
        """Stop on all ranks when too many training samples had to be replaced."""
        total, train = sum(self.state.damaged.values()), self.config.data.train
        if total > train.max_damaged:
            raise distributed.SharedError(
                f"{train.shards}: {total} damaged samples had to be replaced "
                f"({self.state.damaged}), more than data.train.max_damaged, {train.max_damaged}. "
                f"The logs name them; tools/check_shards.py lists all that is damaged."
            )

    def _evaluate(self) -> bool:
        """Measure AP, write it down, and tell whether it is the best box AP so far."""
        run, state = self.run, self.state
        size_cap = measuring.test_size(self.config, self.name)
        metrics = measuring.evaluate(self.config, self.detector, run.val_set, size_cap)
        flat = measuring.flat_metrics(metrics)
        logger.info("%s: %s", state.position, measuring.one_line(flat))
        if run.metrics is not None:
            measuring.write_evaluation(metrics, run.run_dir.evaluation(self.name, state.step))
            run.metrics.write({"phase": self.name, "step": state.step, **flat}, state.total_steps)
            if state.step == self.phase.steps:
                count = self.config.evaluation.pictures
                measuring.draw_validation(
                    self.detector, run.val_set, size_cap, count, run.run_dir, self.name
                )
        box_ap = flat["bbox/AP"] or 0.0
        is_best = state.best_ap is None or box_ap > state.best_ap
        if is_best:
            state.best_ap = box_ap
        state.needs_evaluation = False
        return is_best

    def _save(self, is_best: bool) -> None:
        """Write a checkpoint of this moment (a collective)."""
        self.meter.sync(self.state, self.stream.damaged)
        run = self.run
        saving.save_checkpoint(
            self.config, run.run_dir, self.engine, run.train_set, self.state, is_best
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
