"""Shards in parallel, in parts, after a kill, to other places, on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making import processes
from bigdet.data.making.conversion import Making, merge_parts, plan_shards
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.coco import convert_coco
from bigdet.data.making.storage import UNFINISHED, open_storage, open_unused

PROJECT = Path(__file__).parents[3]
NUM_IMAGES = 24
NUM_SHARDS = 6  # of 4 images with 240,000 bytes each, in 1 MB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 240 KB each (junk behind the JPEG's end); one is missing, a box sticks out."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    picture = _jpeg()
    images, annotations = [], []
    for number in range(1, NUM_IMAGES + 1):
        name = f"{number}.jpg"
        if number != 7:
            (root / "images" / name).write_bytes(
                picture + bytes([number]) * (240_000 - len(picture))
            )
        images.append({"id": number, "file_name": name, "height": 6, "width": 8})
        box = {"id": number, "image_id": number, "category_id": 3, "bbox": [1, 2, 9, 3]}
        annotations.append(box | {"area": 20, "iscrowd": 0})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 3, "name": "car"}]
    (root / "a.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, bytes]:
    """The files of an undisturbed conversion in one process."""
    convert(data, data / "whole")
    return content_of(data / "whole")


def _jpeg() -> bytes:
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(np.full((6, 8, 3), 90, dtype=np.uint8))
    return data


def convert(data: Path, out: str | Path, **options: Any) -> None:
    convert_coco(data / "images", data / "a.json", out, making=Making(1, **options))


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(data: Path, out: Path, *more: str) -> list[str]:
    given = ("--images", data / "images", "--annotations", data / "a.json", "--out", out)
    tool = [sys.executable, "tools/make_shards.py", "coco", *map(str, given)]
    return [*tool, "--shard-megabytes", "1", *more]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def test_shards_are_cut_before_they_grow_beyond_the_limit() -> None:
    sizes = np.array([4, 4, 4, 20, 1, 9, 10])
    # 4 + 4 fits 10; 4 + 20 does not; 20 is too large for any, so it is alone; 1 + 9 fits exactly.
    assert plan_shards(sizes, 10) == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert plan_shards(np.zeros(0, dtype=np.int64), 10) == []


def test_what_is_left_out_is_counted_and_listed(data: Path, whole: dict[str, bytes]) -> None:
    manifest = ShardSet(data / "whole").manifest
    assert len(manifest.shards) == NUM_SHARDS
    assert manifest.skipped == {"file missing": 1}
    assert manifest.changed == {"box clipped to the image": NUM_IMAGES - 1}
    assert whole["skipped.jsonl"].count(b"\n") == NUM_IMAGES
    assert list(check_shards(data / "whole")) == []
    assert manifest.options["shard_megabytes"] == 1
    assert "processes" not in manifest.options


def test_two_processes_write_the_same_bytes(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BYTES_PER_PROCESS", 1)
    progress = []
    making = Making(1, processes=2)
    out = tmp_path / "out"
    convert_coco(
        data / "images", data / "a.json", out, making=making, progress=lambda *n: progress.append(n)
    )
    assert content_of(out) == whole
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == ((0, NUM_IMAGES), (NUM_IMAGES, NUM_IMAGES))


def test_after_a_kill_finished_shards_stay_and_the_set_becomes_the_same(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # The third image of the fifth shard takes forever: a named pipe that nothing writes to.
    script = (
        "import sys, time; from bigdet.data.making.sources import coco; read = coco.read_image\n"
        "def slow(path, *rest):\n"
        "    if path.name == '19.jpg': print('waiting', flush=True); time.sleep(600)\n"
        "    return read(path, *rest)\n"
        "coco.read_image = slow\n"
        "from bigdet.data.making.conversion import Making; from pathlib import Path\n"
        f"coco.convert_coco(Path({str(data / 'images')!r}), Path({str(data / 'a.json')!r}), "
        f"{str(out)!r}, making=Making(1))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(ShardError, match="no manifest"):
        ShardSet(out)
    tars = sorted(out.glob("*.tar"))
    assert {path.name: path.read_bytes() for path in tars} == {
        name: whole[name] for name in ("000000.tar", "000001.tar", "000002.tar", "000003.tar")
    }
    before = {path: path.stat().st_mtime_ns for path in tars}
    convert(data, out)
    assert content_of(out) == whole
    assert {path: path.stat().st_mtime_ns for path in tars} == before


def test_a_tar_without_its_note_is_made_again(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    convert(data, tmp_path, part="1/2")  # 0, 2, 4
    (tmp_path / ".unfinished" / "000002.json").unlink()
    (tmp_path / "000002.tar").write_bytes(b"half")
    (tmp_path / "000004.tar").write_bytes(b"half")  # has a note, but not the size it says
    convert(data, tmp_path)
    assert content_of(tmp_path) == whole


def test_parts_and_a_merge_make_the_same_set(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for part in ("2/3", "3/3"):
        convert(data, tmp_path, part=part)
    with pytest.raises(ShardError, match=r"2 of 6 shards are not finished \(000000.tar, 000003"):
        merge_parts(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    convert(data, tmp_path, part="1/3")
    merge_parts(tmp_path)
    assert content_of(tmp_path) == whole


def test_other_input_or_options_never_mix_with_what_was_begun(data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path, part="1/2")
    with pytest.raises(ShardError, match="beginning of another conversion"):
        convert_coco(data / "images", data / "a.json", tmp_path, making=Making(2))
    other = tmp_path / "b.json"
    other.write_text((data / "a.json").read_text().replace("car", "cat"))
    with pytest.raises(ShardError, match="beginning of another conversion"):
        convert_coco(data / "images", other, tmp_path, making=Making(1))


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1", "1/0", "-1/3", "1/3/5"])
def test_a_part_that_is_none_is_an_error(part: str) -> None:
    with pytest.raises(ShardError, match="expected i/n"):
        Making(part=part)


def test_shards_go_to_any_address_that_fsspec_knows(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    convert(data, "memory://sets/cars")
    files = fsspec.filesystem("memory")
    found = {path: files.cat_file(path) for path in files.find("/sets/cars")}
    assert {path.rsplit("/", 1)[1]: data for path, data in found.items()} == whole
    with pytest.raises(ShardError, match="has shards already"):
        convert(data, "memory://sets/cars")
    files.rm("/sets", recursive=True)
    convert(data, f"file://{tmp_path}/out")
    assert content_of(tmp_path / "out") == whole
    with pytest.raises(ShardError, match="nothing://x: cannot be written to"):
        convert(data, "nothing://x")


def test_parts_at_an_address_are_merged_there(data: Path, whole: dict[str, bytes]) -> None:
    for part in ("1/2", "2/2"):
        convert(data, "memory://parted", part=part)
    merge_parts("memory://parted")
    files = fsspec.filesystem("memory")
    found = {path: files.cat_file(path) for path in files.find("/parted")}
    assert {path.rsplit("/", 1)[1]: data for path, data in found.items()} == whole
    files.rm("/parted", recursive=True)


def test_a_full_disk_is_one_message_and_the_rest_continues_later(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    limited = ["bash", "-c", 'ulimit -f 700; exec "$@"', "-"]  # KB a file may have
    result = subprocess.run(
        [*limited, *command(data, tmp_path / "out", "--processes", "1")],
        cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'out'}: [Errno 27] File too large")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()  # not one shard was finished
    convert(data, tmp_path / "out")
    assert content_of(tmp_path / "out") == whole


def test_an_error_after_some_shards_keeps_them(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigdet.data.making.shard_tar import ShardTar

    def full(self: ShardTar, *rest: Any) -> None:
        if self.path.name == "000002.tar":
            raise OSError(28, "No space left on device")
        add(self, *rest)

    add = ShardTar.add
    monkeypatch.setattr(ShardTar, "add", full)
    with pytest.raises(ShardError, match=r"No space left.* 2 of 6 shards are finished and stay"):
        convert(data, tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["000000.tar", "000001.tar"]
    convert(data, tmp_path)
    assert content_of(tmp_path) == whole


def end_process(path: Path, tick: Callable[[], None]) -> None:
    if path.exists():
        os._exit(9)


def test_a_worker_that_is_killed_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="a process of the conversion was killed"):
        list(processes.run_jobs(end_process, [tmp_path, tmp_path / "x"], 2, lambda done: None))


def test_an_address_that_cannot_be_reached_is_one_message(monkeypatch):
    class NoCredentialsError(Exception):
        """As object stores raise, of no common class."""

    def fail(*_arguments, **_options):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.ls", fail)
    with pytest.raises(
        ShardError, match=r"^memory://x: cannot be reached \(NoCredentialsError: Un"
    ):
        open_storage("memory://x").names()


def test_a_folder_that_cannot_be_made_is_one_message():
    storage = open_storage("/proc/nothing")
    with (
        pytest.raises(ShardError, match=r"^/proc/nothing: cannot be written to: "),
        storage.claim(None),
    ):
        pass


def test_a_set_that_is_being_made_is_left_alone_and_parts_are_made_at_a_time(tmp_path: Path):
    def claim(part: str | None):
        return open_storage(tmp_path).claim(part)

    with claim("1/3"), claim("2/3"):
        for part in ("1/3", None):
            with pytest.raises(ShardError, match=r"process \d+ on \S+ writes here"), claim(part):
                pass
        assert {path.name for path in (tmp_path / UNFINISHED).iterdir()} == {
            "lock-1-of-3",
            "lock-2-of-3",
        }
    with claim(None):
        with pytest.raises(ShardError, match="writes here"), claim("3/3"):
            pass
        with pytest.raises(ShardError, match="writes here"):  # before the annotations are read
            open_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []
