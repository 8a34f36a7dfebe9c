"""Measures the time to the first step of a new and a resumed run, and what a save costs.

The training command is started, saves every ``--every`` steps, is stopped after ``--steps`` and
started again. ``to_first_step_seconds`` is from the start of the process to the first line of
``metrics.jsonl``, one step included; ``lost_seconds_per_save`` is the time of the copy, during
which training waits, and the slowdown of the steps while the copy is written;
``lost_part_of_a_step`` is that over the time of the 100 steps between two saves.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bigdet.config.phase import data_key
from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.manifest import MANIFEST_NAME, Manifest
from bigdet.data.format.shard_set import INDEX_NAME
from bigdet.data.making.shard_writer import index_bytes, manifest_text
from bigdet.run_dir import RunDir

STEPS_BETWEEN_SAVES = 100
SAVED = re.compile(r"copied in ([\d.]+) s, written [a-z ]+ in ([\d.]+) s")


def run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; return seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_dir = RunDir(folder / "run")
        more = [f"output={run_dir.root}", f"checkpoint.every={arguments.every}", "log.every=1"]
        if arguments.samples is not None:
            name = next(iter(config.phases))
            repeated = Path(phase_data(config, name).train.shards)
            repeat_samples(repeated, arguments.samples, folder / "shards")
            more.append(
                f"{data_key(name, config.phases[name], 'train')}.shards={folder / 'shards'}"
            )
        launcher = ["-m", "bigdet.train"]
        if arguments.ranks > 1:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(arguments.ranks),
                *launcher,
            ]
        command = [sys.executable, *launcher, str(arguments.config), *arguments.overrides, *more]
        fresh = _seconds_to_first_step(command, run_dir, arguments.steps)
        lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
        log = run_dir.log(0).read_text()
        resumed = _seconds_to_first_step(command, run_dir, 1)
    return {
        "what": "resume",
        "samples": arguments.samples,
        "ranks": arguments.ranks,
        "to_first_step_seconds": {"fresh": round(fresh, 2), "resumed": round(resumed, 2)},
        **_cost_of_saves(lines, log, arguments.every),
    }


def repeat_samples(folder: Path, samples: int, out: Path) -> None:
    """Make a shard set that repeats the samples of another one, without copying them."""
    manifest = Manifest.load(folder)
    index = np.load(folder / INDEX_NAME)
    out.mkdir()
    for shard in manifest.shards:
        (out / shard.file).symlink_to((folder / shard.file).resolve())
    content = index_bytes(np.resize(index, samples))
    (out / INDEX_NAME).write_bytes(content)
    repeated = replace(manifest, images=samples, index_sha256=None)
    (out / MANIFEST_NAME).write_text(manifest_text(repeated))


def _seconds_to_first_step(command: list[str], run_dir: RunDir, steps: int) -> float:
    """Start a run, stop it after some steps; give the seconds to its first one."""
    before = _last_step(run_dir)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        first = None
        while (last := _last_step(run_dir)) < before + steps:
            if process.poll() is not None:
                assert process.stderr is not None
                raise ValueError(f"the run ended early: {process.stderr.read().decode()[-2000:]}")
            if first is None and last > before:
                first = time.perf_counter() - started
            time.sleep(0.02)
        seconds = time.perf_counter() - started if first is None else first
        run_dir.stop.touch()
        process.communicate()
        return seconds
    finally:
        process.kill()


def _last_step(run_dir: RunDir) -> int:
    """Return the last step in ``metrics.jsonl``, 0 before the first."""
    if not run_dir.metrics.exists():
        return 0
    lines = run_dir.metrics.read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((line["step"] for line in whole), default=0)


def _cost_of_saves(lines: list[dict[str, Any]], log: str, every: int) -> dict[str, Any]:
    """Return what the saves cost, without the last one, which the stop waits for."""
    seconds = {line["step"]: line["time/step_seconds"] for line in lines if line["step"] > 1}
    saves = [(float(copy), float(write)) for copy, write in SAVED.findall(log)]
    during, losses = set(), []
    for number, (_, write) in enumerate(saves, start=1):
        step, left = number * every + 1, write
        while left > 0 and step in seconds:  # steps that run while this save is written
            during.add(step)
            left -= seconds[step]
            step += 1
    alone = statistics.median(value for step, value in seconds.items() if step not in during)
    copied = statistics.mean(copy for copy, _ in saves)
    losses = [seconds[step] - alone for step in during]
    lost = copied + max(0.0, sum(losses)) / len(saves)
    return {
        "saves": len(saves),
        "step_seconds": round(alone, 4),
        "copy_seconds": round(copied, 4),
        "write_seconds": round(statistics.mean(write for _, write in saves), 4),
        "lost_seconds_per_save": round(lost, 4),
        "lost_part_of_a_step": round(lost / (STEPS_BETWEEN_SAVES * alone), 4),
    }
