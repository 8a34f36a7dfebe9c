"""Which way of sharding to take on many GPUs, and what more of them would give.

    python -m bigdet.plan configs/swin_t_direct.yaml --gpus 8x16 --link nvlink,400gb

``--gpus``: GPUs of a host x hosts. ``--link``: what joins the GPUs of a host, and the network
adapter of each GPU (``50gb`` where eight share one of 400). A few real steps are measured on this
device first; ``--step-seconds`` says what they take where this is not the device that is planned
for. How it is reckoned stands in ``bigdet/planning.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from bigdet import distributed
from bigdet.commands import run_command
from bigdet.config.check import check_config
from bigdet.config.derived import has_masks, phase_model
from bigdet.config.load import ConfigError, load_config
from bigdet.config.schema import RunConfig
from bigdet.data.mix import open_sets
from bigdet.data.stream import open_train_stream
from bigdet.engine.build import build_engine
from bigdet.log import setup_logging
from bigdet.planning import KINDS, Cluster, Forecast, Work, best, forecast, link_speed, state_bytes
from bigdet.run_dir import RunDir
from bigdet.training import optim
from bigdet.training.metrics import peak_memory_gib
from bigdet.training.phases import build_for_phase
from bigdet.training.sizes import model_sizes, optimizer_tensors

logger = logging.getLogger("bigdet.plan")  # __name__ is __main__ here

_GIB = 1 << 30
_WARM_STEPS = 2
_MEASURED_STEPS = 5
_SHOWN_GPUS = [8 << n for n in range(10)]  # 8 to 4096


def main(arguments: Sequence[str]) -> int:
    """Predict, write the tables and return the exit code."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    check_config(config)
    setup_logging(0)
    phase = options.phase or next(iter(config.phases))
    if phase not in config.phases:
        raise ConfigError(
            f"--phase: there is no {phase}. The config has {', '.join(config.phases)}."
        )
    if options.measure:
        sys.stdout.write(json.dumps(measure(config, phase)) + "\n")
        return 0
    hosts, cluster = parse_cluster(options.gpus, options.link, options.latency)
    if options.step_seconds is None:
        measured = measure_apart(options)
    else:
        measured = {"seconds": options.step_seconds, "gib": 0.0, "room_gib": 80.0}
    room_gib = options.gpu_memory_gib or measured["room_gib"]
    sizes = model_sizes(config, phase, open_sets(config.data)[0].num_classes)
    work = Work(
        sizes,
        optimizer_tensors(config.phases[phase]),
        measured["seconds"],
        activation_bytes=0.0,
        micro_batches=1,
    )
    if measured["gib"]:
        rest = measured["gib"] * _GIB - state_bytes("ZeRO-0", 1, work)
        work = dataclasses.replace(work, activation_bytes=max(0.0, rest))
    _write_tables(config, phase, hosts, cluster, work, room_gib, bool(measured["gib"]))
    return 0


def _write_tables(
    config: RunConfig, phase: str, hosts: int, cluster: Cluster, work: Work, room_gib: float,
    knows_activations: bool,
) -> None:  # fmt: skip
    """Write what was measured, all kinds at the asked number of GPUs, and the best at others."""
    settings = config.phases[phase]
    gpus = hosts * cluster.gpus_per_host
    work = _shared_out(work, settings.images_per_step, settings.images_per_gpu, gpus)
    images = settings.images_per_gpu
    logger.info(
        "phase %s: %.1f M weights, %.1f M trained; a micro-batch of %d images takes %.3f s; "
        "memory %s", phase, work.sizes.parameters / 1e6, work.sizes.trained / 1e6, images,
        work.micro_batch_seconds, f"{work.activation_bytes / _GIB:.1f} GiB beside weights, "
        f"gradients and optimizer" if knows_activations else "without activations (not measured)",
    )  # fmt: skip
    logger.info(
        "%d GPUs, %d images per step (%d micro-batches of %d on each):", gpus,
        gpus * work.micro_batches * images, work.micro_batches, images,
    )  # fmt: skip
    header = "step s  waiting s  efficiency  images/s  GiB per GPU"
    logger.info("  %-8s %s", "engine", header)
    rows = [forecast(kind, gpus, cluster, work) for kind in KINDS]
    for row in rows:
        logger.info("  %-8s %s", row.kind, _cells(row, gpus, work, images, room_gib))
    chosen = best(rows, room_gib * _GIB)
    logger.info(
        "%s", f"nothing fits into {room_gib:g} GiB: lower phases.{phase}.images_per_gpu"
        if chosen is None else f"take {_as_options(chosen.kind)}",
    )  # fmt: skip
    logger.info("the best on other numbers of GPUs, at least one micro-batch on each:")
    logger.info("  %6s %-8s %s", "GPUs", "engine", header)
    for number in _SHOWN_GPUS:
        own = _shared_out(work, settings.images_per_step, images, number)
        fit = best([forecast(kind, number, cluster, own) for kind in KINDS], room_gib * _GIB)
        text = "nothing fits" if fit is None else _cells(fit, number, own, images, room_gib)
        logger.info("  %6d %-8s %s", number, "" if fit is None else fit.kind, text)


def _shared_out(work: Work, images_per_step: int | None, images_per_gpu: int, gpus: int) -> Work:
    """Return the work of one GPU; where there are more GPUs than micro-batches, one each."""
    lanes = 0 if images_per_step is None else images_per_step // images_per_gpu
    return dataclasses.replace(work, micro_batches=max(1, round(lanes / gpus)))


def _cells(row: Forecast, gpus: int, work: Work, images_per_gpu: int, room_gib: float) -> str:
    rate = gpus * work.micro_batches * images_per_gpu / row.step_seconds
    memory = row.memory_bytes / _GIB
    return (
        f"{row.step_seconds:6.3f}  {row.waiting_seconds:9.3f}  {row.efficiency:10.0%}  "
        f"{rate:8.0f}  {memory:11.1f}{'' if memory <= room_gib else '  does not fit'}"
    )


def _as_options(kind: str) -> str:
    if kind == "FSDP2":
        return "engine.kind=fsdp engine.zero_stage=null"
    return f"engine.kind=deepspeed engine.zero_stage={kind[-1]}"


def parse_cluster(gpus: str, link: str, latency: float) -> tuple[int, Cluster]:
    """Read ``8x16`` and ``nvlink,400gb``.

    Returns:
        The number of hosts, and what joins the GPUs.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", gpus)
    if match is None:
        raise ValueError(f"--gpus: found {gpus}, expected GPUs per host x hosts, such as 8x16.")
    names = link.split(",")
    if len(names) != 2:
        raise ValueError(
            f"--link: found {link}, expected two, inside and between hosts, such as nvlink,400gb."
        )
    inside, between = (link_speed(name) for name in names)
    cluster = Cluster(int(match[1]), inside, between, latency, torch.cuda.is_available())
    return int(match[2]), cluster


def measure_apart(options: argparse.Namespace) -> dict[str, float]:
    """Measure steps in a process of its own, so that its memory is that of the steps alone."""
    command = [sys.executable, "-m", "bigdet.plan", options.config, *options.overrides, "--measure"]
    command += ["--phase", options.phase] if options.phase else []
    logger.info("measuring %d steps on this device", _MEASURED_STEPS)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError("the steps could not be measured (see above); or give --step-seconds.")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(config: RunConfig, phase: str) -> dict[str, float]:
    """Take a few steps of one micro-batch on this device.

    Returns:
        ``seconds`` of one, the peak memory and the room of the device, GiB.
    """
    distributed.start()
    device = distributed.device()
    settings = config.phases[phase]
    train_set, _ = open_sets(config.data)
    stream = open_train_stream(
        train_set, config.data, settings,
        name=phase, with_masks=has_masks(phase_model(config, phase)), seed=config.seed,
        rank=0, world_size=1,
    )  # fmt: skip
    batches = [batch.to(device) for batch in islice(stream, _WARM_STEPS + _MEASURED_STEPS)]
    stream.close()
    with tempfile.TemporaryDirectory() as folder:
        # As if resumed: which weights it starts from changes nothing.
        classes = [category.name for category in train_set.categories]
        detector = build_for_phase(config, phase, classes, RunDir(Path(folder)), device, True)
    whole = dataclasses.replace(
        config.engine, kind="deepspeed", zero_stage=0, offload="none", clip_norm=None
    )
    make_optimizer = partial(optim.build_optimizer, phase=settings)
    engine = build_engine(detector, make_optimizer, whole, 1, device, detector.units)
    engine.set_lr(0.0)
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        engine.train_step([batch])
        seconds.append(time.perf_counter() - started)
    room = _room_gib(device)
    return {
        "seconds": statistics.median(seconds[_WARM_STEPS:]),
        "gib": peak_memory_gib(),
        "room_gib": room,
    }


def _room_gib(device: torch.device) -> float:
    """Memory of a device, or of this host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / _GIB
    words = Path("/proc/meminfo").read_text(encoding="ascii").split()
    return int(words[1]) * 1024 / _GIB


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bigdet.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options to change")
    parser.add_argument("--gpus", default="8x16", help="GPUs per host x hosts; default 8x16")
    parser.add_argument("--link", default="nvlink,400gb", help="inside, and between hosts per GPU")
    parser.add_argument("--latency", type=float, default=1e-5, help="of a message, s; default 1e-5")
    parser.add_argument("--phase", help="default: the first")
    parser.add_argument("--step-seconds", type=float, help="of a micro-batch on one GPU")
    parser.add_argument("--gpu-memory-gib", type=float, help="default: of this device")
    parser.add_argument(
        "--measure", action="store_true", help="only measure steps here, and write JSON"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_command(main)
