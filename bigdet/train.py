"""Train a detector: all phases of a config, from the data to the final weights.

    deepspeed --num_gpus 8 -m bigdet.train configs/swin_t_direct.yaml
    torchrun --nproc-per-node 8 -m bigdet.train configs/swin_t_direct.yaml seed=1
    python -m bigdet.train configs/quickstart.yaml

Started again, the same command goes on from the newest checkpoint. Exit code 0: done; 1: an error
that the message explains; 75: stopped on request (SIGTERM, SIGUSR1, or the file OUTPUT/stop), with
a checkpoint written: start it again.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from bigdet import distributed
from bigdet.commands import STOPPED, run_command
from bigdet.config.check import check_config
from bigdet.config.load import load_config
from bigdet.config.schema import RunConfig
from bigdet.data.shards import ShardSet
from bigdet.data.stream import TrainStream
from bigdet.engine.deepspeed_engine import DeepSpeedEngine
from bigdet.log import MetricsWriter, setup_logging
from bigdet.run_dir import RunDir
from bigdet.training import resume, saving, stopping
from bigdet.training.loop import PhaseRun, train_phase
from bigdet.training.phases import build_for_phase
from bigdet.training.state import RunState

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run all phases of a config and return the exit code."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    check_config(config)
    distributed.start()
    stopping.listen()
    run_dir = RunDir(Path(config.output))
    with distributed.together():
        setup_logging(distributed.rank(), run_dir.log(distributed.rank()))
        train_set, val_set = ShardSet(config.data.train.shards), ShardSet(config.data.val.shards)
        resume.check_categories(train_set, val_set)
        config, state, checkpoint = resume.start(config, run_dir)
    metrics = saving.open_run(config, run_dir, state, is_resumed=checkpoint is not None)
    for name in list(config.phases)[list(config.phases).index(state.phase) :]:
        if name != state.phase:
            state.begin(name)
        if not run_phase(config, name, run_dir, train_set, val_set, state, checkpoint, metrics):
            return STOPPED
        checkpoint = None
    saving.finish(config, run_dir)
    return 0


def run_phase(
    config: RunConfig,
    name: str,
    run_dir: RunDir,
    train_set: ShardSet,
    val_set: ShardSet,
    state: RunState,
    checkpoint: Path | None,
    metrics: MetricsWriter | None,
) -> bool:
    """Build the detector, the engine and the stream of one phase, and train it.

    Args:
        config: of the run.
        name: of the phase.
        run_dir: where everything is written.
        train_set: images to learn from.
        val_set: images to measure on.
        state: where the run is; changed in place.
        checkpoint: to go on from inside this phase; None to begin it.
        metrics: rank 0's log, None on other ranks.

    Returns:
        True when the phase is complete, False when the run was asked to stop.
    """
    phase, device = config.phases[name], distributed.device()
    stream = TrainStream(...)
    detector = build_for_phase(config, name, train_set.num_classes, run_dir, device)
    engine = DeepSpeedEngine(detector, phase, config.engine, stream.lanes_of_rank, device)
    try:
        if checkpoint is not None:
            saving.load_checkpoint(checkpoint, engine, stream)
        run = PhaseRun(
            config, name, run_dir, detector, engine, stream, val_set, metrics, state, device
        )
        return train_phase(run)
    finally:
        stream.close()
        engine.close()


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; launchers add --local_rank, which the environment says too."""
    parser = argparse.ArgumentParser(
        prog="python -m bigdet.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options to change")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
