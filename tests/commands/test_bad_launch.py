"""What is wrong with a launch is reported once, by one rank, before the first step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bigdet.host import locks
from bigdet.run_dir import RunDir
from tests.commands.runs import ROOT, arguments, free_port


def messages_of_two_ranks(
    folder: Path, shards: Path, *more: str, code_of_rank_1: Path = ROOT
) -> list[str]:
    """Run two ranks, each in a folder of its own; return what they print as errors."""
    port = free_port()
    processes = []
    for rank, code in enumerate([ROOT, code_of_rank_1]):
        variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "PYTHONPATH": code}
        (folder / f"host-{rank}").mkdir(exist_ok=True)
        words = arguments(folder / "run", shards, *more)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "bigdet.train", *words],
                cwd=folder / f"host-{rank}",
                env={**os.environ, **{key: str(value) for key, value in variables.items()}},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        printed = "".join(process.communicate(timeout=120)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], printed
    assert "Traceback" not in printed
    assert not (folder / "run/metrics.jsonl").exists()
    return [line for line in printed.splitlines() if line.startswith("error")]


def test_more_ranks_than_micro_batches_are_reported(tmp_path: Path, shapes_shards: Path):
    wrong = "phases.pretrain.images_per_step=2"
    (message,) = messages_of_two_ranks(tmp_path, shapes_shards, wrong)
    assert "phases.pretrain.images_per_step" in message
    assert "2 images are 1 micro-batches of 2, which 2 ranks cannot share equally" in message


def test_a_run_folder_that_another_process_writes_to_is_left_as_it_is(
    tmp_path: Path, shapes_shards: Path
):
    run_dir = RunDir(tmp_path / "run")
    run_dir.root.mkdir()
    run_dir.stop.touch()  # a request to the process that writes here
    with locks.held(run_dir.root, run_dir.lock):
        before = (os.stat(run_dir.root).st_mtime_ns, sorted(run_dir.root.rglob("*")))
        (message,) = messages_of_two_ranks(tmp_path, shapes_shards)
        assert before == (os.stat(run_dir.root).st_mtime_ns, sorted(run_dir.root.rglob("*")))
    assert f"{run_dir.root}: process {os.getpid()} on {os.uname().nodename} writes here" in message


def test_hosts_with_other_code_are_reported(tmp_path: Path, shapes_shards: Path):
    shutil.copytree(ROOT / "bigdet", tmp_path / "code/bigdet")
    changed = tmp_path / "code/bigdet/ops/boxes.py"
    changed.write_text(changed.read_text() + "# changed\n")
    (message,) = messages_of_two_ranks(tmp_path, shapes_shards, code_of_rank_1=tmp_path / "code")
    assert "hosts differ: bigdet code: " in message
    assert "(rank 0)" in message
    assert "(rank 1)" in message


def test_hosts_with_other_shards_are_reported(tmp_path: Path, shapes_shards: Path):
    for rank, val in enumerate(["val", "train"]):
        shards = tmp_path / f"host-{rank}/shards"
        shutil.copytree(shapes_shards / "train", shards / "train")
        shutil.copytree(shapes_shards / val, shards / "val")
    (message,) = messages_of_two_ranks(tmp_path, Path("shards"))
    assert "hosts differ: validation shards shards/val: " in message
