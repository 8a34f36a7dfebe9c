"""One process at a time writes into a folder: a lock file there says who, where and since when.

Whether a process of this host has ended is certain, even if its number was given to another one
since: from the start of the process, the boot of the host, and the container. For another host (or
container) only the file's time is known, which its owner refreshes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0  # between two refreshes
STALE_SECONDS = 60.0  # without a refresh, after which an owner elsewhere counts as gone
POLL_SECONDS = 1.0
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LockedError(ValueError):
    """Another process writes into a folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as the file has it.

    Attributes:
        host: its name.
        boot: id of the kernel's boot; two hosts may have the same name.
        container: the space of process numbers that ``pid`` belongs to.
        pid: number of the process.
        start: when that process began, as the system writes it; empty if it does not say.
        since: local time for people.
        token: unique to this lock.
    """

    host: str
    boot: str
    container: str
    pid: int
    start: str
    since: str
    token: str

    @classmethod
    def here(cls) -> Owner:
        """Return this process, as the owner of a new lock."""
        boot = container = ""
        with contextlib.suppress(OSError):  # not on macOS
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            container = os.readlink("/proc/self/ns/pid")
        pid, since = os.getpid(), datetime.now().astimezone().isoformat(" ", "seconds")
        start = _start_of(pid) or ""
        return cls(socket.gethostname(), boot, container, pid, start, since, uuid.uuid4().hex)

    def is_running(self) -> bool | None:
        """Return whether the process still runs; None if that cannot be seen from here."""
        here = Owner.here()
        if (self.host, self.boot, self.container) != (here.host, here.boot, here.container):
            return None
        start = _start_of(self.pid)
        return start is not None and (start == self.start or "" in (start, self.start))


class _Lock:
    """A lock that this process holds; a thread refreshes its time."""

    def __init__(self, file: Path, text: str) -> None:
        self._file, self._text = file, text
        self._pid = os.getpid()
        self._is_over = threading.Event()
        threading.Thread(target=self._refresh, daemon=True).start()

    def release(self) -> None:
        """Remove the file."""
        if os.getpid() == self._pid:  # not in a forked process
            self._is_over.set()
            with contextlib.suppress(OSError):
                if _read(self._file) == self._text:
                    self._file.unlink()

    def _refresh(self) -> None:
        while not self._is_over.wait(HEARTBEAT_SECONDS):
            try:
                text = _read(self._file)
                if text is None:
                    return  # removed by hand, or with the folder
                if text == self._text:
                    os.utime(self._file)
                elif not self._is_over.is_set():
                    logger.error(
                        f"{self._file}: another process has taken this folder over, as the lock "
                        f"was not refreshed for {STALE_SECONDS:g} s. This one ends."
                    )
                    os._exit(1)
            except OSError:
                continue  # a file system that does not answer now


@contextlib.contextmanager
def held(folder: Path, file: Path) -> Iterator[None]:
    """Hold the lock file of a folder inside the block.

    Args:
        folder: where the holder writes, for messages.
        file: in this folder, or in an existing folder inside it.

    Raises:
        LockedError: another process holds it; nothing in the folder has changed.
    """
    lock = _take(folder, file)
    try:
        yield
    finally:
        lock.release()


def refuse_held(folder: Path, file: Path) -> None:
    """Raise ``LockedError`` if another process holds the lock file of a folder; see ``held``."""
    text = _read(file)
    if text is not None and _is_alive(file, text):
        raise LockedError(_message(folder, file, text))


def _take(folder: Path, file: Path) -> _Lock:
    """Make the lock file, or replace that of a process that is gone; of several starts one wins."""
    text = json.dumps(asdict(Owner.here()), indent=1) + "\n"
    while True:
        found = _read(file)
        if found is None:
            if file.is_symlink():
                raise ValueError(f"{file}: is a broken link. Remove it.")
            taken = _create(file, text)
        elif _is_alive(file, found):
            raise LockedError(_message(folder, file, found))
        else:
            taken = _replace(file, found, text)
        if taken:
            return _Lock(file, text)


def _read(file: Path) -> str | None:
    """Return what a lock file holds; None if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _create(file: Path, text: str) -> bool:
    """Create a lock file, with all of its content at once; False if there is one now."""
    with _temporary(file, text) as written:
        try:
            os.link(written, file)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
    try:
        with open(file, "x", encoding="utf-8") as opened:  # some file systems have no links
            opened.write(text)
        return True
    except FileExistsError:
        return False


def _replace(file: Path, found: str, text: str) -> bool:
    """Replace the lock of a process that is gone; False if another start did so meanwhile."""
    try:
        with open(file, "r+b") as old, _temporary(file, text) as written:
            with contextlib.suppress(OSError):  # some network file systems have no such locks
                fcntl.flock(old, fcntl.LOCK_EX)
            if _read(file) != found:
                return False
            os.replace(written, file)
    except FileNotFoundError:
        return False
    logger.warning("%s: was left by a process that is gone; taken over", file)
    return True


@contextlib.contextmanager
def _temporary(file: Path, text: str) -> Iterator[Path]:
    """Yield a complete file with the text in the same folder; it is deleted at the end."""
    path = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        path.write_text(text, encoding="utf-8")
        yield path
    finally:
        path.unlink(missing_ok=True)


def _is_alive(file: Path, text: str) -> bool:
    """Return whether the owner of a lock still runs, waiting if that takes a while to see."""
    owner = _owner(text)
    running = None if owner is None else owner.is_running()
    if running is not None:
        return running
    age = _age(file)
    if owner is None or age > STALE_SECONDS or not _may_be_gone(owner):
        return age <= STALE_SECONDS
    logger.warning(
        f"{file.parent}: waiting up to {STALE_SECONDS:.0f} s to see whether process {owner.pid} on "
        f"{owner.host}, which began before this one, still writes here"
    )
    seen = age
    while 0 <= seen <= STALE_SECONDS:
        time.sleep(POLL_SECONDS)
        before, seen = seen, _age(file)
        if seen < before:  # refreshed
            return _read(file) is not None
    return False


def _may_be_gone(owner: Owner) -> bool:
    """Return whether an owner elsewhere may be this run, restarted or in a new container.

    A launcher that starts its ranks again, maybe with rank 0 on another host, would give up after a
    few refusals.
    """
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    again = any(os.environ.get(name, "0") != "0" for name in restarts)
    return again or owner.host == socket.gethostname()


def _age(file: Path) -> float:
    """Return the seconds since a lock was refreshed, by the clock of its disk; -1 if it is gone."""
    try:
        refreshed = file.stat().st_mtime
    except FileNotFoundError:
        return -1.0
    now = time.time()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=file.parent) as probe:
        now = os.fstat(
            probe.fileno()
        ).st_mtime  # if nothing can be written, this host's clock counts
    return max(0.0, now - refreshed)


def _owner(text: str) -> Owner | None:
    """Read the content of a lock file; None where it is not (yet) one."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) and owner.pid > 0 else None


def _message(folder: Path, file: Path, text: str) -> str:
    owner = _owner(text)
    if owner is None:
        who = "another process writes here"
    else:
        who = f"process {owner.pid} on {owner.host} writes here, since {owner.since}"
    hint = ""
    if owner is None or owner.is_running() is None:
        hint = (
            f" If it is gone, start again {STALE_SECONDS:.0f} s after it last refreshed the file "
            f"{file.name}."
        )
    return f"{folder}: {who}. Wait for it to end, stop it, or give another folder.{hint}"


def _start_of(pid: int) -> str | None:
    """Return when a process began; empty if the system does not say, None if it has ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it exists, of another user
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "" if Path("/proc/self").exists() else _start_by_ps(pid)
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # ended and not yet collected; clock ticks


def _start_by_ps(pid: int) -> str:
    """Return when a process began, from ``ps``: macOS has no ``/proc``."""
    words = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
