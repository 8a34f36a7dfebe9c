"""The checkpoints of a run next to each other: which are complete, which stay, which go.

A folder ``PHASE-STEP`` with a ``state.json`` is a complete checkpoint. Next to the folders, the
text files ``latest`` and ``best`` hold the name of one each. One rank of each disk calls this.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from bigdet.host.files import write_text
from bigdet.pieces.index import STATE_FILE, is_index, is_pieces, read_state

PARTIAL = ".part-"
"""Prefix of what is being deleted or copied, or was when the process died."""


def mark_best(folder: Path) -> None:
    """Let ``best`` name a checkpoint."""
    write_text(folder.parent / "best", f"{folder.name}\n")


def mark_latest(folder: Path) -> None:
    """Let ``latest`` name a checkpoint."""
    write_text(folder.parent / "latest", f"{folder.name}\n")


def read_mark(checkpoints: Path, mark: str) -> str:
    """Return the name that ``latest`` or ``best`` holds; empty if there is none."""
    path = checkpoints / mark
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def numbers(checkpoints: Path) -> dict[str, int]:
    """Number of each complete checkpoint by name, 0 if its ``state.json`` is unreadable."""
    found = {}
    for path in checkpoints.glob(f"*/{STATE_FILE}"):
        if not path.parent.name.startswith(PARTIAL):
            try:
                number = read_state(path.parent)["number"]
                found[path.parent.name] = number if isinstance(number, int) else 0
            except (ValueError, KeyError):
                found[path.parent.name] = 0
    return found


def clean(
    checkpoints: Path, keep: int, protected: Collection[str], keep_every: int | None = None
) -> None:
    """Delete what is not needed: old checkpoints and what a crash has left.

    Args:
        checkpoints: the folder of all checkpoints.
        keep: so many of the newest stay, besides the latest and the best.
        protected: names that stay too, such as the ends of phases.
        keep_every: checkpoints at steps that this divides stay too.
    """
    if not checkpoints.is_dir():
        return
    remove_leftovers(checkpoints)
    found = numbers(checkpoints)
    newest = sorted(found, key=lambda name: found[name])[-keep:] if keep else []
    named = [read_mark(checkpoints, "latest"), read_mark(checkpoints, "best")]
    for name in found.keys() - {*newest, *named}:
        if stays(name, protected, keep_every):
            continue
        doomed = checkpoints / f"{PARTIAL}{name}"
        os.replace(checkpoints / name, doomed)  # so that a crash here leaves no half a checkpoint
        delete(doomed)


def stays(name: str, protected: Collection[str], keep_every: int | None) -> bool:
    """Tell whether a checkpoint stays however old it is; see `clean`."""
    step = name.rpartition("-")[2]
    is_milestone = keep_every is not None and step.isdecimal() and int(step) % keep_every == 0
    return name in protected or is_milestone


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what saves and deletions that did not end have left; no save may be under way."""
    for folder in checkpoints.glob("*/"):
        if folder.name.startswith(PARTIAL):
            if not is_replaced(folder):
                delete(folder)
        elif (folder / STATE_FILE).is_file():
            remove_unnamed(folder, named_files(folder), only_pieces=True)
        elif all(is_of_a_save(path.name) for path in folder.iterdir()):
            delete(folder)  # what else has no state.json is not ours


def named_files(folder: Path) -> Collection[str]:
    """Return the files that the ``state.json`` of a checkpoint names; none if it is unreadable."""
    try:
        return list(read_state(folder)["files"])
    except ValueError:
        return []


def remove_unnamed(folder: Path, named: Collection[str], only_pieces: bool = False) -> None:
    """Delete what is in the folder of a checkpoint and not a part of it.

    Args:
        folder: of the checkpoint.
        named: what stays, besides ``state.json``.
        only_pieces: so does all but the pieces and index of another save.
    """
    for path in folder.iterdir():
        if path.name not in (STATE_FILE, *named) and (is_of_a_save(path.name) or not only_pieces):
            delete(path)


def is_of_a_save(name: str) -> bool:
    """Tell whether a file of a checkpoint is, or was to become, a part of it."""
    return is_pieces(name) or is_index(name) or name.endswith(".tmp")


def is_replaced(folder: Path) -> bool:
    """Tell whether a folder is all that a crash of an earlier version has left of a checkpoint."""
    name = folder.name.removeprefix(f"{PARTIAL}replaced-")
    return name != folder.name and not folder.with_name(name).exists()


def undo_replacement(folder: Path) -> None:
    """Put a checkpoint back that an earlier version was about to replace when it died."""
    replaced = folder.with_name(f"{PARTIAL}replaced-{folder.name}")
    if not folder.exists() and replaced.exists():
        os.replace(replaced, folder)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
