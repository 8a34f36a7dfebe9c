"""Checks before a long run: ``bigdet train CONFIG --doctor``, under any launcher.

Every rank examines its own host; rank 0 compares the results and writes a table, one row per check.
What fails here would later fail, hang, or train on something other than intended.
"""

from __future__ import annotations

import logging
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from bigdet import distributed
from bigdet.config.load import dump_config
from bigdet.config.model import has_masks
from bigdet.config.resize import largest_plan
from bigdet.config.run import RunConfig, phase_model
from bigdet.data.examples.collate import group_bytes
from bigdet.data.format.class_counts import class_lines
from bigdet.data.format.phase_sets import open_phase_sets, phases_by_sets
from bigdet.data.streams.reading import PREFETCHED_GROUPS
from bigdet.host import locks
from bigdet.host.files import check_folder
from bigdet.host.limits import host_memory
from bigdet.run_dir import RunDir
from bigdet.training import resume
from bigdet.training import same_hosts as hosts
from bigdet.training.data_checks import check_data
from bigdet.training.sizes import FP32_BYTES, ModelSizes, checkpoint_bytes, model_sizes

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_LATENCY_ROUNDS = 20
_SPEED_ROUNDS = 4


@dataclass
class Facts:
    """What one rank found on its host.

    Attributes:
        device: name of the GPU, or cpu.
        software: versions and the hash of the code.
        inputs: hashes of the config and of each shard set, by name.
        problems: by check, what cannot be read, written or divided among the ranks.
        classes: number of classes of each phase, empty if the data cannot be read.
        objects: by set, a line with the number of objects per class, and warnings.
        free_disk, free_shm, free_memory: free bytes where the run is written and in ``/dev/shm``,
            and bytes that processes may still take; None where the system does not report it.
    """

    host: str
    device: str
    software: dict[str, str]
    inputs: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    objects: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    free_disk: int = 0
    free_shm: int | None = 0
    free_memory: int | None = 0


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    found: str
    is_ok: bool = True
    warnings: list[str] = field(default_factory=list)


def examine(config: RunConfig) -> int:
    """Check hosts, data, ranks, memory and collectives, and write the table (a collective).

    Returns:
        0 when all is well, 1 when a row says FAIL.
    """
    everywhere = distributed.gather_objects(find_facts(config))
    speed = measure_collectives(distributed.device())
    rows: list[Row] = []
    if distributed.is_main():
        rows = [
            *compare(everywhere),
            *memory_rows(config, everywhere),
            disk_row(config, everywhere[0]),
        ]
        rows.append(_speed_row(config, everywhere[0], speed))
        rows.append(command_row(Path(sysconfig.get_path("scripts"), "deepspeed")))
        width = max(18, *(len(row.check) for row in rows))
        for row in rows:
            check = f"{row.check:{width}}"
            logger.info("%-4s  %s  %s", "ok" if row.is_ok else "FAIL", check, row.found)
            for warning in row.warnings:
                logger.warning("%-4s  %s  %s", "warn", check, warning)
        failed, warned = sum(not row.is_ok for row in rows), sum(bool(r.warnings) for r in rows)
        verdict = f"{failed} of {len(rows)} checks failed" if failed else "all is well"
        if warned:
            verdict = verdict if failed else "nothing fails"
            verdict += f"; {warned} of {len(rows)} checks warn"
        logger.info("%s", verdict)
    return distributed.broadcast_object(int(not all(row.is_ok for row in rows)))


def find_facts(config: RunConfig) -> Facts:
    """Examine this rank's host; problems are recorded, not raised (not a collective)."""
    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = Facts(socket.gethostname(), name, hosts.software())
    facts.inputs["config"] = hosts.text_hash(dump_config(config))
    run_dir = RunDir(Path(config.output))

    def note(check: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (ValueError, OSError) as error:
            facts.problems[check] = str(error)

    def look_at_data() -> None:
        sets = open_phase_sets(config)
        by_sets = phases_by_sets(sets)
        for data, names in by_sets.items():
            whose = f" of {', '.join(names)}" * (len(by_sets) > 1)
            for what, shards in (("training", data.train), ("validation", data.val)):
                facts.inputs[f"{what} shards{whose}"] = shards.index_hash()[: hosts.SHOWN_HASH]
            learned, measured = (
                class_lines(data.train, "learned"),
                class_lines(data.val, "measured"),
            )
            facts.objects[f"training objects{whose}"] = learned
            facts.objects[f"validation objects{whose}"] = measured
        facts.classes = {name: data.train.num_classes for name, data in sets.items()}
        check_data(config, sets)
        # As a run does, unless another check has already found why it cannot.
        settled = config if facts.problems else resume.settle_config(config, None, None, sets)
        resume.check_phases(settled, sets, None)

    def look_at_output() -> None:
        if distributed.is_main():
            locks.refuse_held(run_dir.root, run_dir.lock)
        check_folder(run_dir.root, "output")
        facts.free_disk = shutil.disk_usage(run_dir.root).free

    def divide_steps() -> None:
        resume.settle_config(config, None, None)

    note("images per step", divide_steps)
    note("data", look_at_data)
    note("output", look_at_output)
    shm = Path("/dev/shm")
    facts.free_shm = shutil.disk_usage(shm).free if shm.is_dir() else None
    facts.free_memory = host_memory().available
    return facts


def compare(everywhere: list[Facts]) -> list[Row]:
    """Return rows on what all ranks have in common, and on what failed on any of them."""
    names = list(dict.fromkeys(facts.host for facts in everywhere))
    devices = sorted({facts.device for facts in everywhere})
    ranks = f"{len(everywhere)} on {len(names)} hosts ({_some(names)}), {', '.join(devices)}"
    rows = [Row("ranks", ranks, len(devices) == 1)]
    for kind in ("software", "inputs"):
        values = [(facts.host, getattr(facts, kind)) for facts in everywhere]
        known = set.intersection(*(set(own) for _, own in values))
        values = [(host, {key: own[key] for key in own if key in known}) for host, own in values]
        differing = hosts.differences(values)
        rows += [
            Row(name, differing.get(name, f"{value} everywhere"), name not in differing)
            for name, value in values[0][1].items()
        ]
    for check in ("images per step", "data", "output"):
        found = [(facts.host, facts.problems.get(check)) for facts in everywhere]
        bad = next(((host, text) for host, text in found if text is not None), None)
        good = {
            "images per step": "the ranks share every step equally",
            "data": "data sets, phases and initial weights fit together",
            "output": "can be written on every host",
        }[check]
        rows.append(Row(check, good if bad is None else f"{bad[0]}: {bad[1]}", bad is None))
    objects = everywhere[0].objects.items()
    return rows + [Row(check, line, warnings=warnings) for check, (line, warnings) in objects]


def command_row(command: Path) -> Row:
    """Report which ``deepspeed`` command is installed; DeepSpeed's own does not accept ``-m``."""
    if not command.is_file():
        return Row(
            "deepspeed command", f"none at {command}; start with torchrun, or reinstall bigdet"
        )
    if b"bigdet.cli.deepspeed" in command.read_bytes():
        return Row("deepspeed command", "accepts -m and --module")
    return Row(
        "deepspeed command",
        "DeepSpeed's own, installed after bigdet's: it accepts --module, not -m. pip install "
        "--force-reinstall --no-deps bigdet (or its source folder) restores -m",
    )


def measure_collectives(device: torch.device) -> tuple[float, float, bool]:
    """Time all-reduce over all ranks (a collective).

    Returns:
        Seconds of a small one; bytes per second on each rank's link in a large one, of which a link
        carries ``2 (n - 1) / n`` of the bytes; whether the sums were right.
    """
    size = distributed.world_size()
    if size == 1:
        return 0.0, 0.0, True

    def seconds(numel: int, rounds: int) -> tuple[float, bool]:
        is_right = True
        for attempt in range(rounds + 1):
            tensor = torch.full((numel,), float(distributed.rank() + 1), device=device)
            if attempt == 1:
                distributed.barrier()
                started = time.perf_counter()
            dist.all_reduce(tensor)
            is_right &= bool(tensor[-1].item() == size * (size + 1) / 2)
        return (time.perf_counter() - started) / rounds, is_right

    numel = (256 if device.type == "cuda" else 16) * (1 << 20) // FP32_BYTES
    latency, small_is_right = seconds(1, _LATENCY_ROUNDS)
    large, large_is_right = seconds(numel, _SPEED_ROUNDS)
    carried = 2 * (size - 1) / size * numel * FP32_BYTES
    return latency, carried / large, small_is_right and large_is_right


def _speed_row(config: RunConfig, facts: Facts, speed: tuple[float, float, bool]) -> Row:
    latency, bytes_per_second, is_right = speed
    if distributed.world_size() == 1:
        return Row("all-reduce", "one rank: nothing to send")
    text = f"{bytes_per_second / 1e9:.2f} GB/s per rank, {latency * 1e6:.0f} us for one number"
    if facts.classes:
        sizes = _largest(config, facts.classes)[1]
        size = distributed.world_size()
        seconds = 2 * (size - 1) / size * FP32_BYTES * sizes.trained / bytes_per_second
        text += f"; gradients of {sizes.trained / 1e6:.1f} M weights take {seconds:.3f} s per step"
    return Row("all-reduce", text if is_right else f"wrong sums; {text}", is_right)


def memory_rows(config: RunConfig, everywhere: list[Facts]) -> list[Row]:
    """Compare the memory that loader processes or threads of a host take with what is free."""
    group = max(
        group_bytes(
            phase.images_per_gpu,
            largest_plan(phase.resize),
            with_masks=has_masks(phase_model(config, name)),
        )
        for name, phase in config.phases.items()
    )
    rows = []
    for check, groups, name in (
        # A group that outgrows its slot travels through /dev/shm (data/streams/slots.py).
        ("/dev/shm", 1, "free_shm"),
        ("loader memory", PREFETCHED_GROUPS + 1, "free_memory"),
    ):
        if name == "free_shm" and config.data.worker_kind == "threads":
            continue
        scarce: list[str] = []
        for host in dict.fromkeys(facts.host for facts in everywhere):
            own = [facts for facts in everywhere if facts.host == host]
            needed = len(own) * config.data.workers * groups * group
            free = getattr(own[0], name)
            if free is not None and free < needed:
                scarce.append(f"{host}: {free / _GIB:.2f} of {needed / _GIB:.2f} GiB")
        known = [free for facts in everywhere if (free := getattr(facts, name)) is not None]
        found = f"{min(known) / _GIB:.2f} GiB free" if known else "unknown on this system"
        if scarce:
            found = "; ".join(scarce) + ". Lower data.workers."
        rows.append(Row(check, found, not scarce))
    return rows


def disk_row(config: RunConfig, facts: Facts) -> Row:
    """Compare the size of the run's checkpoints with the free space (rank 0 writes them)."""
    if not facts.classes:
        return Row("disk", "unknown: the training set cannot be read", is_ok=False)
    name, sizes = _largest(config, facts.classes)
    one = checkpoint_bytes(sizes, config.phases[name])
    # The newest, the best, the ends of phases, and the one that is being written.
    number = config.checkpoint.keep + 1 + len(config.phases) + 1
    text = (
        f"{number} checkpoints of {one / _GIB:.2f} GiB need {number * one / _GIB:.2f}, "
        f"{facts.free_disk / _GIB:.2f} GiB are free"
    )
    return Row("disk", text, facts.free_disk >= number * one)


def _largest(config: RunConfig, classes: dict[str, int]) -> tuple[str, ModelSizes]:
    """Return the phase with the largest checkpoints, and the sizes of its model."""
    sizes = {name: model_sizes(config, name, number) for name, number in classes.items()}
    name = max(sizes, key=lambda name: checkpoint_bytes(sizes[name], config.phases[name]))
    return name, sizes[name]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
