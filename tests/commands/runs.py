"""Runs of the training command on a tiny set, in processes of their own, for several test files."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = [
    "model.width=32", "model.fc_width=32", "model.rpn.train_proposals=50",
    "model.rpn.test_proposals=20", "model.roi.rois_per_image=16",
    "phases.pretrain.steps=6", "phases.pretrain.warmup_steps=2", "phases.pretrain.resize.size=64",
    "phases.finetune.steps=4", "phases.finetune.warmup_steps=1", "phases.finetune.resize.size=64",
    "phases.finetune.resize.cap=64", "phases.finetune.freeze_stages=2",
    "phases.pretrain.images_per_gpu=2", "phases.pretrain.images_per_step=8",
    "phases.finetune.images_per_gpu=2", "phases.finetune.images_per_step=8",
    "checkpoint.every=2", "log.every=1", "evaluation.pictures=1",
]  # fmt: skip


def arguments(output: Path, shards: Path, *more: str) -> list[str]:
    """The words of a command line for a tiny run."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    data = [f"data.train.shards={shards}/train", f"data.val.shards={shards}/val"]
    return [config, *TINY, *data, f"output={output}", *more]


def free_port() -> int:
    """A port that is not in use, below those that Linux gives to connections by itself."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def deepspeed(ranks: int) -> list[str]:
    """The training command under the deepspeed launcher."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*command, "--master_port", str(free_port()), "-m", "bigdet.train"]


def torchrun(ranks: int) -> list[str]:
    """The training command under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*command, "--master-port", str(free_port()), "-m", "bigdet.train"]


class Command:
    """One run of the training command in processes of its own.

    ``launcher`` is what starts ``bigdet.train``; by default nothing, or deepspeed for more ranks.
    """

    def __init__(
        self,
        output: Path,
        shards: Path,
        *more: str,
        ranks: int = 1,
        launcher: list[str] | None = None,
        variables: dict[str, str] | None = None,
    ):
        self.output = output
        if launcher is None:
            launcher = deepspeed(ranks) if ranks > 1 else [sys.executable, "-m", "bigdet.train"]
        command = [*launcher, *arguments(output, shards, *more)]
        plain = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **plain, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        printed, _ = self.process.communicate(timeout=300)
        return self.process.returncode, printed

    def wait_for(self, phase: str, step: int) -> None:
        """Wait until the log has a step."""
        deadline = time.monotonic() + 200
        while (phase, step) not in [(line["phase"], line["step"]) for line in self.lines()]:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def lines(self) -> list[dict]:
        file = self.output / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def kill(self) -> None:
        """SIGKILL to every process of the run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def numbers(output: Path) -> list[dict]:
    """The metrics that a repeated run must give again: all but time and memory.

    In the order of steps: AP is written when it is known, beside training.
    """
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: (line["cost/steps"], "bbox/AP" in line))
    volatile = ("images_per_second", "memory_gib", "goodput", "straggler/rank", "straggler/waiting")
    return [
        {k: value for k, value in line.items() if not (k in volatile or k.endswith("_seconds"))}
        for line in lines
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    assert numbers(output) == numbers(expected)
    own, other = weights(output), weights(expected)
    assert own.keys() == other.keys()
    different = [name for name in own if not torch.equal(own[name], other[name])]
    assert not different, different


def rank_processes(output: Path) -> dict[int, int]:
    """Process id of each rank of a run that a launcher started (not of its loader processes)."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        ranks = [int(value[5:]) for value in variables if value.startswith(b"RANK=")]
        if ranks and f"output={output}".encode() in words and b"bigdet.train" in b" ".join(words):
            pid = int(folder.name)  # the loader processes were forked from it, later
            found[ranks[0]] = min(pid, found.get(ranks[0], pid))
    return found


def loader_processes(rank_process: int) -> list[int]:
    """Process ids of what a rank has started."""
    children = Path(f"/proc/{rank_process}/task/{rank_process}/children")
    return [int(pid) for pid in children.read_text().split()]
