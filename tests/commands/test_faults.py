"""What befalls a run of two ranks: killed ranks, launchers that end, stalls, numbers not finite."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.runs import (
    Command,
    deepspeed,
    loader_processes,
    rank_processes,
    torchrun,
)

ENDLESS = ["phases.pretrain.steps=100000", "checkpoint.every=100000", "log.tensorboard=false"]
LAUNCHERS = [deepspeed, torchrun]


def assert_nothing_runs(output: Path) -> None:
    deadline = time.monotonic() + 30
    while rank_processes(output):
        assert time.monotonic() < deadline, rank_processes(output)
        time.sleep(0.1)


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "error: " in line or "error (rank" in line]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_others_with_the_reason(
    tmp_path: Path, shapes_shards: Path, launcher: Callable[[int], list[str]]
):
    run = Command(tmp_path / "run", shapes_shards, *ENDLESS, launcher=launcher(2))
    run.wait_for("pretrain", 2)
    killed = time.monotonic()
    os.kill(rank_processes(run.output)[1], signal.SIGKILL)
    code, printed = run.finish()
    assert time.monotonic() - killed < 60
    assert code not in (0, 75)
    (message,) = errors(printed)
    assert "lost the connection to another rank" in message
    assert "pretrain step " in message
    assert "Traceback" not in message
    assert_nothing_runs(run.output)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher_stops_all_ranks_with_a_checkpoint(
    tmp_path: Path, shapes_shards: Path, launcher: Callable[[int], list[str]]
):
    run = Command(tmp_path / "run", shapes_shards, *ENDLESS, launcher=launcher(2))
    run.wait_for("pretrain", 2)
    asked = time.monotonic()
    run.process.terminate()
    _, printed = run.finish()  # until the last rank has closed what it prints to
    assert time.monotonic() - asked < 30, printed
    assert_nothing_runs(run.output)
    last = run.lines()[-1]["step"]
    assert (run.output / "checkpoints/latest").read_text().strip() == f"pretrain-{last}"
    assert (run.output / "stopped").read_text() == f"pretrain step {last}\n"
    for rank in range(2):
        log = (run.output / f"logs/rank-{rank}.log").read_text()
        assert f"stopped on request at pretrain step {last}" in log


def test_sigterm_to_all_ranks_stops_them_with_75(tmp_path: Path, shapes_shards: Path):
    run = Command(tmp_path / "run", shapes_shards, *ENDLESS, ranks=2)
    run.wait_for("pretrain", 2)
    for process in rank_processes(run.output).values():
        os.kill(process, signal.SIGTERM)
    code, printed = run.finish()
    assert code == 75, printed
    last = run.lines()[-1]["step"]
    assert (run.output / "checkpoints/latest").read_text().strip() == f"pretrain-{last}"


def test_a_rank_that_stalls_ends_the_run_and_every_rank_says_where_it_is(
    tmp_path: Path, shapes_shards: Path
):
    more = [*ENDLESS, "data.workers=1", "log.stall_seconds=12"]
    run = Command(tmp_path / "run", shapes_shards, *more, ranks=2)
    run.wait_for("pretrain", 2)
    loaders = loader_processes(rank_processes(run.output)[1])
    for process in loaders:
        os.kill(process, signal.SIGSTOP)
    stalled = time.monotonic()
    try:
        run.process.wait(200)
    finally:
        for process in loaders:  # one that is stopped does not notice that its rank is gone
            os.kill(process, signal.SIGKILL)
    code, printed = run.finish()
    assert time.monotonic() - stalled < 12 + 5 + 40
    assert code == 1, printed
    logs = [(run.output / f"logs/rank-{rank}.log").read_text() for rank in range(2)]
    assert "data is ready, waiting for the other ranks: no progress for 12 s" in logs[0]
    assert "waiting for data: no progress for 12 s" in logs[1]
    for log in logs:
        assert "pretrain step " in log
        assert "training/loop.py" in log  # the stack
    assert_nothing_runs(run.output)


def test_steps_that_are_not_finite_are_skipped_on_all_ranks_and_stop_the_run_at_the_limit(
    tmp_path: Path, shapes_shards: Path
):
    # A rate of 1e30 makes weights that overflow: all steps but the first ones fail, for real.
    more = ["phases.pretrain.lr=1e30", "phases.pretrain.warmup_steps=0", "engine.max_bad_steps=2"]
    more += ["checkpoint.every=1", "checkpoint.keep=9"]
    run = Command(tmp_path / "run", shapes_shards, *more, ranks=2)
    code, printed = run.finish()
    assert code == 1
    (message,) = errors(printed)
    lines = run.lines()
    bad = [line["bad_steps"] for line in lines]
    assert bad[0] == 0
    assert bad[-1] == 2
    good = [line for line in lines if line["grad_norm"] is not None]
    assert len(good) == len(lines) - 2
    last = (run.output / "checkpoints/latest").read_text().strip()
    assert f"Last good checkpoint: {run.output}/checkpoints/{last}." in message
    assert "more than engine.max_bad_steps" in message
    for rank in range(2):
        log = (run.output / f"logs/rank-{rank}.log").read_text()
        assert log.count("not finite, step skipped") == 3
        assert "images of this rank: [" in log


def test_a_checkpoint_cut_short_is_named_and_the_one_before_continues(
    tmp_path: Path, shapes_shards: Path
):
    output = tmp_path / "run"
    more = ["phases.pretrain.steps=9", "checkpoint.keep=9"]
    run = Command(output, shapes_shards, *more)
    run.wait_for("pretrain", 5)
    run.kill()
    newest, before = output / "checkpoints/pretrain-4", output / "checkpoints/pretrain-2"
    (file,) = newest.glob("pieces-*")
    file.write_bytes(file.read_bytes()[:-10])
    code, printed = Command(output, shapes_shards, *more).finish()
    assert code == 1
    (message,) = errors(printed)
    assert str(file) in message
    assert f"Go on with resume={before}" in message
    code, printed = Command(output, shapes_shards, *more, f"resume={before}").finish()
    assert code == 0, printed
    steps = [line["step"] for line in run.lines() if line["phase"] == "pretrain"]
    assert steps == [*range(1, 10), 9]
