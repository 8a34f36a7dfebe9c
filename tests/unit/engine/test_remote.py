"""Copies of checkpoints at an address: what is there when, what a fresh machine gets of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from bigdet.engine import checkpoint, keeping, remote, writing
from bigdet.engine.parts import Part, copy_share
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Disks, Save
from bigdet.pieces.index import read_state

ADDRESS = "memory://bucket/run"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,) * 3)
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def save(checkpoints: Path, step: int) -> Save:
    weight = Part("model", "w", (3,), 0, torch.full((3,), float(step)), is_whole=True)
    number = writing.next_number(checkpoints)
    one = Save(checkpoints / f"train-{step}", number, Disks(), {}, {"step": step})
    writing.write(one, copy_share([weight], 0, 1))
    return one


def copy(one: Save) -> None:
    Remote(ADDRESS).copy(one, lambda name: name in keeping.numbers(one.folder.parent))


def found(files: Any) -> list[str]:
    return sorted(path.removeprefix("/bucket/run/") for path in files.find("/bucket/run"))


def test_a_fresh_machine_goes_on_from_the_newest_copy(tmp_path: Path, memory: Any) -> None:
    here, fresh = tmp_path / "here", tmp_path / "fresh"
    assert Remote(ADDRESS).newest() is None
    for step in (1, 2):
        copy(save(here, step))
    assert found(memory) == [
        "latest",
        *(f"train-1/{name}" for name in ("index-1.json", "pieces-1-0.safetensors", "state.json")),
        *(f"train-2/{name}" for name in ("index-2.json", "pieces-2-0.safetensors", "state.json")),
    ]
    Remote(ADDRESS).fetch(fresh, Disks())
    assert sorted(path.name for path in fresh.iterdir()) == ["latest", "train-2"]
    loaded = checkpoint.load(fresh / "train-2")
    assert loaded.run == {"step": 2}
    assert loaded.engine.read("model", "w").tolist() == [2, 2, 2]
    save(fresh, 3)
    Remote(ADDRESS).fetch(fresh, Disks())  # what is here is newer
    assert (fresh / "latest").read_text() == "train-3\n"


def test_what_is_not_kept_here_goes_there_too(tmp_path: Path, memory: Any) -> None:
    for step in (1, 2, 3):
        one = save(tmp_path, step)
        keeping.clean(tmp_path, keep=1, protected=["train-1"])
        copy(one)
    assert {path.split("/")[0] for path in found(memory)} == {"latest", "train-1", "train-3"}
    copy(save(tmp_path, 3))  # again, by the run that was started again
    assert [path for path in found(memory) if "train-3" in path] == [
        "train-3/index-4.json", "train-3/pieces-4-0.safetensors", "train-3/state.json",
    ]  # fmt: skip


def test_nothing_but_own_earlier_checkpoints_is_deleted_there(tmp_path: Path, memory: Any) -> None:
    others = ["coco-shards/000000.tar", "other-run/train-900/state.json", "thesis-final.pdf",
              "train-7/notes.txt", "train-7/state.json", "train-8/old/pieces-1-0.safetensors",
              "train-2/notes.txt"]  # fmt: skip
    for name in others:
        memory.pipe_file(f"/bucket/run/{name}", b"{}")
    newer, two = save(tmp_path / "b", 9), [save(tmp_path / "a", step) for step in (1, 2)][1]
    keeping.clean(tmp_path / "a", keep=1, protected=[])
    for name in ("index-1.json", "pieces-1-0.safetensors"):
        for step in (3, 4):  # saves that were killed while they were copied
            memory.put_file(str(newer.folder / name), f"/bucket/run/train-{step}/{name}")
    memory.pipe_file("/bucket/run/train-4/state.json", b'{"numb')
    state = {**read_state(newer.folder), "number": 3}  # a later one, of another machine
    memory.pipe_file("/bucket/run/train-9/state.json", json.dumps(state).encode())
    memory.put_file(str(two.folder / "index-2.json"), "/bucket/run/train-2/index-1.json")
    memory.pipe_file("/bucket/run/train-1/state.json", b'{"number": 1}')
    copy(two)
    own = [f"train-2/{name}" for name in ("index-2.json", "pieces-2-0.safetensors", "state.json")]
    assert found(memory) == sorted([*others, *own, "latest", "train-9/state.json"])


def test_a_file_that_checkpoints_need_is_copied_once_and_stays(tmp_path: Path, memory: Any) -> None:
    frozen = tmp_path / "frozen" / "ab.safetensors"
    frozen.parent.mkdir()
    frozen.write_bytes(b"weights")
    memory.pipe_file("/bucket/run/frozen/ab.safetensors", b"wei")  # cut off by a kill
    times = []
    for step in (1, 2):
        one = save(tmp_path / "checkpoints", step)
        needed = {"frozen/ab.safetensors": frozen}
        Remote(ADDRESS).copy(one, lambda name: name == "train-2", needed=needed)
        assert memory.cat_file("/bucket/run/frozen/ab.safetensors") == b"weights"
        times.append(memory.modified("/bucket/run/frozen/ab.safetensors"))
    assert times[0] == times[1]
    assert {path.split("/")[0] for path in found(memory)} == {"frozen", "latest", "train-2"}
    Remote(ADDRESS).get("frozen/ab.safetensors", tmp_path / "fresh/frozen/ab.safetensors")
    assert (tmp_path / "fresh/frozen/ab.safetensors").read_bytes() == b"weights"


class Flaky(MemoryFileSystem):
    """A file system whose every second call fails, and some of whose calls always do."""

    protocol = "flaky"
    calls = itertools.count()
    never = ""

    def put_file(self, lpath: Any, rpath: Any, *rest: Any, **more: Any) -> None:
        if next(self.calls) % 2 == 0 or (self.never and self.never in rpath):
            raise ConnectionError("the network is away")
        super().put_file(lpath, rpath, *rest, **more)

    def pipe_file(self, path: Any, value: Any, *rest: Any, **more: Any) -> None:
        if next(self.calls) % 2 == 0 or (self.never and self.never in path):
            raise ConnectionError("the network is away")
        super().pipe_file(path, value, *rest, **more)


def test_a_copy_is_tried_again_and_complete_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    address = Remote("flaky://bucket/run")
    address.copy(save(tmp_path, 1), lambda name: True)
    assert "the network is away" in caplog.text
    newest = address.newest()
    assert newest is not None
    assert newest[0] == "train-1"
    for never in ("pieces-", "index-", "state.json"):
        monkeypatch.setattr(Flaky, "never", never)
        with pytest.raises(OSError, match=f"{never}.*the network is away"):
            address.copy(save(tmp_path, 2), lambda name: True)
        assert address.newest() == newest
    monkeypatch.setattr(Flaky, "never", "")
    address.copy(save(tmp_path, 2), lambda name: True)
    address.fetch(tmp_path / "fresh", Disks())
    assert checkpoint.load(tmp_path / "fresh/train-2").run == {"step": 2}


class Meanwhile(MemoryFileSystem):
    """A file system to which something happens when a file is put there."""

    protocol = "meanwhile"
    happens: Callable[[str], None] = lambda name: None

    def put_file(self, lpath: Any, rpath: Any, *rest: Any, **more: Any) -> None:
        super().put_file(lpath, rpath, *rest, **more)
        type(self).happens(rpath.rsplit("/", 1)[-1])


def test_latest_there_names_a_whole_checkpoint_whatever_is_saved_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("meanwhile", Meanwhile, clobber=True)
    address = Remote("meanwhile://bucket/run")
    one = save(tmp_path, 1)
    # Another checkpoint is saved while the index is copied: `latest` is still about this one.
    monkeypatch.setattr(
        Meanwhile, "happens", lambda name: name == "index-1.json" and save(tmp_path, 2)
    )
    address.copy(one, lambda name: True)
    assert (tmp_path / "latest").read_text() == "train-2\n"
    newest = address.newest()
    assert newest is not None
    assert newest[0] == "train-1"
    # The same one is saved again while its pieces are copied, so that its index is gone. Another
    # rank may already copy what comes next.
    two = Save(tmp_path / "train-2", 2)
    there = fsspec.filesystem("meanwhile")
    monkeypatch.setattr(
        Meanwhile, "happens", lambda name: name == "pieces-2-0.safetensors" and save(tmp_path, 2)
    )
    with pytest.raises(FileNotFoundError):
        address.copy(two, lambda name: True)
    assert address.newest() == newest
    there.pipe_file(address._path("train-2/pieces-4-1.safetensors"), b"next")
    address.copy(Save(tmp_path / "train-2", 3), lambda name: True)
    assert sorted(path.rsplit("/", 1)[1] for path in there.find(address._path("train-2"))) == [
        "index-3.json", "pieces-3-0.safetensors", "pieces-4-1.safetensors", "state.json",
    ]  # fmt: skip
    address.fetch(tmp_path / "fresh", Disks())
    assert checkpoint.load(tmp_path / "fresh/train-2").run == {"step": 2}


def test_an_address_of_an_unknown_kind_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.remote: nowhere://x: cannot be written to"):
        Remote("nowhere://x")
