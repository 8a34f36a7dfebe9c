"""The duration and peak memory of a few real steps on this device, in a separate process.

The process is the command's own with ``--measure``, so that its memory is that of the steps alone,
and running out of memory ends only the trial.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.config.engine import EngineConfig
from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.mix import open_train_set
from bigdet.engine.build import build_engine
from bigdet.host import errors
from bigdet.host.limits import host_memory
from bigdet.run_dir import RunDir
from bigdet.training import optim
from bigdet.training.metrics import peak_memory_gib
from bigdet.training.phase_stream import stream_for_phase
from bigdet.training.phases import build_for_phase

GIB = 1 << 30
WARM_STEPS = 2
MEASURED_STEPS = 5
_HARD_LIMIT = 2.0
"""On CPUs a trial may take this many times the given memory: more could end other processes."""


@dataclass(frozen=True)
class Measured:
    """What a few steps took.

    Attributes:
        seconds: median of a step of one micro-batch.
        gib: peak memory of the GPU, or of the process on a CPU; 0 where it is not known.
        room_gib: memory of the device.
        images_per_pass: training images that one pass shows.
    """

    seconds: float
    gib: float
    room_gib: float
    images_per_pass: int


def run_trial(command: Sequence[str]) -> Measured | None:
    """Measure steps in a separate process.

    Args:
        command: starts a process that calls `write_trial`.

    Returns:
        What was measured; None when the memory was full.

    Raises:
        ValueError: the steps failed in another way; with the message of the process.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if (
        done.returncode == -signal.SIGKILL
    ):  # Linux ends the process that takes the host's last memory
        return None
    if done.returncode:
        log, _, reason = done.stderr.rpartition("error: ")
        sys.stderr.write(log)
        raise ValueError(f"the steps could not be measured: {reason.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Measured(**found)


def write_trial(config: RunConfig, phase: str, memory_gib: float | None) -> None:
    """Measure in this process, and print what ``run_trial`` reads.

    The steps should fit into ``memory_gib``, with the engine of the config. With None, an engine
    that shards nothing runs them, in all memory.
    """
    distributed.start()
    logging.getLogger("bigdet").setLevel(logging.WARNING)  # without the messages of a run
    engine = dataclasses.replace(
        config.engine, kind="deepspeed", zero_stage=0, offload="none", clip_norm=None
    )
    if memory_gib is not None:
        engine = config.engine
        if distributed.device().type == "cpu":
            _limit_memory(_HARD_LIMIT * memory_gib)
    try:
        found = dataclasses.asdict(_measure(config, phase, engine))
    except (RuntimeError, MemoryError) as error:
        if not errors.is_out_of_memory(error):
            raise
        found = None
    sys.stdout.write(json.dumps(found) + "\n")


def _measure(config: RunConfig, phase: str, engine_config: EngineConfig) -> Measured:
    """Take a few steps of one micro-batch on this device."""
    device = distributed.device()
    settings = config.phases[phase]
    train_set = open_train_set(phase_data(config, phase).train, config.data.cache)
    alone = {phase: dataclasses.replace(settings, images_per_step=None)}
    stream = stream_for_phase(dataclasses.replace(config, phases=alone), phase, train_set)
    batches = list(islice(stream, WARM_STEPS + MEASURED_STEPS))
    stream.close()  # its processes would slow down the measured steps
    with tempfile.TemporaryDirectory() as folder:
        # As if resumed: the initial weights make no difference.
        classes = [category.name for category in train_set.categories]
        detector = build_for_phase(config, phase, classes, RunDir(Path(folder)), device, True)
    make_optimizer = partial(optim.build_optimizer, phase=settings)
    with_ema = settings.ema is not None
    engine = build_engine(
        detector, make_optimizer, engine_config, 1, device, detector.units, with_ema=with_ema
    )
    engine.set_lr(0.0)
    seconds = []
    for batch in batches:
        on_device = batch.to(device)
        started = time.perf_counter()
        engine.train_step([on_device])
        seconds.append(time.perf_counter() - started)
    return Measured(
        seconds=statistics.median(seconds[WARM_STEPS:]),
        gib=peak_memory_gib(),
        room_gib=_room_gib(device),
        images_per_pass=stream.steps_per_pass * settings.images_per_gpu,
    )


def _room_gib(device: torch.device) -> float:
    """Return the memory of a device, or of this process's part of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return host_memory().total / GIB


def _limit_memory(gib: float) -> None:
    """Allow this process so much more memory; taking more raises an error (Linux)."""
    file = Path("/proc/self/status")
    if not file.is_file():  # macOS does not hold processes to such a limit
        return
    status = file.read_text(encoding="ascii").splitlines()
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    limit = now + int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
