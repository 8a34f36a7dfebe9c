"""Checkpoints on disk: complete or absent, checked when read, independent of the engine.

A checkpoint is a folder ``PHASE-STEP``: ``model.safetensors`` (parameters and buffers, fp32),
``optimizer.safetensors`` (``NAME/exp_avg`` and so on, ``NAME/ema``) and ``state.json`` (what the
caller gives, the loss scale of fp16, and size and hash of the other two). Beside the folders, the
text files ``latest`` and ``best`` hold the name of one each. Rank 0 alone reads and writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigdet import distributed
from bigdet.engine.base import EMA, EngineState
from bigdet.host.files import file_sha256, put_in_place, sync, write_text
from bigdet.host.reading import patiently, why_unread
from bigdet.host.strict_json import to_json
from bigdet.ops.finite import describe_not_finite

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
ADOPTED_FILE = "adopted"
"""Is there where a checkpoint was copied from another run; it says from where."""
PARTIAL = ".part-"
"""Prefix of what is being written, or was when the process died."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back.

    Attributes:
        engine: weights and optimizer state; empty on ranks but 0.
        run: what the caller gave to ``save`` for ``state.json``.
        is_adopted: it was copied from another run.
    """

    engine: EngineState = field(default_factory=EngineState)
    run: dict[str, Any] = field(default_factory=dict)
    is_adopted: bool = False


def save(folder: Path, state: EngineState, metadata: dict[str, str], run: dict[str, Any]) -> None:
    """Write a checkpoint and make it the latest (rank 0 only; may run beside training).

    Args:
        folder: ``CHECKPOINTS/PHASE-STEP``; a checkpoint of that name is replaced.
        state: from the engine.
        metadata: of ``model.safetensors``.
        run: plain values for ``state.json``.

    Raises:
        ValueError: when it cannot be written; earlier checkpoints are untouched.
    """
    try:
        _write(folder, state, metadata, run)
    except (OSError, SafetensorError) as error:
        free_gib = shutil.disk_usage(_existing(folder.parent)).free / 2**30
        raise ValueError(
            f"{folder}: cannot write the checkpoint: {error}; {free_gib:.2f} GiB are free. "
            f"Earlier checkpoints are untouched; make room."
        ) from error


def load(folder: Path) -> Checkpoint:
    """Read and check a checkpoint. Called by all ranks; rank 0 reads.

    Raises:
        ValueError: on all ranks, naming the file that is missing, altered or not finite, and the
            newest checkpoint before this one that can be used.
    """
    checkpoint = Checkpoint()
    with distributed.together():
        if distributed.is_main():
            if not folder.exists() and _replaced(folder).exists():
                _replaced(folder).rename(folder)  # the process died while it was replaced
            try:
                run = _check_usable(folder)
            except ValueError as error:
                before = newest_usable(folder.parent, before=folder)
                advice = f"Go on with resume={before}" if before else "No earlier one can be used"
                raise ValueError(f"{error} {advice}.") from error
            scale = run.pop("loss_scale")
            is_adopted = (folder / ADOPTED_FILE).is_file()
            checkpoint = Checkpoint(_read_engine_state(folder, scale), run, is_adopted)
    told = distributed.broadcast_object((checkpoint.run, checkpoint.is_adopted))
    return Checkpoint(checkpoint.engine, *told)


def check(folder: Path) -> tuple[dict[str, Any], int]:
    """Check that the files of a checkpoint are those that were written.

    Returns:
        What the caller of ``save`` gave for ``state.json``, with ``loss_scale`` of the engine, and
        the checkpoint's number: 1 for the first that was written beside it, and so on.

    Raises:
        ValueError: naming the first file that is missing, cut short or altered.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hash_found, files, number = content.pop("sha256"), content["files"], content["number"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: missing, cut short or altered ({error!r}).") from error
    if _hash_of_json(content) != hash_found:
        raise ValueError(f"{path}: altered since it was written (its hash differs).")
    for name, written in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != written["bytes"]:
            found = "missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{file}: {found}, expected {written['bytes']} bytes.")
        if _hash_of_file(file) != written["sha256"]:
            raise ValueError(f"{file}: altered since it was written (its hash differs).")
    run = {key: value for key, value in content.items() if key not in ("files", "number")}
    return {"loss_scale": {}, **run}, number


def _check_usable(folder: Path) -> dict[str, Any]:
    """Check files as `check` does, and that all numbers are finite; return what it gives first."""
    run = check(folder)[0]
    for name in (MODEL_FILE, OPTIMIZER_FILE):  # one step would carry it into the weights
        _check_finite(folder / name)
    return run


def _check_finite(file: Path) -> None:
    if found := describe_not_finite(_read_tensors(file)):
        raise ValueError(f"{file}: {found}. The run had diverged.")


def newest_usable(checkpoints: Path, before: Path | None = None) -> Path | None:
    """Find the newest checkpoint that is intact and has finite numbers (rank 0 only).

    Args:
        checkpoints: the folder of all checkpoints.
        before: a checkpoint that cannot be used; only those written before it count.
    """
    numbers = _numbers(checkpoints)
    limit = max(numbers.values(), default=0) + 1
    if before is not None:
        numbers = {name: number for name, number in numbers.items() if name != before.name}
        limit = _numbers(checkpoints).get(before.name) or limit
    for name in sorted(numbers, key=lambda name: -numbers[name]):
        if numbers[name] < limit:
            try:
                _check_usable(checkpoints / name)
            except ValueError:
                continue
            return checkpoints / name
    return None


def adopt(folder: Path, checkpoints: Path) -> None:
    """Copy a checkpoint of another run in and make it the latest (rank 0 only).

    Raises:
        ValueError: its weights or optimizer state are not finite. Whether it is damaged is for
            `load` to tell.
    """
    with contextlib.suppress(OSError, SafetensorError):
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            _check_finite(folder / name)
    partial = checkpoints / f"{PARTIAL}{folder.name}"
    _delete(partial)
    checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    (partial / ADOPTED_FILE).write_text(f"{folder}\n", encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    put_in_place(partial, checkpoints / folder.name)
    write_text(checkpoints / "latest", f"{folder.name}\n")


def mark_best(folder: Path) -> None:
    """Let ``best`` name a checkpoint (rank 0 only)."""
    write_text(folder.parent / "best", f"{folder.name}\n")


def clean(
    checkpoints: Path, keep: int, protected: Collection[str], keep_every: int | None = None
) -> None:
    """Delete what is not needed: old checkpoints and what a crash has left (rank 0 only).

    Args:
        checkpoints: the folder of all checkpoints.
        keep: so many of the newest stay, beside the latest and the best.
        protected: names that stay too, such as the ends of phases.
        keep_every: checkpoints at steps that this divides stay too.
    """
    if not checkpoints.is_dir():
        return
    for leftover in checkpoints.glob(f"{PARTIAL}*"):
        _delete(leftover)
    numbers = _numbers(checkpoints)
    newest = sorted(numbers, key=lambda name: numbers[name])[-keep:] if keep else []
    named = [_read_name(checkpoints / "latest"), _read_name(checkpoints / "best")]
    milestones = [
        name for name in numbers if keep_every and int(name.rsplit("-", 1)[1]) % keep_every == 0
    ]
    for name in numbers.keys() - {*newest, *named, *protected, *milestones}:
        doomed = checkpoints / f"{PARTIAL}{name}"
        (checkpoints / name).rename(doomed)  # so that a crash here leaves no half a checkpoint
        _delete(doomed)


def _write(folder: Path, state: EngineState, metadata: dict[str, str], run: dict[str, Any]) -> None:
    """Write all files under a temporary name, then put the folder and ``latest`` in place."""
    assert not {"files", "number", "sha256", "loss_scale"} & run.keys(), run.keys()
    checkpoints = folder.parent
    partial = checkpoints / f"{PARTIAL}{folder.name}"
    _delete(partial)
    partial.mkdir(parents=True)
    try:
        optimizer = {
            f"{name}/{key}": value
            for name, values in state.optimizer.items()
            for key, value in values.items()
        }
        optimizer |= {f"{name}/{EMA}": value for name, value in state.ema.items()}
        save_file(state.model, partial / MODEL_FILE, metadata)
        save_file(optimizer, partial / OPTIMIZER_FILE)
        files = {
            name: {
                "bytes": (partial / name).stat().st_size,
                "sha256": _hash_of_file(partial / name),
            }
            for name in (MODEL_FILE, OPTIMIZER_FILE)
        }
        number = max(_numbers(checkpoints).values(), default=0) + 1
        content = {**run, "files": files, "number": number, "loss_scale": state.loss_scale}
        content = json.loads(to_json(content))
        content["sha256"] = _hash_of_json(content)
        (partial / STATE_FILE).write_text(to_json(content, indent=1), encoding="utf-8")
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
            sync(partial / name)
    except BaseException:
        _delete(partial)  # on a full disk its bytes are missed
        raise
    if folder.exists():
        _delete(_replaced(folder))
        folder.rename(_replaced(folder))  # a folder cannot be renamed over another one
    put_in_place(partial, folder)
    write_text(checkpoints / "latest", f"{folder.name}\n")
    _delete(_replaced(folder))


def _replaced(folder: Path) -> Path:
    """Where a checkpoint lies while one of the same name takes its place."""
    return folder.with_name(f"{PARTIAL}replaced-{folder.name}")


def _read_engine_state(folder: Path, loss_scale: dict[str, float]) -> EngineState:
    """Read the tensors of a checkpoint that has been checked."""
    optimizer: dict[str, dict[str, Tensor]] = {}
    ema: dict[str, Tensor] = {}
    for full_name, value in _read_tensors(folder / OPTIMIZER_FILE).items():
        name, key = full_name.rsplit("/", 1)
        if key == EMA:
            ema[name] = value
        else:
            optimizer.setdefault(name, {})[key] = value
    return EngineState(_read_tensors(folder / MODEL_FILE), optimizer, loss_scale, ema)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _numbers(checkpoints: Path) -> dict[str, int]:
    """Number of each complete checkpoint by name, 0 if its ``state.json`` is unreadable."""
    numbers = {}
    for path in checkpoints.glob(f"*/{STATE_FILE}"):
        if not path.parent.name.startswith(PARTIAL):
            try:
                number = json.loads(path.read_text(encoding="utf-8"))["number"]
                numbers[path.parent.name] = number if isinstance(number, int) else 0
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                numbers[path.parent.name] = 0
    return numbers


def _hash_of_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits; ``OSError`` where the system does not let it be read."""
    try:
        return patiently(lambda: file_sha256(path), str(path))
    except OSError as error:
        raise OSError(f"{path}: {why_unread(error)}") from error


def _hash_of_json(content: dict[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_name(path: Path) -> str:
    """The name that ``latest`` or ``best`` holds; empty if there is none."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)
