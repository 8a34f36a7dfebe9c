"""torchrun with a changing number of hosts: one dies, the other continues from a checkpoint."""

import os
import signal
import sys
import time
from pathlib import Path

from tests.commands.runs import Command, free_port, rank_processes


def test_the_agent_that_is_left_continues_alone(tmp_path: Path, shapes_shards: Path):
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node",
             "1", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "test",
             "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost",
             "--rdzv-conf", "last_call_timeout=5"]  # fmt: skip
    # As long as the second agent needs to be killed, and not much longer.
    more = ["phases.pretrain.steps=20", "phases.finetune.steps=2", "log.tensorboard=false"]
    output = tmp_path / "run"
    first = Command(output, shapes_shards, *more, launcher=[*agent, "-m", "bigdet.train"])
    time.sleep(1)  # the one that comes first keeps the store, and must not be the one that dies
    second = Command(output, shapes_shards, *more, launcher=[*agent, "-m", "bigdet.train"])
    try:
        first.wait_for("pretrain", 3)
        for process in rank_processes(output).values():
            if Path(f"/proc/{process}/stat").read_text().split()[3] == str(second.process.pid):
                os.kill(process, signal.SIGKILL)
        second.process.kill()
        code, printed = first.finish()
    finally:
        for process in (first.process, second.process):
            process.kill()
        for pid in rank_processes(output).values():
            os.kill(pid, signal.SIGKILL)
        second.process.communicate()
    assert code == 0, printed
    assert "1 ranks instead of 2: each runs 4 micro-batches of 2 per step instead of 2" in printed
    steps = [line["step"] for line in first.lines() if "loss/total" in line]
    assert steps == [*range(1, 21), 1, 2]
