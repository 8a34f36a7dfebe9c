"""The commands of the README that make and check shards, as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_shapes_are_made_checked_and_their_damage_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    made = run_tool("tools/make_shards.py", "shapes", "--out", folder, "--images", "12")
    assert (made.returncode, made.stderr) == (0, "")
    assert "12 / 12 images" in made.stdout
    assert "12  images" in made.stdout

    checked = run_tool("tools/check_shards.py", folder)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.endswith(": all is well\n")
    assert "1 shards, 12 images" in checked.stdout

    tar = folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1  # in the first image, which begins at byte 512
    tar.write_bytes(data)
    damaged = run_tool("tools/check_shards.py", folder)
    assert (damaged.returncode, damaged.stderr) == (1, "")
    first, second, last = damaged.stdout.splitlines()
    assert first == "000000.tar: SHA-256 is not that of the manifest"
    assert second.startswith("000000.tar 000000000001: CRC-32 is ")
    assert last.endswith(": 2 problems")


def test_coco_with_flaws_is_converted_and_the_flaws_are_counted(
    tmp_path: Path, coco_dir: Path
) -> None:
    source = json.loads((coco_dir / "annotations" / "instances_val2017.json").read_text())
    source["images"].append({**source["images"][0], "id": 1, "file_name": "gone.jpg"})
    source["annotations"][0]["bbox"] = [-10, 10, 30, 40]
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(source))
    made = run_tool(
        *("tools/make_shards.py", "coco", "--images", coco_dir / "val2017"),
        *("--annotations", annotations, "--out", tmp_path / "shards", "--shard-megabytes", "8"),
    )
    assert (made.returncode, made.stderr) == (0, "")
    table = [line.split(maxsplit=1) for line in made.stdout.splitlines() if line[:2] == "  "]
    assert ["192", "images"] in table
    assert ["16", "crowd regions"] in table
    assert ["1", "skipped images: file missing"] in table
    assert ["1", "box clipped to the image"] in table
    assert len((tmp_path / "shards" / "skipped.jsonl").read_text().splitlines()) == 2


def test_parts_are_merged_and_their_tars_indexed_anew(tmp_path: Path, coco_dir: Path) -> None:
    root = coco_dir.parent / "bccd_voc"
    arguments = ("tools/make_shards.py", "voc", "--root", root, "--split", "val")
    folder = tmp_path / "set"
    for part in ("1/2", "2/2"):
        options = ("--out", folder, "--shard-megabytes", "1", "--part", part)
        made = run_tool(*arguments, *options)
        assert (made.returncode, made.stderr) == (0, "")
        assert f"part {part} is complete" in made.stdout
    merged = run_tool("tools/make_shards.py", "merge", "--out", folder)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert "1137  instances" in merged.stdout
    assert "1  annotation dropped: box has no area in the image" in merged.stdout

    index = (folder / "index.npy").read_bytes()
    (folder / "manifest.json").rename(tmp_path / "categories.json")
    (folder / "index.npy").unlink()
    indexed = run_tool(
        "tools/index_shards.py", folder, "--categories", tmp_path / "categories.json"
    )
    assert (indexed.returncode, indexed.stderr) == (0, "")
    assert "87 images, 1137 instances, 0 crowd regions, 0 left out" in indexed.stdout
    assert (folder / "index.npy").read_bytes() == index


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
from bigdet.cli import make_shards
from bigdet.cli.running import run_command
from bigdet.data.making import processes
processes.BYTES_PER_PROCESS = 10**6  # so that a small set is worth two processes
print("ready", flush=True)
run_command(make_shards.main, interrupted="stopped; start it again to continue")
"""


def test_ctrl_c_is_one_line_and_finished_shards_stay(tmp_path: Path, coco_dir: Path) -> None:
    arguments = (
        *("coco", "--images", coco_dir / "val2017", "--out", tmp_path / "set"),
        *("--annotations", coco_dir / "annotations" / "instances_val2017.json"),
        *("--shard-megabytes", "2", "--processes", "2"),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *(str(argument) for argument in arguments)],
        cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not list((tmp_path / "set").glob("*.tar")):
            time.sleep(0.02)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, errors) == (130, "stopped; start it again to continue\n")
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "set").glob("*.tar")}
    assert not (tmp_path / "set" / "manifest.json").exists()
    again = run_tool("tools/make_shards.py", *arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert "192  images" in again.stdout
    assert {name: (tmp_path / "set" / name).stat().st_ino for name in finished} == finished


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (
            ["tools/make_shards.py", "coco", "--images", "IMAGES", "--annotations", "missing.json"],
            "missing.json: cannot be read (No such file or directory). Give the annotation file.",
        ),
        (["tools/check_shards.py", "IMAGES"], "expected a shard set, but the folder has no"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_1(
    tmp_path: Path, tool: list[str], message: str
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "1.jpg").write_bytes(b"")
    arguments = [str(images) if argument == "IMAGES" else argument for argument in tool]
    if "coco" in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    result = run_tool(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
