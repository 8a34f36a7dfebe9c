"""One phase, step by step: batches, engine, log, checkpoints and evaluations."""

from __future__ import annotations

import logging
import time
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigdet import distributed
from bigdet.config.model import reported
from bigdet.config.phase import num_lanes, num_steps
from bigdet.config.run import RunConfig
from bigdet.data.format.class_counts import class_lines
from bigdet.data.format.phase_sets import DataSets, phases_by_sets
from bigdet.data.streams.stream import TrainStream
from bigdet.engine.base import Engine
from bigdet.engine.cuda_settings import chosen_convolutions
from bigdet.engine.parts import Source
from bigdet.engine.sharding import stage_of_run
from bigdet.evaluation.federated import LVIS_DETECTIONS
from bigdet.logs.log import MetricsWriter
from bigdet.models import norms
from bigdet.models.detector import Detector
from bigdet.run_dir import RunDir
from bigdet.structures import Batch
from bigdet.training import measuring, optim, saving, showing
from bigdet.training.averages import LossMeter
from bigdet.training.background_scoring import Scorer
from bigdet.training.flops import FlopMeter
from bigdet.training.metrics import StepMeter, progress_line
from bigdet.training.pace import Mark, clock_for
from bigdet.training.precise_bn import measure_statistics
from bigdet.training.prefetch import StepBatches
from bigdet.training.profiling import Profile
from bigdet.training.results import Results, Taken
from bigdet.training.state import NEWEST, RunState
from bigdet.training.stopping import is_asked, stop_requested
from bigdet.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What all phases of a run share.

    Attributes:
        config: with the images per step and the length of every phase filled in.
        run_dir: where everything is written.
        sets: the images of each phase, by its name.
        metrics: writer of ``metrics.jsonl`` and boards on rank 0, None on the other ranks.
        state: position and counters; changed in place.
        watchdog: ends the run if it makes no progress.
        restored: the checkpoint that a phase is resumed from; None once it is loaded.
        saver: writes checkpoints in the background.
        scorer: computes AP in the background.
    """

    config: RunConfig
    run_dir: RunDir
    sets: Mapping[str, DataSets]
    metrics: MetricsWriter | None
    state: RunState
    watchdog: Watchdog
    restored: Source | None = None
    saver: saving.Saver = field(init=False)
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        """Make the saver and the scorer."""
        self.saver = saving.Saver(self.config, self.run_dir, self.sets)
        self.scorer = Scorer(self.config, self.run_dir, self.sets, self.metrics, self.state)

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
        by_sets = phases_by_sets(self.sets)
        for data, names in by_sets.items():
            self._log_data(data, f" of {', '.join(names)}" * (len(by_sets) > 1))
        engine = self.config.engine
        stage = "" if engine.zero_stage is None else f" ZeRO-{stage_of_run(engine)}"
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

    def _log_data(self, data: DataSets, whose: str) -> None:
        """Log what the sets of some phases have; ``whose`` names the phases after a blank."""
        for what, shards in (("training", data.train), ("validation", data.val)):
            logger.info(
                f"{what}{whose}: {len(shards):,} images, {shards.manifest.instances:,} instances, "
                f"{shards.num_classes} categories, {len(shards.manifest.shards)} shards in "
                f"{shards.address}"
            )
            line, warnings = class_lines(shards, "learned" if what == "training" else "measured")
            logger.info("%s%s objects per class: %s", what, whose, line)
            for warning in warnings:
                logger.warning("%s set%s: %s", what, whose, warning)
        if data.val.manifest.federated:
            key, given = reported(self.config.model) or ("what the model gives", "not known")
            logger.info(
                f"validation{whose} is scored by LVIS's rule, which counts {LVIS_DETECTIONS} "
                f"detections per image; {key} is {given}"
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
        self.data = run.sets[self.name]
        self.num_steps = num_steps(self.phase)
        self.detector, self.engine, self.stream, self.device = detector, engine, stream, device
        self.batches = StepBatches(stream, device)
        self.meter = StepMeter(device)
        self.losses = LossMeter(device, run.state.interval)
        self.results = Results(run, self.losses, self.meter, stream.lanes)
        self.profile = Profile(run.config.log.profile, run.run_dir, self.name, device)
        self.forward_clock = clock_for(detector, run.config, device)
        self.flops = FlopMeter(detector, run.config.engine.precision, device)
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
            self.profile.close()
            self.forward_clock.close()
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
            with self.profile.step(state.step + 1):
                must_stop = self._step()
            due = self._due()
            if due.log:
                self._log()
            if state.step == self.num_steps:
                self.results.check_trained(self.num_steps)
            state.needs_evaluation = due.evaluation
            if must_stop or due.save:
                self._save()
            if must_stop or (state.needs_evaluation and not self._evaluate()):
                return False
        return True

    def _due(self) -> _Due:
        """Return what comes after the present step."""
        config, step = self.config, self.state.step
        is_last = step == self.num_steps
        evaluation = is_last or _is_multiple(step, config.evaluation.every)
        return _Due(
            log=is_last or _is_multiple(step, config.log.every),
            evaluation=evaluation,
            save=evaluation  # it takes long: if it fails, no step is lost
            or _is_multiple(step, config.checkpoint.every)
            or f"{self.name}-{step}" in config.checkpoint.at,
        )

    def _at(self, what: str) -> None:
        """Note what is done now, for messages and for the watchdog."""
        self.run.watchdog.at(f"{self.name} step {self.state.step + 1}: {what}")

    def _step(self) -> bool:
        """Take one optimizer step; return on all ranks whether any was asked to stop after it."""
        state, device = self.state, self.device
        started, cpu_started = time.perf_counter(), time.process_time()
        must_stop, data_seconds = self._get_ready()
        micro_batches = self.micro_batches
        self._at("forward, backward, update")
        self.lr = optim.lr_at(self.phase, state.step + 1)
        self.engine.set_lr(self.lr)
        begin = Mark(device)
        with chosen_convolutions(self.config.device, self.phase.resize):
            launched = self.engine.launch_step(self.batches.on_device(micro_batches))
        norms.update_running_statistics(self.detector, counts=launched.counts)
        state.step += 1
        state.total_steps += 1
        self.results.settle()  # that of the step before: the device is busy with this one
        if self.phase.ema is not None:
            self.engine.update_ema(
                optim.ema_decay(self.phase.ema, state.step - state.skipped_steps)
            )
        images = self.stream.lane_images(state.step + state.stream_shift)
        ids = [number for batch in micro_batches for number in batch.image_ids.tolist()]
        taken = Taken(state.step, launched, images, ids, data_seconds, begin, Mark(device))
        self.results.add(taken)
        if must_stop or self._due().any:
            self.results.settle()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        self.results.end_step(seconds)
        self.meter.add(micro_batches, seconds, data_seconds, cpu_seconds)
        self.flops.add(micro_batches)
        self.forward_clock.end_step()
        return must_stop

    def _get_ready(self) -> tuple[bool, float]:
        """Get the micro-batches of the next step; the one meeting of the ranks in a step.

        Returns:
            Whether any rank was asked to stop, and the seconds that this one waited for data.
        """
        started = time.perf_counter()
        with distributed.together() as wish:  # a shard that one rank cannot read ends the run
            self._at("waiting for data")
            self.micro_batches = next(self.batches)
            data_seconds = time.perf_counter() - started
            self.run.scorer.collect()
            wish.is_asked = is_asked(self.run.run_dir.stop)
            self._at("data is ready, waiting for the other ranks")
            if self.run.metrics is not None and not self.has_shown_batch:
                self.has_shown_batch = True
                showing.show_batch(
                    self.run.metrics, self.micro_batches[0], self.data.train, self.state
                )
        self.flops.count(self.micro_batches[0])
        return wish.is_asked, data_seconds

    def _log(self) -> None:
        """Write one line for people and one object for machines (a collective)."""
        self.run.watchdog.at(f"{self.state.position}: writing the log")
        self.meter.sync(self.state, self.stream.damages, self.stream.dropped_boxes)
        self._check_damage()
        values: dict[str, Any] = {
            "phase": self.name,
            "step": self.state.step,
            **self.losses.means(),
            "lr": self.lr,
            **(
                {"loss_scale": self.results.last.loss_scale}
                if self.config.engine.precision == "fp16"
                else {}
            ),
            **self.meter.rates(self.forward_clock.take(), self.flops.take()),
            "goodput": self.state.goodput(time.time()),
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
        if sum(self.state.damaged.values()) > self.stream.max_damaged:
            found = {row: damage.message for row, damage in self.stream.damages.items()}
            listed = dict(ChainMap(*distributed.all_gather_objects(found)))
            messages = (listed[row] for row in sorted(listed))
            raise distributed.SharedError(self.stream.too_damaged(self.state.damaged, messages))

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
        results = measuring.predict(
            self.config, self.name, self.detector, self.data.val, self.data.classes, run.must_stop
        )
        if results is None:
            return False
        self.meter.add_evaluation(time.perf_counter() - started, time.process_time() - cpu_started)
        self.meter.sync(state, self.stream.damages, self.stream.dropped_boxes)
        with distributed.together():
            if run.metrics is not None and not prefix:
                showing.show_detections(run.metrics, results, self.data.val, state)
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


@dataclass(frozen=True)
class _Due:
    """What comes after a step; all of it needs the step's result."""

    log: bool
    evaluation: bool
    save: bool

    @property
    def any(self) -> bool:
        return self.log or self.save


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
