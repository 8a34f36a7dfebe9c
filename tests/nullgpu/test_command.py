"""The training command on a GPU that does nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.commands.runs import Command

OPTIONS = [
    "phases.pretrain.steps=4", "phases.finetune.steps=2", "phases.pretrain.images_per_step=4",
    "phases.finetune.images_per_step=4", "engine.precision=bf16", "data.workers=1",
    "device.cuda_graphs=true",  # of the first phase, whose canvases have one shape
    "device.expandable_segments=false",  # needs an allocator that only a driver has
]  # fmt: skip


def test_a_run_of_two_phases_is_killed_and_resumed(
    tmp_path: Path, shapes_shards: Path, null_gpu_variables: dict[str, str]
) -> None:
    launcher = [sys.executable, "-m", "tests.nullgpu.command", "bigdet.train"]

    def start() -> Command:
        variables = null_gpu_variables
        return Command(tmp_path, shapes_shards, *OPTIONS, launcher=launcher, variables=variables)

    run = start()
    run.wait_for("pretrain", 3)
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoints" / "latest").is_file():  # a thread writes it
        assert run.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run = start()
    code, printed = run.finish()
    assert code == 0, printed
    assert "continuing from" in printed
    steps = [(line["phase"], line["step"]) for line in run.lines() if "lr" in line]
    assert steps == [("pretrain", n) for n in (1, 2, 3, 4)] + [("finetune", n) for n in (1, 2)]
    assert (tmp_path / "model.safetensors").is_file()
    starts = json.loads((tmp_path / "environment.json").read_text())
    for environment in starts:
        assert environment["device"] == "null GPU"
        assert environment["TF32"] == "on"
        assert environment["allocator"] == "torch's own"
