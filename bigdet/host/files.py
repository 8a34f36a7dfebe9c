"""Files that are complete or absent, and on the disk before anyone relies on them; hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a small file completely or not at all, creating its folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, file)


def put_in_place(temporary: Path, file: Path) -> None:
    """Rename what is written completely, so that not even a power cut leaves a part of it.

    Args:
        temporary: a file, or a folder whose files are on the disk; on the same file system.
        file: its name from now on; a file of that name is replaced.
    """
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path, option: str) -> None:
    """Make a folder and try to write into it, so that this fails before the work and not after it.

    Args:
        folder: where a command writes.
        option: name of the option with the folder, for the message.

    Raises:
        ValueError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        reason = "is a file" if folder.is_file() else f"cannot be written to: {error.strerror}"
        raise ValueError(f"{option}: {folder}: {reason}. Give a folder to write to.") from error


def check_file(file: Path, option: str) -> None:
    """Raise ``ValueError`` where a command will not be able to write a file; see `check_folder`."""
    if file.is_dir():
        raise ValueError(f"{option}: {file} is a folder. Give the name of a file.")
    check_folder(file.parent, option)
