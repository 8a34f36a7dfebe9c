"""Find out which sizes and batches fit into a GPU, and which way of sharding to use on many GPUs.

Its command line is in ``cli/arguments/plan.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.plan import (
    BATCHES,
    CLASSES,
    DISK,
    GPUS,
    LATENCY,
    LINK,
    OBJECTS,
    SIZES,
    TRIALS,
    parse_arguments,
)
from bigdet.cli.running import answer_early

if __name__ == "__main__":
    answer_early(parse_arguments)

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Sequence

import torch

from bigdet.cli.running import run_command
from bigdet.config.engine import EngineConfig
from bigdet.config.load import check_phase, load_config
from bigdet.config.phase import PhaseConfig, data_key
from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.mix import open_train_set
from bigdet.logs.log import setup_logging
from bigdet.planning.cluster import (
    KINDS,
    SHARDED,
    Cluster,
    Forecast,
    Work,
    best,
    forecast,
    link_speed,
    state_bytes,
)
from bigdet.planning.device_report import report_devices
from bigdet.planning.memory import (
    Search,
    Setting,
    check_one_size,
    overrides,
    read_numbers,
    read_setting,
)
from bigdet.planning.trials import GIB, MEASURED_STEPS, Measured, run_trial, write_trial
from bigdet.training.sizes import model_sizes, optimizer_tensors

logger = logging.getLogger("bigdet.plan")  # __name__ is __main__ here

_TOLERANCE = 0.1
"""Relative error of a predicted memory that ``--check`` accepts."""
_SHOWN_GPUS = [8 << n for n in range(10)]  # 8 to 4096


def main(arguments: Sequence[str]) -> int:
    """Predict, write the tables and return the exit code."""
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    setup_logging(0)
    phase = options.phase or next(iter(config.phases))
    check_phase(config, phase)
    if options.measure:
        write_trial(config, phase, options.memory_gib)
        return 0
    if options.device is not None:
        plan_devices(config, phase, options)
        return 0
    train_set = open_train_set(phase_data(config, phase).train, config.data.cache)
    if options.memory_gib is not None:
        plan_memory(config, phase, train_set.num_classes, options)
        return 0
    hosts, cluster = _cluster(options)
    if options.step_seconds is None:
        words = [options.config, *options.overrides, "--phase", phase]
        logger.info("measuring %d steps on this device", MEASURED_STEPS)
        measured = run_trial(_measuring(words))
        if measured is None:
            raise ValueError(
                f"the steps ran out of memory on this device: lower phases.{phase}.images_per_gpu "
                f"(the gradient changes with it, see --options), or give --step-seconds."
            )
    else:
        measured = Measured(options.step_seconds, gib=0.0, room_gib=80.0, images_per_pass=0)
    room_gib = options.gpu_memory_gib or measured.room_gib
    sizes = model_sizes(config, phase, train_set.num_classes)
    work = Work(
        sizes,
        optimizer_tensors(config.phases[phase]),
        measured.seconds,
        activation_bytes=0.0,
        micro_batches=1,
    )
    if measured.gib:
        rest = measured.gib * GIB - state_bytes("ZeRO-0", 1, work)
        work = dataclasses.replace(work, activation_bytes=max(0.0, rest))
    _write_tables(config, phase, hosts, cluster, work, room_gib, bool(measured.gib))
    return 0


def _write_tables(
    config: RunConfig,
    phase: str,
    hosts: int,
    cluster: Cluster,
    work: Work,
    room_gib: float,
    knows_activations: bool,
) -> None:
    """Log what was measured, all engines on the given GPUs, and the best on other numbers."""
    settings = config.phases[phase]
    gpus = hosts * cluster.gpus_per_host
    work = _shared_out(work, settings.images_per_step, settings.images_per_gpu, gpus)
    images = settings.images_per_gpu
    logger.info(
        "phase %s: %.1f M weights, %.1f M trained; a micro-batch of %d images takes %.3f s; "
        "memory %s",
        phase,
        work.sizes.parameters / 1e6,
        work.sizes.trained / 1e6,
        images,
        work.micro_batch_seconds,
        f"{work.activation_bytes / GIB:.1f} GiB besides weights, gradients and optimizer"
        if knows_activations
        else "without activations (not measured)",
    )
    logger.info(
        "%d GPUs, %d images per step (%d micro-batches of %d on each):",
        gpus,
        gpus * work.micro_batches * images,
        work.micro_batches,
        images,
    )
    header = "step s  waiting s  efficiency  images/s  GiB per GPU  GB inside  GB between"
    logger.info("  %-8s %s", "engine", header)
    rows = [forecast(kind, gpus, cluster, work, config.engine) for kind in KINDS]
    for row in rows:
        logger.info("  %-8s %s", row.kind, _cells(row, gpus, work, images, room_gib))
    chosen = best(rows, room_gib * GIB)
    logger.info(
        "%s",
        f"nothing fits into {room_gib:g} GiB: lower phases.{phase}.images_per_gpu (the "
        "gradient changes with it, see --options)"
        if chosen is None
        else f"use {_as_options(chosen.kind)}",
    )
    logger.info(
        "GB are sent per step, inside a host by each GPU, between hosts by each host%s",
        _choices(config.engine),
    )
    logger.info("the best on other numbers of GPUs, at least one micro-batch on each:")
    logger.info("  %6s %-8s %s", "GPUs", "engine", header)
    for number in _SHOWN_GPUS:
        own = _shared_out(work, settings.images_per_step, images, number)
        fit = best(
            [forecast(kind, number, cluster, own, config.engine) for kind in KINDS], room_gib * GIB
        )
        text = "nothing fits" if fit is None else _cells(fit, number, own, images, room_gib)
        logger.info("  %6d %-8s %s", number, "" if fit is None else fit.kind, text)


def _choices(engine: EngineConfig) -> str:
    """Name what a config says of the engines that divide weights, unless it is the default."""
    names = ("shard_over", "gather_precision", "reduce_precision")
    chosen = [
        f"engine.{name}={value}"
        for name in names
        if (value := getattr(engine, name)) not in (None, "all", "fp32")
    ]
    return f"; {' and '.join(SHARDED)} with {', '.join(chosen)}" if chosen else ""


def _shared_out(work: Work, images_per_step: int | None, images_per_gpu: int, gpus: int) -> Work:
    """Return the work with its micro-batches divided among the GPUs, at least one each."""
    lanes = 0 if images_per_step is None else images_per_step // images_per_gpu
    return dataclasses.replace(work, micro_batches=max(1, round(lanes / gpus)))


def _cells(row: Forecast, gpus: int, work: Work, images_per_gpu: int, room_gib: float) -> str:
    rate = gpus * work.micro_batches * images_per_gpu / row.step_seconds
    memory = row.memory_bytes / GIB
    return (
        f"{row.step_seconds:6.3f}  {row.waiting_seconds:9.3f}  {row.efficiency:10.0%}  "
        f"{rate:8.0f}  {memory:11.1f}  {row.traffic.inside / 1e9:9.2f}  "
        f"{row.traffic.between / 1e9:10.2f}{'' if memory <= room_gib else '  does not fit'}"
    )


def _as_options(kind: str) -> str:
    if kind == "FSDP2":
        return "engine.kind=fsdp engine.zero_stage=null"
    return f"engine.kind=deepspeed engine.zero_stage={kind[-1]}"


def _cluster(options: argparse.Namespace) -> tuple[int, Cluster]:
    latency = LATENCY if options.latency is None else options.latency
    return parse_cluster(options.gpus or GPUS, options.link or LINK, latency)


def _measuring(words: Sequence[str]) -> list[str]:
    """Return this command, with other words, that only measures."""
    return [sys.executable, "-m", "bigdet.plan", *words, "--measure"]


def parse_cluster(gpus: str, link: str, latency: float) -> tuple[int, Cluster]:
    """Read ``8x16`` and ``nvlink,400gb``.

    Returns:
        The number of hosts, and how the GPUs are connected.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", gpus)
    if match is None:
        raise ValueError(f"--gpus: found {gpus}, expected GPUs per host x hosts, such as 8x16.")
    names = link.split(",")
    if len(names) != 2:
        raise ValueError(
            f"--link: found {link}, expected two links, inside and between hosts, such as "
            f"nvlink,400gb."
        )
    inside, between = (link_speed(name) for name in names)
    cluster = Cluster(int(match[1]), inside, between, latency, torch.cuda.is_available())
    return int(match[2]), cluster


def plan_devices(config: RunConfig, phase: str, options: argparse.Namespace) -> None:
    """Write what a phase needs on GPUs that are not there; see ``planning/devices.py``."""
    classes = options.classes
    if classes is None:
        try:
            train = phase_data(config, phase).train
            classes = open_train_set(train, config.data.cache).num_classes
        except (ValueError, OSError):
            classes = CLASSES
            logger.warning(
                "%s.shards: no shard set could be opened, so the number of classes is not known: "
                "planning with %d. --classes gives another.",
                data_key(phase, config.phases[phase], "train"),
                CLASSES,
            )
    report_devices(
        config,
        phase,
        devices=options.device,
        gpus=read_numbers("--gpus", options.gpus or "1"),
        num_classes=classes,
        num_objects=options.objects or OBJECTS,
        disk=1e9 * (options.disk or DISK),
    )


def plan_memory(
    config: RunConfig, phase: str, num_classes: int, options: argparse.Namespace
) -> None:
    """Find the largest settings that fit, write them, and measure that of ``--check``."""
    settings = config.phases[phase]
    check_one_size(phase, settings)
    sizes = read_numbers("--sizes", options.sizes or SIZES)
    batches = read_numbers("--batches", options.batches or BATCHES)
    checked = None if options.check is None else read_setting(options.check)
    for size in [*sizes, *([checked.size] if checked else [])]:
        words = overrides(phase, settings, Setting(size, batches[0]))
        load_config(options.config, [*options.overrides, *words])
    gpus, shift_gib = 1, 0.0
    if options.gpus is not None:
        hosts, cluster = _cluster(options)
        gpus = hosts * cluster.gpus_per_host
        sizes_of_model = model_sizes(config, phase, num_classes)
        work = Work(sizes_of_model, optimizer_tensors(settings), 0.0, 0.0, 1)
        kind = "FSDP2" if config.engine.kind == "fsdp" else f"ZeRO-{config.engine.zero_stage}"
        there = state_bytes(kind, gpus, work, cluster.gpus_per_host, config.engine)
        shift_gib = (there - state_bytes(kind, 1, work)) / GIB

    def take(setting: Setting) -> Measured | None:
        words = overrides(phase, settings, setting)
        return run_trial(
            _measuring(
                [
                    options.config,
                    *options.overrides,
                    *words,
                    "--phase",
                    phase,
                    "--memory-gib",
                    str(options.memory_gib),
                ]
            )
        )

    logger.info("phase %s: measuring settings (size x images per GPU) on this device", phase)
    search = Search(sizes, batches, options.memory_gib, take, shift_gib)
    search.run(options.trials or TRIALS)
    _write_boundary(search, phase, settings, gpus)
    if checked is not None:
        _check(search, checked)


def _write_boundary(search: Search, phase: str, settings: PhaseConfig, gpus: int) -> None:
    """Write the largest settings: as a table to the log, as options to standard output."""
    boundary = search.boundary()
    if not boundary:
        raise ValueError(
            f"not even size {search.sizes[0]} with {search.batches[0]} images per GPU fits into "
            f"{search.room_gib:g} GiB. Give smaller --sizes or --batches, "
            f"engine.activation_checkpointing=true, engine.precision=bf16 or another engine."
        )
    logger.info(
        "the largest settings of the grid that fit into %g GiB%s:",
        search.room_gib,
        f" of each of {gpus} GPUs" if gpus > 1 else "",
    )
    logger.info("  size  images per GPU (most)    GiB  s per image  GPU hours per pass")
    per_pass = next(iter(search.known().values())).images_per_pass
    for one in boundary:
        found = search.measured.get(one)
        step = search.predicted_seconds(one) if found is None else found.seconds
        seconds = step / one.images
        logger.info(
            "  %4d  %14d %6s  %5.2f  %11.4f  %18.3f  %s",
            one.size,
            one.images,
            f"({search.most_images(one.size)})",
            search.memory_gib(one),
            seconds,
            seconds * per_pass / 3600,
            "predicted" if found is None else "measured",
        )
    for one in boundary:
        sys.stdout.write(" ".join(overrides(phase, settings, one)) + "\n")
    sys.stdout.flush()


def _check(search: Search, setting: Setting) -> None:
    """Measure a setting, and compare it with what was predicted from the others.

    Raises:
        ValueError: the prediction is off by more than a tenth.
    """
    tried = search.measured.pop(setting, None)
    gib, seconds = search.predicted_gib(setting), search.predicted_seconds(setting)
    found = tried or search.take(setting)
    if found is None:
        raise ValueError(f"--check {setting}: out of memory; {gib:.2f} GiB were predicted.")
    measured_gib = found.gib + search.shift_gib
    error = gib / measured_gib - 1
    logger.info(
        "check %s: memory predicted %.3f GiB, measured %.3f (%+.1f%%); seconds of a step "
        "predicted %.3f, measured %.3f (%+.1f%%)",
        setting,
        gib,
        measured_gib,
        100 * error,
        seconds,
        found.seconds,
        100 * (seconds / found.seconds - 1),
    )
    if abs(error) > _TOLERANCE:
        raise ValueError(
            f"--check {setting}: the predicted memory is off by {error:+.1%}, more than "
            f"{_TOLERANCE:.0%}. Raise --trials, or give --sizes and --batches closer to {setting}."
        )


if __name__ == "__main__":
    run_command(main)
