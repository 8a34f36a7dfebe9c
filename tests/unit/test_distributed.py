import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bigdet import distributed
from tests.commands.runs import free_port

ROOT = Path(__file__).parents[2]
MEET = (
    "from bigdet import distributed as d; import torch; d.start(); "
    "print(d.rank(), d.world_size(), d.local_rank(), int(d.sum_over_ranks(torch.ones(()))), "
    "flush=True); import os; os._exit(0)"
)
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}


def python(text: str, **variables: str) -> subprocess.Popen:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env={**plain, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=100)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7],gpu[9]", "gpu7"),
        ("alone", "alone"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]node[4,5]-ib,q", "rack1node4-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list_is_the_meeting_place(node_list: str, host: str):
    assert distributed.first_host(node_list) == host


@pytest.mark.parametrize(
    ("stall_seconds", "seconds"),
    [("None", 1800), ("1200.0", 1800), ("7200.0", 7260), ("math.inf", 365 * 86400)],
)
def test_gloo_waits_no_less_than_the_watchdog(stall_seconds: str, seconds: int):
    """Also in groups that an engine makes later."""
    code = (
        "import math, os, torch; from bigdet import distributed as d\n"
        f"d.start({stall_seconds})\n"
        "torch.distributed.new_group([0]); d.limit_waiting()\n"
        "for group in torch.distributed.distributed_c10d._world.pg_map:\n"
        "    gloo = group._get_backend(torch.device('cpu'))\n"
        "    print(int(gloo.options._timeout.total_seconds()), flush=True)\n"
        "os._exit(0)"
    )
    assert outputs([python(code, CUDA_VISIBLE_DEVICES="")]) == [f"{seconds}\n{seconds}"]


def test_tasks_of_srun_meet():
    tasks = [
        python(
            MEET,
            **SLURM,
            SLURM_NTASKS="2",
            SLURM_STEP_NUM_TASKS="2",
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]
    assert outputs(tasks) == ["0 2 0 2", "1 2 1 2"]


def test_ranks_of_mpirun_meet():
    port = str(free_port())  # else one of the job, which another test may use
    ranks = [
        python(
            MEET,
            MASTER_PORT=port,
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_LOCAL_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    assert outputs(ranks) == ["0 2 0 2", "1 2 1 2"]


def test_python_without_srun_in_a_job_of_several_tasks_is_refused():
    (printed,) = outputs([python(MEET, SLURM_NTASKS="8")])
    assert "ValueError: Slurm gave this job 8 tasks, but python was started without srun" in printed


def test_a_rank_that_does_not_come_is_named_by_rank_0_alone():
    code = (
        "from bigdet.cli.running import run_command; from bigdet import distributed\n"
        "distributed.START_SECONDS = 0.5\n"
        "run_command(lambda words: distributed.start())"
    )
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12345"}
    came = [
        python(code, **variables, BIGDET_JOIN_SECONDS="5", RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (0, 2)
    ]
    told, silent = outputs(came)
    assert told.startswith("error: only 2 of 3 ranks connected within 5 s"), told
    assert "missing: 1." in told
    assert len(told.splitlines()) == 1
    assert silent == ""


def test_a_rank_that_prints_no_error_ends_after_the_one_that_does():
    """Launchers end all ranks as soon as one ends, so that the message would be lost."""
    code = (
        "import bigdet.distributed, signal; from bigdet.cli.running import run_command\n"
        "def main(words):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    print('raises', flush=True)\n"
        "    raise ValueError('a wrong key')\n"
        "run_command(main)"
    )
    silent = python(code, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    try:
        assert silent.stdout is not None
        assert silent.stdout.readline() == "raises\n"
        while silent.poll() is None:
            silent.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                silent.wait(0.05)
    finally:
        silent.kill()
        printed = silent.communicate()[0]
    assert silent.returncode == -signal.SIGTERM
    assert printed == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, r"WORLD_SIZE is 2, but MASTER_ADDR is not set\. Start all ranks with deepspeed"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT: found not set, expected a number"),
        (
            {"MASTER_ADDR": "localhost", "BIGDET_JOIN_SECONDS": "soon"},
            "BIGDET_JOIN_SECONDS: found so",
        ),
    ],
)
def test_a_launch_that_is_half_one_is_reported_and_does_not_wait(monkeypatch, variables, said):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.start()
