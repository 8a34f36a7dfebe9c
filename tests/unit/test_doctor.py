import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from bigdet.config.load import load_config
from bigdet.doctor import Facts, command_row, compare, disk_row, find_facts, memory_rows
from tests.commands.runs import ROOT, arguments

GIB = 1 << 30
FACTS = Facts(
    "a",
    "cpu",
    {"torch": "2", "bigdet code": "c0de"},
    {"config": "1", "training shards": "f00"},
    classes={"pretrain": 3, "finetune": 3},
    free_disk=2 * GIB,
    free_shm=GIB,
    free_memory=GIB,
)


def failing(rows) -> dict[str, str]:
    return {row.check: row.found for row in rows if not row.is_ok}


def test_what_hosts_have_alike_is_well():
    assert failing(compare([FACTS, dataclasses.replace(FACTS, host="b")])) == {}


def test_what_differs_between_hosts_fails_with_who_has_what():
    other = dataclasses.replace(
        FACTS,
        host="b",
        device="H200",
        software={"torch": "2", "bigdet code": "bad"},
        inputs={"config": "1", "training shards": "f11"},
    )
    assert failing(compare([FACTS, FACTS, other, other])) == {
        "ranks": "4 on 2 hosts (a, b), H200, cpu",
        "bigdet code": "c0de on a (rank 0), bad on b (rank 2)",
        "training shards": "f00 on a (rank 0), f11 on b (rank 2)",
    }


def test_whose_deepspeed_command_is_installed_is_reported(tmp_path: Path):
    command = tmp_path / "deepspeed"
    assert command_row(command).found.startswith(f"none at {command}; start with torchrun")
    start = "#!/home/bigdet/.venv/bin/python\n"  # a folder of that name says nothing
    command.write_text(f"{start}from deepspeed.launcher.runner import main\n")
    assert command_row(command).found.startswith("DeepSpeed's own, installed after bigdet's: it ")
    command.write_text(f"{start}from bigdet.cli.deepspeed import main\n")
    assert command_row(command).found == "accepts -m and --module"


def test_a_problem_of_one_rank_fails_with_its_host():
    other = dataclasses.replace(FACTS, host="b", inputs={"config": "1"}, problems={"data": "gone"})
    assert failing(compare([FACTS, other])) == {"data": "b: gone"}


def test_room_is_compared_with_what_the_run_takes():
    words = ["data.workers=4", "model.width=256", "model.fc_width=1024", "checkpoint.keep=2"]
    config = load_config(ROOT / "configs/quickstart.yaml", words)
    assert failing([*memory_rows(config, [FACTS] * 2), disk_row(config, FACTS)]) == {}
    # 8 images of 128x128 with masks are 8 * (4 * 128 * 128 + 65,536) bytes = 1 MiB a group; 2 ranks
    # of 4 processes hold 3 groups each: 24 MiB.
    scarce = dataclasses.replace(FACTS, free_shm=7 << 20, free_memory=23 << 20, free_disk=GIB // 2)
    failed = failing([*memory_rows(config, [scarce] * 2), disk_row(config, scarce)])
    assert failed.keys() == {"/dev/shm", "loader memory", "disk"}
    assert failed["loader memory"] == "a: 0.02 of 0.02 GiB. Lower data.workers."
    # 2 newest, the best, 2 ends of phases, and the one being written
    assert failed["disk"].startswith("6 checkpoints of 0.2")


def test_what_a_system_does_not_tell_fails_nothing():
    config = load_config(ROOT / "configs/quickstart.yaml", ["data.workers=4"])
    silent = dataclasses.replace(FACTS, free_shm=None, free_memory=None)  # macOS
    rows = memory_rows(config, [silent])
    assert [(row.found, row.is_ok) for row in rows] == [("unknown on this system", True)] * 2


def test_a_phase_shorter_than_its_warm_up_is_reported_though_its_length_is_in_passes(
    tmp_path: Path, shapes_shards: Path
):
    # 16 images are 2 steps of 8, as many as the warm-up takes.
    file, *words = arguments(tmp_path / "run", shapes_shards, "phases.pretrain.steps=null")
    problems = [
        find_facts(load_config(file, [*words, f"phases.pretrain.passes={passes}"])).problems
        for passes in (1, 2)
    ]
    assert problems[0]["data"].startswith("phases.pretrain.warmup_steps: found 2, but the phase")
    assert problems[1] == {}


def test_the_doctor_of_a_config_without_data_ends_with_1(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "bigdet.train", *arguments(tmp_path / "run", tmp_path), "--doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"FAIL  data +\S+: .*no such folder", done.stderr), done.stderr
    assert "2 of 14 checks failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_objects_of_the_classes_are_shown_with_warnings():
    objects = {"training objects": ("ring 0, square 8", ["1 of 2 classes (ring) has no object"])}
    row = compare([dataclasses.replace(FACTS, objects=objects)])[-1]
    assert (row.check, row.found, row.is_ok) == ("training objects", "ring 0, square 8", True)
    assert row.warnings == ["1 of 2 classes (ring) has no object"]
