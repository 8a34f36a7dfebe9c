"""Checkpoints that are read: complete, checked by all ranks together, independent of the engine.

`pieces/index.py` says what is in the folder of a checkpoint, `writing.py` writes it, `keeping.py`
looks after the folders of a run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigdet import distributed
from bigdet.engine import keeping
from bigdet.engine.keeping import PARTIAL
from bigdet.engine.writing import hash_of_json
from bigdet.host.files import file_sha256, put_in_place, sync
from bigdet.host.reading import patiently, why_unread
from bigdet.ops.finite import describe_not_finite
from bigdet.pieces.index import STATE_FILE, Index, is_index, read_index, read_state
from bigdet.pieces.reading import Stored
from bigdet.pieces.tensor_file import TensorFile

ADOPTED_FILE = "adopted"
"""Is there where a checkpoint was copied from another run; it says from where, and its number."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back, the same on all ranks.

    Attributes:
        engine: weights and optimizer state, which engines read parts of.
        run: what the caller gave to ``save`` for ``state.json``.
        is_adopted: it was copied from another run.
    """

    engine: Stored = field(default_factory=lambda: Stored(Path(), Index({}, {})))
    run: dict[str, Any] = field(default_factory=dict)
    is_adopted: bool = False


def load(folder: Path) -> Checkpoint:
    """Check a checkpoint and open it. Called by all ranks, which share the work (collective).

    Raises:
        SharedError: naming the file that is missing, altered or not finite, and the newest
            checkpoint before this one that can be used.
    """
    content: dict[str, Any] = {}
    problem, is_adopted = "", False
    with distributed.together():
        if distributed.is_main():
            keeping.undo_replacement(folder)
            try:
                content = _checked_state(folder)
            except ValueError as error:
                problem = str(error)
            is_adopted = _is_adopted(folder, content)
    problem, content, is_adopted = distributed.broadcast_object((problem, content, is_adopted))
    problem = problem or _check_files_together(folder, content["files"])
    if problem:
        before = None
        if distributed.is_main():
            before = newest_usable(folder.parent, before=folder)
        before = distributed.broadcast_object(before)
        advice = f"Go on with resume={before}" if before else "No earlier one can be used"
        raise distributed.SharedError(f"{problem} {advice}.")
    index = Index({}, {})
    if distributed.is_main():
        index = read_index(folder, content["files"])
    stored = Stored(folder, distributed.broadcast_object(index), content.get("loss_scale"))
    run = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    return Checkpoint(stored, run, is_adopted)


_OWN_KEYS = ("files", "number", "loss_scale")


def _check_files_together(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """Check each file on one of the ranks that see it; return what is wrong with the first."""
    problem = ""
    own = [name for name in files if (folder / name).is_file()]
    everywhere = distributed.all_gather_objects(own)
    with distributed.together():
        for number, (name, written) in enumerate(files.items()):
            seeing = [rank for rank, names in enumerate(everywhere) if name in names] or [0]
            if seeing[number % len(seeing)] == distributed.rank():
                try:
                    _check_file(folder, name, written)
                except ValueError as error:
                    problem = str(error)
                    break
    return next(filter(None, distributed.all_gather_objects(problem)), "")


def check(folder: Path) -> dict[str, Any]:
    """Check that the files of a checkpoint on this host are those that were written, and finite.

    Returns:
        The content of ``state.json``.

    Raises:
        ValueError: naming the first file that is missing, cut short, altered or not finite.
    """
    content = _checked_state(folder)
    for name, written in content["files"].items():
        if "host" not in written or (folder / name).is_file():
            _check_file(folder, name, written)
    return content


def _checked_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` and the index, and check them."""
    content = dict(read_state(folder))
    if hash_of_json({key: value for key, value in content.items() if key != "sha256"}) != (
        content.pop("sha256", None)
    ):
        raise ValueError(f"{folder / STATE_FILE}: altered since it was written (its hash differs).")
    for name in filter(is_index, content["files"]):
        _check_file(folder, name, content["files"][name])
    return content


def _check_file(folder: Path, name: str, written: Mapping[str, Any]) -> None:
    """Check size and hash of a file, and that all its numbers are finite."""
    file = folder / name
    size = file.stat().st_size if file.is_file() else None
    if size is None or size != written["bytes"]:
        found = "missing" if size is None else f"has {size} bytes"
        host = f" (written on {written['host']})" if "host" in written else ""
        raise ValueError(f"{file}: {found}, expected {written['bytes']} bytes{host}.")
    if _hash_of_file(file) != written["sha256"]:
        raise ValueError(f"{file}: altered since it was written (its hash differs).")
    if not is_index(name):
        _check_finite(TensorFile(file))


def _check_finite(tensors: TensorFile) -> None:
    """Check the numbers of a file: one step would carry it into the weights."""
    if found := describe_not_finite(tensors):
        raise ValueError(f"{tensors.path}: {found}. The run had diverged.")


def newest_usable(checkpoints: Path, before: Path | None = None) -> Path | None:
    """Find the newest checkpoint that is intact and has finite numbers (one rank).

    Args:
        checkpoints: the folder of all checkpoints.
        before: a checkpoint that cannot be used; only those written before it count.
    """
    numbers = keeping.numbers(checkpoints)
    limit = max(numbers.values(), default=0) + 1
    if before is not None:
        limit = numbers.pop(before.name, 0) or limit
    for name in sorted(numbers, key=lambda name: -numbers[name]):
        if numbers[name] < limit:
            with contextlib.suppress(ValueError):
                check(checkpoints / name)
                return checkpoints / name
    return None


def adopt(folder: Path, checkpoints: Path) -> None:
    """Copy a checkpoint of another run in and make it the latest (rank 0 only).

    It takes the place of a copy that an earlier start made, which was refused or killed then.

    Raises:
        ValueError: its weights or optimizer state are not finite. Whether it is damaged is for
            `load` to find.
    """
    for name in keeping.named_files(folder):
        try:
            tensors = TensorFile(folder / name)
        except (OSError, ValueError):
            continue
        _check_finite(tensors)
    partial = checkpoints / f"{PARTIAL}{folder.name}"
    keeping.delete(partial)
    checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    number = keeping.numbers(folder.parent).get(folder.name)
    (partial / ADOPTED_FILE).write_text(f"{folder}\n{number}\n", encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    (checkpoints / "latest").unlink(missing_ok=True)
    for file in checkpoints.glob(f"*/{ADOPTED_FILE}"):
        if file.parent != partial:
            keeping.delete(file.parent)
    put_in_place(partial, checkpoints / folder.name)
    keeping.mark_latest(checkpoints / folder.name)


def is_copy(folder: Path) -> bool:
    """Tell whether a checkpoint was copied from another run, and not written again since."""
    return _is_adopted(folder, {"number": keeping.numbers(folder.parent).get(folder.name)})


def _is_adopted(folder: Path, content: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint is a copy, and not one that was written over the copy."""
    file = folder / ADOPTED_FILE
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return len(lines) == 1 or (len(lines) == 2 and lines[1] == str(content.get("number")))


def _hash_of_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits; ``OSError`` where the system does not let it be read."""
    try:
        return patiently(lambda: file_sha256(path), str(path))
    except OSError as error:
        raise OSError(f"{path}: {why_unread(error)}") from error
