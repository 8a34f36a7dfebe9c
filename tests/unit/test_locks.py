"""Who may write into a folder: real processes hold, leave and take over lock files."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigdet.host import locks

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from bigdet.host import locks
folder = Path(sys.argv[1])
while len(sys.argv) > 2 and not (folder / "go").exists():
    pass
try:
    with locks.held(folder, folder / "lock"):
        print("holds", flush=True)
        sys.stdin.read()
except locks.LockedError as error:
    print(error, flush=True)
"""


def start(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def is_held(folder: Path) -> bool:
    """Try to hold the lock of a folder."""
    try:
        with locks.held(folder, folder / "lock"):
            return False
    except locks.LockedError:
        return True


def leave(folder: Path, **changes) -> None:
    """Leave a lock of this process, but for some of what it says."""
    with locks.held(folder, folder / "lock"):
        values = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps({**values, **changes}))


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(autouse=True)
def first_start(monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_start_is_told_who_writes_and_changes_nothing(tmp_path: Path):
    first = start(tmp_path)
    assert first.stdout.readline() == "holds\n"
    before = snapshot(tmp_path)
    with pytest.raises(locks.LockedError) as caught, locks.held(tmp_path, tmp_path / "lock"):
        pass
    since = json.loads((tmp_path / "lock").read_text())["since"]
    host = os.uname().nodename
    assert str(caught.value) == (
        f"{tmp_path}: process {first.pid} on {host} writes here, since {since}. Wait for it to "
        f"end, stop it, or give another folder."
    )
    assert snapshot(tmp_path) == before
    first.communicate()
    assert list(tmp_path.iterdir()) == []  # released at its end
    assert not is_held(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_also_before_it_is_collected(tmp_path: Path):
    first = start(tmp_path)
    assert first.stdout.readline() == "holds\n"
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # ended, but a zombie
    assert not is_held(tmp_path)
    first.communicate()


def test_of_many_simultaneous_starts_one_wins(tmp_path: Path):
    leave(tmp_path, start="1")  # of a process that is gone
    starts = [start(tmp_path, "wait") for _ in range(6)]
    (tmp_path / "go").touch()
    told = [process.stdout.readline() for process in starts]
    for process in starts:
        process.communicate()
    assert told.count("holds\n") == 1, told
    assert sum("writes here" in line for line in told) == 5, told
    assert [path.name for path in tmp_path.iterdir()] == ["go"]


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),  # this very process
        ({"start": "1"}, False),  # its number was given to another process: 1 in a container
        ({"start": ""}, True),  # not known when it began: to be on the safe side
        ({"pid": 2**22 + 1}, False),  # more than Linux gives away
    ],
)
def test_a_process_of_this_host_is_known_by_number_and_start(tmp_path: Path, changes, held: bool):
    leave(tmp_path, **changes)
    assert is_held(tmp_path) == held


def test_of_another_host_the_time_of_the_last_refresh_decides(tmp_path: Path):
    leave(tmp_path, host="elsewhere", start="1")
    with pytest.raises(locks.LockedError, match=r"on elsewhere writes here.*start again 60 s"):
        locks.refuse_held(tmp_path, tmp_path / "lock")
    now = (tmp_path / "lock").stat().st_mtime
    os.utime(tmp_path / "lock", (now - 50, now - 50))
    assert is_held(tmp_path)
    os.utime(tmp_path / "lock", (now - 70, now - 70))
    assert not is_held(tmp_path)


@pytest.mark.parametrize(
    ("changes", "variables"),
    [
        ({"boot": "of another kernel"}, {}),  # rebooted, or two hosts of one name
        ({"container": "pid:[7]"}, {}),  # started again, or two containers of one name
        ({"host": "elsewhere"}, {"TORCHELASTIC_RESTART_COUNT": "1"}),
    ],
)
@pytest.mark.parametrize("is_refreshed", [True, False])
def test_where_it_may_be_gone_the_next_refresh_is_waited_for(
    tmp_path: Path, monkeypatch, changes, variables, is_refreshed: bool
):
    leave(tmp_path, **changes)
    file = tmp_path / "lock"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    waited = []

    def pass_time(seconds: float) -> None:
        """Make the file older, as time would."""
        waited.append(seconds)
        refreshed = file.stat().st_mtime - 9
        os.utime(file, None if is_refreshed and len(waited) == 3 else (refreshed, refreshed))

    monkeypatch.setattr(locks.time, "sleep", pass_time)
    assert is_held(tmp_path) == is_refreshed
    assert len(waited) == (3 if is_refreshed else 7)  # 6 x 9 s are not yet 60


def test_what_is_no_lock_yet_is_one_until_it_is_old(tmp_path: Path):
    (tmp_path / "lock").touch()  # by a process that is just writing it
    with pytest.raises(locks.LockedError, match="another process writes here"):
        locks.refuse_held(tmp_path, tmp_path / "lock")
    os.utime(tmp_path / "lock", (0, 0))
    assert not is_held(tmp_path)


def test_a_folder_that_cannot_be_written_to_still_names_its_owner(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    leave(tmp_path, host="zeus")
    monkeypatch.setattr(locks.tempfile, "TemporaryFile", refuse)
    with pytest.raises(locks.LockedError, match="on zeus writes here"):
        locks.refuse_held(tmp_path, tmp_path / "lock")
    os.utime(tmp_path / "lock", (0, 0))
    locks.refuse_held(tmp_path, tmp_path / "lock")  # so that the folder itself can be complained of


def test_a_lock_that_leads_nowhere_is_reported(tmp_path: Path):
    (tmp_path / "lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="lock: is a broken link"):
        is_held(tmp_path)


def test_disks_without_links_have_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with locks.held(tmp_path, tmp_path / "lock"):
        assert is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_after_an_error_but_not_by_a_forked_process(tmp_path: Path):
    def leave_block() -> None:
        holding.__exit__(None, None, None)

    holding = locks.held(tmp_path, tmp_path / "lock")
    holding.__enter__()
    child = multiprocessing.get_context("fork").Process(target=leave_block)
    child.start()
    child.join()
    assert (tmp_path / "lock").is_file()
    holding.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), locks.held(tmp_path, tmp_path / "lock"):
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []


def test_who_lost_its_folder_to_another_process_ends(tmp_path: Path):
    script = HOLD.replace("folder = Path", "locks.HEARTBEAT_SECONDS = 0.05\nfolder = Path")
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "holds\n"
    leave_text = json.dumps({**json.loads((tmp_path / "lock").read_text()), "token": "other"})
    (tmp_path / "new").write_text(leave_text)
    os.replace(tmp_path / "new", tmp_path / "lock")
    told = first.stderr.read()  # to its end
    first.communicate()
    assert first.returncode == 1
    assert "another process has taken this folder over" in told
    assert (tmp_path / "lock").read_text() == leave_text
