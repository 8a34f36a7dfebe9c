"""Checkpoints that three ranks write together: full disks, ranks that die, hosts of their own."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigdet import distributed
from bigdet.config.load import load_config
from bigdet.data.format.phase_sets import DataSets
from bigdet.engine import checkpoint, keeping, whole, writing
from bigdet.engine.parts import Part, Share, copy_share, fill, gather_share
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Save
from bigdet.logs.log import setup_logging
from bigdet.pieces.reading import open_stored
from bigdet.run_dir import RunDir
from bigdet.training.saving import Saver
from bigdet.training.state import RunState
from tests.spawn import ROOT, RankError, run_ranks

CONFIG = ROOT / "configs" / "quickstart.yaml"
ROWS, STATISTICS = torch.arange(60.0).view(6, 10), torch.arange(7.0)
METADATA = {"config": "output: x"}
attempts = itertools.count(1)


# ---- What the ranks run.


def parts_of(values: float = 0.0, owners: Sequence[int] = (0, 1, 2)) -> list[Part]:
    """Two rows of a matrix on each rank, ``owners`` says which; statistics whole on all."""
    first = 2 * owners[distributed.rank()]
    rows, statistics = ROWS[first : first + 2] + values, STATISTICS + values
    return [
        Part("model", "rows", (6, 10), 10 * first, rows),
        Part("model", "statistics", (7,), 0, statistics, is_whole=True),
        Part("exp_avg", "rows", (6, 10), 10 * first, -rows),
    ]


def assert_loaded(folder: Path, values: float, owners: Sequence[int] = (0, 1, 2)) -> None:
    parts, expected = parts_of(-99, owners), parts_of(values, owners)
    fill(parts, checkpoint.load(folder).engine)
    for part, wanted in zip(parts, expected, strict=True):
        assert torch.equal(part.values, wanted.values), part.name


def save(
    folder: Path, values: float, share: Share | None = None, metadata: dict[str, str] = METADATA
) -> str:
    """Write a checkpoint on all ranks; return the problem that rank 0 found."""
    disks = writing.find_disks(folder.parent)
    sharing = disks.sharing
    if share is None:
        position = sharing.index(distributed.rank())
        share = copy_share(parts_of(values), position, len(sharing))
    number = distributed.broadcast_object(writing.next_number(folder.parent))
    problem = ""
    try:
        writing.write(
            Save(folder, number, disks, metadata, {"step": values}, next(attempts)), share
        )
    except ValueError as error:
        problem = str(error)
    distributed.barrier()
    return problem


def run_all(folder: Path) -> dict[str, Any]:
    return {
        "full": fill_a_disk(folder / "full"),
        "dead": die(folder / "dead"),
        "apart": save_apart(folder / f"host-{distributed.rank() // 2}"),
        "late": fail_late(folder / f"host-{distributed.rank() // 2}"),
        "lacking": load_what_is_lacking(folder / f"host-{distributed.rank() // 2}"),
        "remote": copy_away(folder),
        "disks": list(writing.find_disks(folder / f"own-{distributed.rank()}").owners),
        "gathered": gather(folder / f"gathered-{distributed.rank()}"),
    }


def fill_a_disk(folder: Path) -> list[str]:
    """A save in which rank 1 may write no byte, between two that succeed."""
    problems = [save(folder / "train-1", 1)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("train-2", "train-1"):
        if distributed.rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        problems.append(save(folder / name, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(folder) == ["latest", "train-1"]
        assert_loaded(folder / "train-1", 1)
    problems.append(save(folder / "train-2", 2))
    assert_loaded(folder / "train-2", 2)
    assert_loaded(folder / "train-2", 2, owners=(2, 0, 1))  # from files of other ranks
    return problems


def die(folder: Path) -> list[str]:
    """Saves in which rank 1, or rank 0, is not heard of, as if it were dead."""
    problems = [save(folder / "train-1", 1)]
    disks = writing.find_disks(folder)
    share = copy_share(parts_of(2), distributed.rank(), 3)
    for number, dead in ((2, 1), (3, 0)):
        problem = ""
        if distributed.rank() != dead:
            try:
                one = Save(folder / f"train-{number}", number, disks, attempt=-number)
                writing.write(one, share, lambda: True)
            except RuntimeError as error:
                problem = str(error)
        problems.append(problem)
        distributed.barrier()
        assert not (folder / f"train-{number}" / "state.json").exists()
        assert (folder / "latest").read_text() == "train-1\n"
        assert_loaded(folder / "train-1", 1)
    distributed.barrier()
    if distributed.is_main():
        keeping.remove_leftovers(folder)  # the run, started again
        assert names(folder) == ["latest", "train-1"]
    return problems


def save_apart(folder: Path) -> list[str]:
    """Rank 2 has a disk of its own."""
    disks = writing.find_disks(folder)
    assert list(disks.owners) == [0, 0, 2]
    assert disks.is_owner == (distributed.rank() != 1)
    problems = [save(folder / "train-1", 1), save(folder / "train-2", 2)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    problems.append(save(folder / "train-3", 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(folder) == ["latest", "train-1", "train-2"]
    assert_loaded(folder / "train-2", 2)  # each rank has what it needs
    files = names(folder / "train-2")
    own = ["pieces-2-2.safetensors"]
    if distributed.rank() != 2:
        own = ["pieces-2-0.safetensors", "pieces-2-1.safetensors"]
    assert files == ["index-2.json", *own, "state.json"]
    if distributed.is_main():
        assert not whole.write_whole(folder / "train-2")
        assert checkpoint.newest_usable(folder) == folder / "train-2"
    whole.write_whole_together(folder / "train-2")
    if distributed.is_main():
        assert whole.write_whole(folder / "train-2")
        written = load_file(folder / "train-2/model.safetensors")
        expected = {"rows": ROWS + 2, "statistics": STATISTICS + 2}
        torch.testing.assert_close(written, expected, rtol=0, atol=0)
        assert [path.name for path in folder.parent.glob("*/train-2/model*")] == [
            "model.safetensors"
        ]
    return problems


def fail_late(folder: Path) -> list[str]:
    """Rank 2, on a disk of its own, has room for its pieces and not for the index, or is killed."""
    disks = writing.find_disks(folder)
    problems = []
    for name in ("train-3", "train-2"):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if distributed.rank() == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        problems.append(save(folder / name, 3, metadata={"config": "x" * 3000}))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(folder) == ["latest", "train-1", "train-2"]
        assert (folder / "latest").read_text() == "train-2\n"
        assert_loaded(folder / "train-2", 2)
    distributed.barrier()
    state = folder / "train-2/state.json"
    before = state.read_text()
    problems.append(save(folder / "train-2", 3))
    if distributed.rank() == 2:
        state.write_text(before)  # as if it had been killed after rank 0 had named its own
    distributed.barrier()
    writing.align(folder, disks)
    if disks.is_owner:
        keeping.remove_leftovers(folder)  # the next save
    assert_loaded(folder / "train-2", 3)
    if distributed.rank() == 2:
        state.unlink()  # the same of a checkpoint in a folder of its own
    distributed.barrier()
    writing.align(folder, disks)
    if disks.is_owner:
        keeping.clean(folder, 1, ["train-1"])
    assert_loaded(folder / "train-2", 3)
    return problems


def load_what_is_lacking(folder: Path) -> list[str]:
    """Rows that went to another host, and a file that is nowhere."""
    messages = []
    with pytest.raises(distributed.SharedError) as caught:
        assert_loaded(folder / "train-1", 1, owners=(2, 1, 0))
    messages.append(str(caught.value))
    distributed.barrier()
    if distributed.rank() == 2:
        (folder / "train-1/pieces-1-2.safetensors").unlink()
    distributed.barrier()
    with pytest.raises(distributed.SharedError) as caught:
        checkpoint.load(folder / "train-1")
    return [*messages, str(caught.value)]


def gather(folder: Path) -> list[str]:
    """Each rank has a disk of its own, and all is sent to that of rank 0."""
    share = gather_share(copy_share(parts_of(4), distributed.rank(), 3))
    assert (not share.pieces) == (not distributed.is_main())
    problem = save(folder / "train-1", 4, share)
    assert_loaded(folder / "train-1", 4)
    assert_loaded(folder / "train-1", 4, owners=(1, 2, 0))
    if distributed.is_main():
        assert whole.write_whole(folder / "train-1")
        assert torch.equal(
            open_stored(folder / "train-1").read("exp_avg", "rows"), -(ROWS + 4).flatten()
        )
    return [problem]


def copy_away(folder: Path) -> list[str]:
    """All ranks copy what they wrote, on two disks, to one address; each disk gets all of it."""
    remote = Remote(f"file://{folder}/bucket/run")
    here = folder / f"host-{distributed.rank() // 2}" / "train-2"
    fresh = folder / f"fresh-{distributed.rank() // 2}"
    one = Save(here, 3, writing.find_disks(here.parent), attempt=next(attempts))
    remote.copy(one, lambda name: name == "train-2")
    distributed.barrier()
    remote.fetch(fresh, writing.find_disks(fresh))
    assert_loaded(fresh / "train-2", 3, owners=(1, 2, 0))
    if distributed.rank() == 2:
        shutil.rmtree(fresh)  # the host is replaced by a new one, that of rank 0 is not
    remote.fetch(fresh, writing.find_disks(fresh))
    assert (fresh / "latest").read_text() == "train-2\n"
    assert_loaded(fresh / "train-2", 3, owners=(1, 0, 2))
    return names(fresh / "train-2")


def lose_a_rank(folder: Path) -> None:
    """Rank 1 dies while it writes; rank 0 leaves what it was told in a file."""
    run_dir = RunDir(folder)
    setup_logging(distributed.rank(), run_dir.log(distributed.rank()))
    train_set: Any = SimpleNamespace(categories=[])
    saver = Saver(load_config(CONFIG), run_dir, {"pretrain": DataSets(train_set, train_set)})
    if distributed.rank() == 1:
        writing.write = lambda *_: os._exit(9)
    engine: Any = SimpleNamespace(share=lambda rank, _: copy_share(parts_of(), rank, 3))
    saver.save(engine, RunState("pretrain", step=1))
    with pytest.raises(RuntimeError) as caught:
        saver.wait()
    (folder / "raised").write_text(distributed.lost_peer(caught.value))
    saver.join(0.2)  # as a run that ends
    (folder / "done").touch()
    os._exit(0)  # nobody is left to meet


def end_with_a_slow_copy(folder: Path) -> None:
    """The copy of rank 0 takes longer; as launchers do, rank 1 ends all ranks when it ends."""

    class Slow:
        def join(self, seconds: float) -> None:
            if distributed.is_main():
                time.sleep(1.0)
                (folder / "copied").touch()

    saver = Saver(load_config(CONFIG), RunDir(folder), {})
    saver._uploads = Slow()  # type: ignore[assignment]
    saver.finish_copies()
    assert (folder / "copied").is_file()


def fail_after_writing(folder: Path) -> None:
    """Each rank has a disk of its own; rank 1 writes its pieces and fails at what follows."""
    remote = f"file://{folder}/bucket"
    run_dir = RunDir(folder / f"host-{distributed.rank()}")
    setup_logging(distributed.rank(), run_dir.log(distributed.rank()))
    train_set: Any = SimpleNamespace(categories=[])
    config = load_config(CONFIG, [f"checkpoint.remote={remote}", "log.stall_seconds=40"])
    saver = Saver(config, run_dir, {"pretrain": DataSets(train_set, train_set)})
    engine: Any = SimpleNamespace(share=lambda rank, count: copy_share(parts_of(5), rank, count))

    def fail(*_: Any) -> None:
        raise OSError(28, "no room")

    clean = keeping.clean
    keeping.clean = fail if distributed.rank() == 1 else clean
    saver.save(engine, RunState("pretrain", step=1))
    saver.wait()
    keeping.clean = clean
    saver.finish_copies()
    fresh = folder / f"fresh-{distributed.rank()}"
    Remote(remote).fetch(fresh, writing.find_disks(fresh))
    assert_loaded(fresh / "pretrain-1", 5, owners=(1, 2, 0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- The tests.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, list[str]]]:
    return run_ranks(run_all, 3, folder, folder)


def test_a_full_disk_of_one_rank_is_one_error_and_earlier_checkpoints_stay(
    ranks: Any, folder: Path
) -> None:
    for number, name in ((1, "train-2"), (2, "train-1")):
        message = ranks[0]["full"][number]
        assert message.startswith(f"{folder}/full/{name}: cannot write the checkpoint: ")
        assert "GiB are free (rank 1 on " in message
        assert "Earlier checkpoints are untouched; make room." in message
        assert ranks[2]["full"][number] == ""  # rank 0 speaks for all
    assert [ranks[0]["full"][number] for number in (0, 3)] == ["", ""]


def test_a_save_during_which_a_rank_dies_is_no_checkpoint(ranks: Any) -> None:
    assert ranks[0]["dead"] == ["", "no word of save -2 2/from 1", ""]
    assert [rank["dead"] for rank in ranks[1:]] == [["", "", ""], ["", "", ""]]


def test_a_rank_that_dies_in_a_save_is_noticed_at_once_and_without_a_traceback(
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError, match="of 2 failed first"):
        run_ranks(lose_a_rank, 2, tmp_path, tmp_path)
    assert (tmp_path / "done").is_file()
    assert (tmp_path / "raised").read_text().startswith("lost the connection to another rank (")
    (line,) = (tmp_path / "logs/rank-0.log").read_text().splitlines()
    assert f"WARNING bigdet.training.saving: {tmp_path}/checkpoints/pretrain-1: the che" in line
    assert "not written: lost the connection to another rank (no word of save 1 1/from 1)" in line


def test_no_rank_ends_before_the_last_checkpoint_is_copied(tmp_path: Path) -> None:
    run_ranks(end_with_a_slow_copy, 2, tmp_path, tmp_path)


def test_a_rank_that_fails_after_writing_still_copies_what_it_wrote(tmp_path: Path) -> None:
    run_ranks(fail_after_writing, 3, tmp_path, tmp_path)
    logs = [(tmp_path / f"host-{rank}/logs/rank-{rank}.log").read_text() for rank in range(3)]
    assert all("no room" in log for log in logs)
    assert all("is on this machine only" not in log for log in logs)
    assert "checkpoint copied to file://" in logs[0]


def test_hosts_without_a_shared_disk_keep_their_own_files(ranks: Any) -> None:
    # What is there and loads, and the weights in one file, is asserted in the ranks.
    assert ranks[0]["apart"][:2] == ["", ""]
    assert "(rank 2 on " in ranks[0]["apart"][2]
    assert ranks[2]["apart"][2] == ranks[0]["apart"][2]


def test_a_host_that_fails_late_keeps_what_it_has_of_the_checkpoint_before(ranks: Any) -> None:
    # What is there and loads is asserted in the ranks.
    for message in ranks[0]["late"][:2]:
        assert "cannot write the checkpoint: [Errno 27] File too large" in message
        assert "(rank 2 on " in message
    assert ranks[2]["late"] == ranks[0]["late"]
    assert ranks[0]["late"][2] == ""


def test_ranks_on_hosts_of_one_name_that_share_no_disk_have_one_each(ranks: Any) -> None:
    assert [rank["disks"] for rank in ranks] == [[0, 1, 2]] * 3


def test_what_a_host_lacks_is_said_on_all_ranks(ranks: Any, folder: Path) -> None:
    host = os.uname().nodename
    for rank in ranks:
        lacking, missing = rank["lacking"]
        assert f"{host} lacks pieces-1-2.safetensors" in lacking
        assert "checkpoint.gather=true" in lacking
        assert missing.startswith(f"{folder}/host-0/train-1/pieces-1-2.safetensors: missing, expec")
        assert f"(written on {host})" in missing


def test_gathered_checkpoints_are_on_the_host_of_rank_0_and_sent_from_there(ranks: Any) -> None:
    assert [rank["gathered"] for rank in ranks] == [[""]] * 3


def test_a_copy_elsewhere_has_what_all_disks_have_and_goes_to_each(
    ranks: Any, folder: Path
) -> None:
    pieces = [f"pieces-3-{rank}.safetensors" for rank in range(3)]
    assert names(folder / "bucket/run/train-2") == ["index-3.json", *pieces, "state.json"]
    assert [rank["remote"] for rank in ranks] == [["index-3.json", *pieces, "state.json"]] * 3
