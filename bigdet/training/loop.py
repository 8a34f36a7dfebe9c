"""One phase, step by step: where batches, engine, checkpoints and evaluation meet."""

from __future__ import annotations

import logging
import time
from collections import ChainMap
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
from bigdet.data.stream import TrainStream, list_damages
from bigdet.engine.base import Engine, EngineState, StepResult
from bigdet.log import MetricsWriter
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import measuring, optim, saving
from bigdet.training.metrics import StepMeter, mean_losses, progress_line
from bigdet.training.prefetch import prefetch
from bigdet.training.state import RunState
from bigdet.training.stopping import stop_requested

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What all phases of a run share.

    Attributes:
        config: resolved.
        run_dir: where everything is written.
        train_set: the images to learn from.
        val_set: the images to measure on.
        metrics: rank 0's log for machines, None on the other ranks.
        state: where the run is; changed in place.
        restored: engine state to go on from inside the current phase; taken once.
    """

    config: RunConfig
    run_dir: RunDir
    train_set: ShardSet
    val_set: ShardSet
    metrics: MetricsWriter | None
    state: RunState
    restored: EngineState | None = None

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
                len(shards.manifest.shards), shards.address,
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
        state, batches = self.state, iter(self.stream)
        if state.needs_evaluation and not self._evaluate():  # interrupted before or in it
            return self._stop()
        while state.step < self.phase.steps:
            result, lr = self._step(batches)
            is_last = state.step == self.phase.steps
            state.needs_evaluation = is_last or _is_due(state.step, self.config.evaluation.every)
            if is_last or _is_due(state.step, self.config.log.every):
                self._log(result, lr)
            must_stop = self._must_stop()
            if (
                must_stop
                or state.needs_evaluation  # which takes long: nothing trained is lost in it
                or _is_due(state.step, self.config.checkpoint.every)
            ):
                self._save()
            if must_stop or (state.needs_evaluation and not self._evaluate()):
                return self._stop()
        return True

    def _must_stop(self) -> bool:
        """Tell on every rank whether any rank was asked to stop (a collective)."""
        return stop_requested(self.run.run_dir.stop)

    def _stop(self) -> bool:
        logger.info("stopped on request at %s; start again to go on", self.state.position)
        return False

    def _step(self, batches: Iterator[Batch]) -> tuple[StepResult, float]:
        """Take one optimizer step; return what it saw and its learning rate."""
        started = time.perf_counter()
        with distributed.together():  # a shard that one rank cannot get ends the run on all
            micro_batches = list(islice(batches, len(self.stream.lanes)))
            data_seconds = time.perf_counter() - started
        lr = self.lr * optim.lr_factor(self.phase, self.state.step + 1)
        self.engine.set_lr(lr)
        result = self.engine.train_step(prefetch(micro_batches, self.device))
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
        self.meter.sync(self.state, self.stream.damages, self.stream.dropped_boxes)
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
            "dropped_boxes": self.state.dropped_boxes,
            "damaged_samples": sum(self.state.damaged.values()),
        }
        logger.info(progress_line(values, self.phase.steps))
        if self.run.metrics is not None:
            self.run.metrics.write(values, self.state.total_steps)

    def _check_damage(self) -> None:
        """Stop on all ranks when too many training samples had to be replaced."""
        total, train = sum(self.state.damaged.values()), self.config.data.train
        if total > train.max_damaged:
            messages = {row: damage.message for row, damage in self.stream.damages.items()}
            listed = dict(ChainMap(*distributed.all_gather_objects(messages)))
            raise distributed.SharedError(
                f"{train.shards}: {total} damaged samples had to be replaced "
                f"({self.state.damaged}), more than data.train.max_damaged, {train.max_damaged}. "
                f"Repair the shards or raise the limit; tools/check_shards.py lists all that is "
                f"damaged. The first ones:{list_damages(listed[row] for row in sorted(listed))}"
            )

    def _evaluate(self) -> bool:
        """Measure AP, write it down and save what became of the state.

        Returns:
            False when a request to stop came meanwhile; the evaluation is then still due.
        """
        run, state = self.run, self.state
        size_cap = measuring.test_size(self.config, self.name)
        metrics = measuring.evaluate(
            self.config, self.detector, run.val_set, size_cap, self._must_stop,
            run.run_dir.evaluations,
        )  # fmt: skip
        if metrics is None:
            return False
        flat = measuring.flat_metrics(metrics)
        logger.info("%s: %s", state.position, measuring.one_line(flat))
        with distributed.together():
            if run.metrics is not None:
                self._write_evaluation(run.metrics, metrics, size_cap)
        box_ap = flat["bbox/AP"] or 0.0
        if state.best_ap is None or box_ap > state.best_ap:
            state.best_ap = box_ap
            state.best_checkpoint = run.run_dir.checkpoint(self.name, state.step).name
        state.needs_evaluation = False
        self._save()
        return True

    def _write_evaluation(
        self, log: MetricsWriter, metrics: dict[str, Any], size_cap: tuple[int, int]
    ) -> None:
        """Write the numbers, and at the end of the phase pictures (rank 0)."""
        run, state = self.run, self.state
        measuring.write_evaluation(metrics, run.run_dir.evaluation(self.name, state.step))
        line = {"phase": self.name, "step": state.step, **measuring.flat_metrics(metrics)}
        log.write(line, state.total_steps)
        if state.step == self.phase.steps:
            count = self.config.evaluation.pictures
            measuring.draw_validation(
                self.detector, run.val_set, size_cap, count, run.run_dir, self.name
            )

    def _save(self) -> None:
        """Write a checkpoint of this moment (a collective)."""
        self.meter.sync(self.state, self.stream.damages, self.stream.dropped_boxes)
        run = self.run
        saving.save_checkpoint(self.config, run.run_dir, self.engine, run.train_set, self.state)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
