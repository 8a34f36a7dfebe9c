"""Train a detector: all phases of a config, from the data to the final weights.

Its command line is in ``cli/arguments/train.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.train import parse_arguments
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bigdet import distributed
from bigdet.cli.running import STOPPED, run_command
from bigdet.config.load import load_config
from bigdet.config.phase import data_key, num_steps
from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.phase_sets import open_phase_sets, phases_by_sets
from bigdet.doctor import examine
from bigdet.engine import checkpoint, cuda_settings
from bigdet.engine.build import build_engine
from bigdet.evaluation.detection_limits import warn_at_start
from bigdet.host import errors, locks
from bigdet.host.files import check_folder, write_text
from bigdet.logs.log import setup_logging
from bigdet.models.frozen import FROZEN, frozen_tensors
from bigdet.run_dir import RunDir
from bigdet.training import failures, optim, resume, saving, starting_point, stopping
from bigdet.training.data_checks import check_data
from bigdet.training.loop import PhaseTrainer, Run
from bigdet.training.phase_stream import stream_for_phase
from bigdet.training.phases import build_empty, load_frozen, start_weights
from bigdet.training.watchdog import Watchdog

PEER_SECONDS = 60.0
"""How long a run that ends in an error waits for the other ranks to write the last checkpoint."""


def main(arguments: Sequence[str]) -> int:
    """Run all phases of a config and return the exit code."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    cuda_settings.apply(config.device)  # before CUDA begins
    distributed.start(config.log.stall_seconds or math.inf)
    setup_logging(distributed.rank(), as_json=options.log_json)
    if options.doctor:
        return examine(config)
    stopping.listen()
    run_dir = RunDir(Path(config.output))
    with contextlib.ExitStack() as at_end:
        with distributed.together():
            if distributed.is_main():  # before anything in the folder changes
                locks.refuse_held(run_dir.root, run_dir.lock)
                check_folder(run_dir.root, "output")
                at_end.enter_context(locks.held(run_dir.root, run_dir.lock))
        return train(config, run_dir, options.log_json)


def train(config: RunConfig, run_dir: RunDir, log_json: bool) -> int:
    """Run all phases in a run folder that this run alone writes to, and return the exit code."""
    folder: Path | None = None
    with distributed.together():
        check_folder(run_dir.root, "output")
        setup_logging(distributed.rank(), run_dir.log(distributed.rank()), log_json)
        sets = open_phase_sets(config)
        check_data(config, sets)
        warn_at_start(config, [data.val for data in phases_by_sets(sets)])
    starting_point.fetch_newer(config, run_dir)
    with distributed.together():
        if distributed.is_main():
            run_dir.stop.unlink(missing_ok=True)
            run_dir.stopped.unlink(missing_ok=True)
            folder = starting_point.find_checkpoint(config, run_dir)
    resume.check_same_everywhere(config, sets)
    folder = distributed.broadcast_object(folder)
    saved = None if folder is None else checkpoint.load(folder)
    with distributed.together():
        config = resume.settle_config(config, saved, folder, sets)
        resume.check_phases(config, sets, saved)
        state, metrics = resume.begin(config, run_dir, sets, saved)
    watchdog = Watchdog(config.log.stall_seconds, run_dir.log(distributed.rank()))
    run = Run(config, run_dir, sets, metrics, state, watchdog)
    if saved is not None:
        run.restored = saved.engine
    run.log_start(folder)
    try:
        with watchdog:
            code = run_phases(run)
            if code == STOPPED and distributed.is_main():  # launchers change exit codes
                write_text(run_dir.stopped, f"{state.position}\n")
            watchdog.at(f"{state.position}: copying the last checkpoint")
            run.saver.finish_copies()
            return code
    finally:
        run.scorer.end()
        run.saver.join(PEER_SECONDS)
        if metrics is not None:
            metrics.close()


def run_phases(run: Run) -> int:
    """Run the current phase and those after it, and return the exit code."""
    names = list(run.config.phases)
    run.saver.finish()  # what a killed run has left to do for its checkpoints
    with distributed.together():
        run.scorer.resume()
    run.state.needs_evaluation = distributed.broadcast_object(run.state.needs_evaluation)
    for name in names[names.index(run.state.phase) :]:
        if name != run.state.phase:
            images, before = (phase_data(run.config, n).train for n in (name, run.state.phase))
            run.state.begin(name, has_other_images=images != before)
        if not run_phase(run):
            return STOPPED
    if not run.scorer.finish(run.must_stop):
        return STOPPED
    run.saver.finish()  # the best may be another one now
    saving.write_final_weights(run.config, run.run_dir)
    return 0


def run_phase(run: Run) -> bool:
    """Build the stream, the detector and the engine of the current phase, and train it.

    Returns:
        True when the phase is complete, False when the run was asked to stop.
    """
    config, state, name = run.config, run.state, run.state.phase
    errors.at(f"{name}: building the stream, the detector and the engine")
    phase, device = config.phases[name], distributed.device()
    if state.step == num_steps(phase) and not state.needs_evaluation:
        run.restored = None  # the phase is complete, but its last evaluation may be unscored
        return True
    with distributed.together():
        rank, first_step = distributed.rank(), state.step + state.stream_shift
        stream = stream_for_phase(
            config, name, run.sets[name].train, rank, distributed.world_size(), first_step
        )
        if run.restored is not None:
            stream.check_state(state.stream)
    state.stream = stream.state()
    resume.check_same_stream(state.stream, data_key(name, config.phases[name], "train"))
    classes = run.sets[name].classes
    with contextlib.ExitStack() as until_begun:
        detector, start = build_empty(config, name, classes), None
        if run.restored is None:
            weights = start_weights(config, name, classes, run.run_dir, frozen_tensors(detector))
            start = until_begun.enter_context(weights)
            state.frozen = start.metadata.get(FROZEN)
        load_frozen(detector, config.engine, state, run.run_dir, device)
        make_optimizer = partial(optim.build_optimizer, phase=phase)
        num_micro_batches = len(stream.lanes)
        engine = build_engine(
            detector,
            make_optimizer,
            config.engine,
            num_micro_batches,
            device,
            detector.units,
            with_ema=phase.ema is not None,
        )
        if start is not None:
            engine.begin(start)
    try:
        if run.restored is not None:
            engine.load_state(run.restored)
            run.restored = None
        trainer = PhaseTrainer(run, detector, engine, stream, device)
        with failures.explained(trainer):
            return trainer.train()
    finally:
        stream.close()
        engine.close()


if __name__ == "__main__":
    run_command(main)
