"""One phase, step by step: batches, engine, log, checkpoints and evaluations."""

from __future__ import annotations

import logging
import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.model import reported
from bigdet.config.phase import num_lanes, num_steps
from bigdet.config.run import RunConfig
from bigdet.data.format.class_counts import class_lines
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.streams.stream import TrainStream, too_damaged
from bigdet.engine.base import Engine, StepResult
from bigdet.engine.cuda_settings import chosen_convolutions
from bigdet.engine.parts import Source
from bigdet.evaluation.federated import LVIS_DETECTIONS
from bigdet.logs.log import MetricsWriter
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import measuring, optim, saving, showing
from bigdet.training.averages import LossMeter
from bigdet.training.background_scoring import Scorer
from bigdet.training.metrics import StepMeter, progress_line
from bigdet.training.precise_bn import measure_statistics
from bigdet.training.prefetch import StepBatches
from bigdet.training.state import NEWEST, RunState
from bigdet.training.stopping import stop_requested
from bigdet.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What all phases of a run share.

    Attributes:
        config: with the images per step and the length of every phase filled in.
        run_dir: where everything is written.
        train_set: the images to train on.
        val_set: the images to evaluate on.
        metrics: writer of ``metrics.jsonl`` and boards on rank 0, None on the other ranks.
        state: position and counters; changed in place.
        watchdog: ends the run if it makes no progress.
        restored: the checkpoint that a phase is resumed from; None once it is loaded.
        saver: writes checkpoints in the background.
        scorer: computes AP in the background.
    """

    config: RunConfig
    run_dir: RunDir
    train_set: ShardSet
    val_set: ShardSet
    metrics: MetricsWriter | None
    state: RunState
    watchdog: Watchdog
    restored: Source | None = None
    saver: saving.Saver = field(init=False)
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        """Make the saver and the scorer."""
        self.saver = saving.Saver(self.config, self.run_dir, self.train_set)
        self.scorer = Scorer(self.config, self.run_dir, self.val_set, self.metrics, self.state)

    def must_stop(self) -> bool:
        """Return on all ranks whether any was asked to stop (a collective); counts as progress."""
        self.watchdog.alive()
        return stop_requested(self.run_dir.stop)

    def log_start(self, folder: Path | None) -> None:
        """Log data, ranks and schedules.

        Args:
            folder: the checkpoint that the run continues from, None for a fresh start.
        """
        start = "a fresh start" if folder is None else f"continuing from {folder}"
        logger.info("run folder %s, %s", self.run_dir.root, start)
        for what, shards in (("training", self.train_set), ("validation", self.val_set)):
            logger.info(
                f"{what}: {len(shards):,} images, {shards.manifest.instances:,} instances, "
                f"{shards.num_classes} categories, {len(shards.manifest.shards)} shards in "
                f"{shards.address}"
            )
            line, warnings = class_lines(shards, "learned" if what == "training" else "measured")
            logger.info("%s objects per class: %s", what, line)
            for warning in warnings:
                logger.warning("%s set: %s", what, warning)
        if self.val_set.manifest.federated:
            key, given = reported(self.config.model) or ("what the model gives", "not known")
            logger.info(
                f"validation is scored by LVIS's rule, which counts {LVIS_DETECTIONS} detections "
                f"per image; {key} is {given}"
            )
        engine = self.config.engine
        stage = "" if engine.zero_stage is None else f" ZeRO-{engine.zero_stage}"
        nodes = " inside each node" if engine.shard_over == "node" else ""
        offload = "" if engine.offload == "none" else f", {engine.offload} offloaded to the CPU"
        world_size, device = distributed.world_size(), distributed.device().type
        logger.info(
            f"ranks: {world_size} on {device}, {engine.kind}{stage}{nodes}, "
            f"{engine.precision}{offload}"
        )
        for name, phase in self.config.phases.items():
            assert phase.images_per_step is not None
            logger.info(
                f"phase {name}: {num_steps(phase)} steps of {phase.images_per_step} images "
                f"({world_size} ranks x {num_lanes(phase) // world_size} micro-batches of "
                f"{phase.images_per_gpu}), {optim.describe_lr(phase, phase.images_per_step)}"
                f"{optim.describe_ema(phase.ema)}"
            )


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
        """Prepare to train.

        Args:
            run: its ``state.phase`` is the phase to train.
            detector: the engine's module, for running statistics and evaluations.
            engine: takes the steps.
            stream: this rank's micro-batches from step ``run.state.step + 1`` on.
            device: where the micro-batches are copied to.
        """
        self.run, self.config, self.state = run, run.config, run.state
        self.name = run.state.phase
        self.phase = run.config.phases[self.name]
        self.num_steps = num_steps(self.phase)
        self.detector, self.engine, self.stream, self.device = detector, engine, stream, device
        self.batches = StepBatches(stream, device)
        self.meter = StepMeter(device)
        self.losses = LossMeter(device, run.state.interval)
        self.has_shown_batch = False
        self.micro_batches: list[Batch] = []  # of the present step, for messages

    def train(self) -> bool:
        """Take all steps that are left.

        Returns:
            True when the phase is complete, False when the run was asked to stop. Either way the
            last checkpoint is written.

        Raises:
            SharedError: too many steps were not finite, or too many samples damaged.
        """
        try:
            is_complete = self._take_steps()
        finally:
            self.batches.close()
        self.run.saver.finish()
        if not is_complete:
            logger.info("stopped on request at %s; the same command continues", self.state.position)
        return is_complete

    def _take_steps(self) -> bool:
        """Take the steps; return whether all of them were taken."""
        state = self.state
        if state.needs_evaluation and not self._evaluate():  # interrupted before or during it
            return False
        while state.step < self.num_steps:
            result, lr = self._step()
            is_last = state.step == self.num_steps
            state.needs_evaluation = is_last or _is_due(state.step, self.config.evaluation.every)
            if is_last or _is_due(state.step, self.config.log.every):
                self._log(result, lr)
            if is_last:
                self._check_trained()
            must_stop = self.run.must_stop()
            if (
                must_stop
                or state.needs_evaluation  # it takes long: if it fails, no step is lost
                or _is_due(state.step, self.config.checkpoint.every)
                or f"{self.name}-{state.step}" in self.config.checkpoint.at
            ):
                self._save()
            if must_stop or (state.needs_evaluation and not self._evaluate()):
                return False
        return True

    def _at(self, what: str) -> None:
        """Note what is done now, for messages and for the watchdog."""
        self.run.watchdog.at(f"{self.name} step {self.state.step + 1}: {what}")

    def _step(self) -> tuple[StepResult, float]:
        """Take one optimizer step; return its result and its learning rate."""
        started, cpu_started = time.perf_counter(), time.process_time()
        with distributed.together():  # a shard that one rank cannot read ends the run on all
            self._at("waiting for data")
            micro_batches = self.micro_batches = next(self.batches)
            data_seconds = time.perf_counter() - started
            self.run.scorer.collect()
            self._at("data is ready, waiting for the other ranks")
            if self.run.metrics is not None and not self.has_shown_batch:
                self.has_shown_batch = True
                showing.show_batch(
                    self.run.metrics, micro_batches[0], self.run.train_set, self.state
                )
        self._at("forward, backward, update")
        lr = optim.lr_at(self.phase, self.state.step + 1)
        self.engine.set_lr(lr)
        with chosen_convolutions(self.config.device, self.phase.resize):
            result = self.engine.train_step(self.batches.on_device(micro_batches))
        self.state.step += 1
        self.state.total_steps += 1
        lane_images = self.stream.lane_images(self.state.step + self.state.stream_shift)
        self.losses.add(result, lane_images, self.stream.lanes)
        if result.is_finite:
            norms.update_running_statistics(self.detector)
            if self.phase.ema is not None:
                counted = self.state.step - self.state.skipped_steps
                self.engine.update_ema(optim.ema_decay(self.phase.ema, counted))
        else:
            self.state.skipped_steps += 1
            norms.discard_statistics(self.detector)
            if result.is_overflow:
                logger.info(
                    "%s: fp16 overflow, step skipped, loss scale now %g",
                    self.state.position,
                    result.loss_scale / 2,
                )
            else:
                self._note_bad_step(micro_batches)
        step_seconds = time.perf_counter() - started
        self.meter.add(micro_batches, step_seconds, data_seconds, time.process_time() - cpu_started)
        return result, lr

    def _note_bad_step(self, micro_batches: Sequence[Batch]) -> None:
        """Count a step that was not finite, on any rank; too many of them stop the run."""
        self.state.bad_steps += 1
        ids = [number for batch in micro_batches for number in batch.image_ids.tolist()]
        logger.warning(
            "%s: loss or gradient not finite, step skipped (%d so far); images of this rank: %s",
            self.state.position,
            self.state.bad_steps,
            ids,
        )
        if self.state.bad_steps > self.config.engine.max_bad_steps:
            self.run.saver.wait()
            last = saving.last_good_checkpoint(self.run.run_dir)
            raise distributed.SharedError(
                f"{self.state.position}: {self.state.bad_steps} steps had a loss or gradient that "
                f"is not finite, more than engine.max_bad_steps. Lower phases.{self.name}.lr, or "
                f"set engine.clip_norm. Last good checkpoint: {last or 'none'}."
            )

    def _check_trained(self) -> None:
        """Stop on all ranks at the end of a phase in which no step changed a weight."""
        if self.state.skipped_steps < self.num_steps:
            return
        is_fp16 = self.config.engine.precision == "fp16"
        also = " fp16 needs some steps to find its loss scale: set more, or bf16." * is_fp16
        raise distributed.SharedError(
            f"{self.state.position}: all {self.num_steps} steps of the phase were skipped, since a "
            f"loss or gradient was not finite: nothing was trained, so the run ends. "
            f"Lower phases.{self.name}.lr, set engine.clip_norm, or look at the weights that the "
            f"phase starts from.{also}"
        )

    def _log(self, result: StepResult, lr: float) -> None:
        """Write one line for people and one object for machines (a collective)."""
        self.run.watchdog.at(f"{self.state.position}: writing the log")
        self.meter.sync(self.state, self.stream.damages, self.stream.dropped_boxes)
        self._check_damage()
        values: dict[str, Any] = {
            "phase": self.name,
            "step": self.state.step,
            **self.losses.means(),
            "lr": lr,
            **({"loss_scale": result.loss_scale} if self.config.engine.precision == "fp16" else {}),
            **self.meter.rates(),
            **measuring.counters(self.config, self.state),
            "bad_steps": self.state.bad_steps,
            "dropped_boxes": self.state.dropped_boxes,
            "damaged_samples": sum(self.state.damaged.values()),
        }
        logger.info(progress_line(values, self.num_steps), extra={"values": values})
        if self.run.metrics is not None:
            self.run.metrics.write(values, self.state.total_steps)

    def _check_damage(self) -> None:
        """Stop on all ranks when too many training samples had to be replaced."""
        total, train = sum(self.state.damaged.values()), self.config.data.train
        if total > train.max_damaged:
            found = {row: damage.message for row, damage in self.stream.damages.items()}
            listed = dict(ChainMap(*distributed.all_gather_objects(found)))
            messages = (listed[row] for row in sorted(listed))
            raise distributed.SharedError(
                too_damaged(train.shards, self.state.damaged, train.max_damaged, messages)
            )

    def _evaluate(self) -> bool:
        """Evaluate the weights, or their average, or both, and write a checkpoint.

        Returns:
            False when the run was asked to stop; the evaluation is then still due.
        """
        ema = self.phase.ema
        if ema is not None and ema.evaluate == "both" and not self._detect(NEWEST):
            return False
        with self.engine.averaged():
            is_done = self._detect("")
        if not is_done:
            return False
        self.state.needs_evaluation = False
        self._save()
        return True

    def _detect(self, prefix: str) -> bool:
        """Run the model over the validation set, and start the scoring.

        Args:
            prefix: of the names of the numbers.

        Returns:
            False when the run was asked to stop.
        """
        run, state = self.run, self.state
        run.watchdog.at(f"{state.position}: evaluation")
        self.micro_batches = []
        if not run.scorer.finish(run.must_stop):  # the evaluation before
            return False
        started, cpu_started = time.perf_counter(), time.process_time()
        if not self._measure_norms():
            return False
        classes = [category.name for category in run.train_set.categories]
        results = measuring.predict(
            self.config, self.name, self.detector, run.val_set, classes, run.must_stop
        )
        if results is None:
            return False
        self.meter.add_evaluation(time.perf_counter() - started, time.process_time() - cpu_started)
        self.meter.sync(state, self.stream.damages, self.stream.dropped_boxes)
        with distributed.together():
            if run.metrics is not None and not prefix:
                showing.show_detections(run.metrics, results, run.val_set, state)
            run.scorer.start(results, prefix)
        return True

    def _measure_norms(self) -> bool:
        """Measure the statistics of BN if ``precise_bn`` is set; False when asked to stop."""
        num_steps = self.config.evaluation.precise_bn
        if num_steps is None or self.phase.norm_mode not in ("live", "sync"):
            return True
        stream = self.stream.from_step(self.state.step + self.state.stream_shift)
        precision = self.config.engine.precision
        return measure_statistics(
            self.detector, stream, num_steps, self.device, precision, self.run.must_stop
        )

    def _save(self) -> None:
        """Write a checkpoint (a collective)."""
        self.run.watchdog.at(f"{self.state.position}: writing a checkpoint")
        self.meter.sync(self.state, self.stream.damages, self.stream.dropped_boxes)
        self.state.interval = self.losses.interval()
        self.run.saver.save(self.engine, self.state)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
