"""A checkpoint while it is written: by all ranks, during training, complete with its last file.

Each rank writes its pieces and reports them to rank 0, which writes the index and, when all of it
is on the disk, ``state.json``: a save that any rank did not finish leaves the checkpoints before
it as they were. Where hosts share no disk, the first rank of each other disk writes the same index
and ``state.json`` there, next to the pieces of its host: rank 0 completes the checkpoint once all
of it is on all disks, and only then do the others give their ``state.json`` its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigdet import distributed, messages
from bigdet.engine import keeping
from bigdet.engine.parts import Share
from bigdet.host.files import put_in_place, sync, write_text
from bigdet.host.strict_json import to_json
from bigdet.pieces.index import STATE_FILE, Index, Place, index_file, key_in, pieces_file
from bigdet.pieces.tensor_file import Spec, write_tensors

logger = logging.getLogger(__name__)

UNNAMED = f"{STATE_FILE}.tmp"

Report = dict[str, Any]
"""What a rank reports of its file to rank 0: ``file``, ``bytes``, ``sha256`` and ``pieces`` (kind,
name, first, count); or its ``problem``."""


@dataclass(frozen=True)
class Disks:
    """Which ranks write to the same disk.

    Attributes:
        owners: for each rank, the first rank that writes to its disk: 0 for all, if all share it.
        hosts: of each rank.
    """

    owners: Sequence[int] = (0,)
    hosts: Sequence[str] = ("",)

    @property
    def is_owner(self) -> bool:
        """Whether this rank looks after the folder of checkpoints on its disk."""
        return self.owners[distributed.rank()] == distributed.rank()

    @property
    def sharing(self) -> list[int]:
        """The ranks that write to this rank's disk."""
        own = self.owners[distributed.rank()]
        return [rank for rank, owner in enumerate(self.owners) if owner == own]


def find_disks(checkpoints: Path) -> Disks:
    """Find out which ranks see the same folder of checkpoints (collective)."""
    rank = distributed.rank()
    begin = distributed.broadcast_object(f".seen-{os.getpid()}-{time.time_ns()}")
    probe = checkpoints / f"{begin}-{rank}"

    def leave_probe() -> None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        probe.touch()

    with distributed.together():
        if rank == 0:
            leave_probe()
    owner = 0
    with distributed.together():
        if not (checkpoints / f"{begin}-0").exists():
            owner = rank
            leave_probe()
    if owner:  # names of hosts may be alike, and two hosts may share a disk that rank 0 lacks
        owner = min(int(path.name.rsplit("-", 1)[1]) for path in checkpoints.glob(f"{begin}-*"))
    found = distributed.all_gather_objects((owner, socket.gethostname()))
    probe.unlink(missing_ok=True)
    return Disks([owner for owner, _ in found], [host for _, host in found])


def align(checkpoints: Path, disks: Disks) -> None:
    """Complete on the other disks what is complete on that of rank 0 (collective).

    A process that was killed may not have given its ``state.json`` its name. Without it, the files
    of a checkpoint that the run continues from would count as leftovers.
    """
    if set(disks.owners) == {0}:
        return
    states = {}
    with distributed.together():
        if distributed.is_main():
            for name, number in keeping.numbers(checkpoints).items():
                if number:
                    states[name] = (checkpoints / name / STATE_FILE).read_text(encoding="utf-8")
    states = distributed.broadcast_object(states)
    with distributed.together():
        if disks.is_owner and not distributed.is_main():
            own = keeping.numbers(checkpoints)
            for name, text in states.items():
                content = json.loads(text)
                is_here = any((checkpoints / name / file).is_file() for file in content["files"])
                if is_here and own.get(name) != content["number"]:
                    write_text(checkpoints / name / STATE_FILE, text)


@dataclass(frozen=True)
class Save:
    """One save, alike on all ranks but for what rank 0 alone has to know.

    Attributes:
        folder: ``CHECKPOINTS/PHASE-STEP``.
        number: of the checkpoint in its run: 1 for the first, and so on.
        disks: of the ranks.
        metadata: of the weights (rank 0).
        run: plain values for ``state.json`` (rank 0).
        attempt: number of the save in this process; a save that failed gives its number back.
    """

    folder: Path
    number: int
    disks: Disks = field(default_factory=Disks)
    metadata: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0

    @property
    def notes(self) -> str:
        """What the names of its notes begin with."""
        return f"save {self.attempt} {self.number}"


def next_number(checkpoints: Path) -> int:
    """Return the number of the next checkpoint of a run."""
    return max(keeping.numbers(checkpoints).values(), default=0) + 1


def write(save: Save, share: Share, must_end: Callable[[], bool] = lambda: False) -> None:
    """Write this rank's part of a checkpoint, on rank 0 also the rest, and make it the latest.

    Called on all ranks, by threads or not; no collective.

    Args:
        save: what is written.
        share: of this rank.
        must_end: tells when to wait for the other ranks no longer.

    Raises:
        ValueError: it cannot be written, by rank 0 or (on rank 0) by another one; earlier
            checkpoints are untouched.
        DistError: the other ranks are not heard of.
    """
    post = _Post(save, must_end)
    report = _explained(save, lambda: _write_pieces(save, share))
    if distributed.is_main():
        result = _complete(save, share, report, post)
    else:
        post.send(f"from {distributed.rank()}", report)
        result = _follow(save, post) if save.disks.is_owner else report
    if "problem" in result:
        raise ValueError(result["problem"])


@dataclass(frozen=True)
class _Post:
    """Reports between rank 0 and the others."""

    save: Save
    must_end: Callable[[], bool]

    def send(self, name: str, report: Report) -> None:
        messages.Notes().leave(f"{self.save.notes}/{name}", json.dumps(report))

    def get(self, *names: str) -> list[Report]:
        notes = messages.Notes() if names else None
        paths = [f"{self.save.notes}/{name}" for name in names]
        return [json.loads(notes.take(path, self.must_end)) for path in paths if notes is not None]


def _complete(save: Save, share: Share, report: Report, post: _Post) -> Report:
    """Complete a checkpoint once it is on all disks (rank 0)."""
    others = range(1, distributed.world_size())
    owners = sorted(set(save.disks.owners) - {0})
    reports = [report, *post.get(*(f"from {rank}" for rank in others))]
    plan = _explained(save, lambda: _put_together(save, share, reports))
    for owner in owners:
        post.send(f"to {owner}", plan)
    if "problem" not in plan:
        prepared = [
            _explained(save, lambda: _prepare(save, plan)),
            *post.get(*(f"ready {owner}" for owner in owners)),
        ]
        failed = [report for report in prepared if "problem" in report]
        outcome = failed[0] if failed else _explained(save, lambda: _name(save, plan))
        for owner in owners:
            post.send(f"end {owner}", outcome)
        if "problem" not in outcome:
            return _explained(save, lambda: _tidy(save, plan))
        plan = outcome
    _discard(save)
    return plan


def _follow(save: Save, post: _Post) -> Report:
    """Do the same on another disk: all that may fail before rank 0 completes the checkpoint."""
    rank = distributed.rank()
    (plan,) = post.get(f"to {rank}")
    if "problem" not in plan:
        post.send(f"ready {rank}", _explained(save, lambda: _prepare(save, plan)))
        (outcome,) = post.get(f"end {rank}")
        if "problem" not in outcome:
            report = _explained(save, lambda: _name(save, plan))
            return report or _explained(save, lambda: _tidy(save, plan))
        plan = outcome
    _discard(save)
    return plan


def _explained(save: Save, work: Callable[[], Report | None]) -> Report:
    """Do a part of a save; what fails becomes a report, for which other ranks wait."""
    try:
        return work() or {}
    except ValueError as error:
        return {"problem": str(error)}
    except OSError as error:
        free_gib = shutil.disk_usage(_existing(save.folder)).free / 2**30
        host = f" (rank {distributed.rank()} on {socket.gethostname()})"
        return {
            "problem": f"{save.folder}: cannot write the checkpoint: {error}; {free_gib:.2f} GiB "
            f"are free{host if distributed.world_size() > 1 else ''}. Earlier checkpoints are "
            f"untouched; make room."
        }
    except Exception as error:
        logger.exception("%s: the checkpoint is not written", save.folder)
        return {"problem": f"{save.folder}: cannot write the checkpoint: {error!r}."}


def _write_pieces(save: Save, share: Share) -> Report:
    """Write the file of this rank, if it has anything to write."""
    listed = [(piece.kind, piece.name, piece.first, len(piece.values)) for piece in share.pieces]
    if not listed:
        return {"pieces": []}
    file = pieces_file(save.number, distributed.rank())
    specs = {
        key_in(file, kind, name, first): Spec(share.catalog[kind][name].dtype, (count,))
        for kind, name, first, count in listed
    }
    save.folder.mkdir(parents=True, exist_ok=True)
    path = save.folder / file
    digest = write_tensors(path, specs, (piece.values for piece in share.pieces))
    return {"file": file, "bytes": path.stat().st_size, "sha256": digest, "pieces": listed}


def _put_together(save: Save, share: Share, reports: Sequence[Report]) -> Report:
    """Make index and ``state.json`` of what all ranks reported (rank 0)."""
    for report in reports:
        if "problem" in report:
            raise ValueError(report["problem"])
    assert not {"files", "number", "sha256", "loss_scale"} & save.run.keys(), save.run.keys()
    places: dict[tuple[str, str], list[Place]] = {}
    files: dict[str, dict[str, Any]] = {}
    for rank, report in enumerate(reports):
        for kind, name, first, count in report["pieces"]:
            places.setdefault((kind, name), []).append(Place(first, count, report["file"]))
        if report["pieces"]:
            files[report["file"]] = {key: report[key] for key in ("bytes", "sha256")}
            if save.disks.owners[rank] != 0:
                files[report["file"]]["host"] = save.disks.hosts[rank]
    index = Index(share.catalog, places, save.metadata).to_json()
    encoded = index.encode()
    files[index_file(save.number)] = {
        "bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest(),
    }  # fmt: skip
    content = {
        **save.run, "files": files, "number": save.number, "loss_scale": share.loss_scale,
    }  # fmt: skip
    content = json.loads(to_json(content))
    content["sha256"] = hash_of_json(content)
    return {"index": index, "state": to_json(content, indent=1), "files": list(files)}


def _prepare(save: Save, plan: Report) -> None:
    """Write the index and, under another name, ``state.json``."""
    save.folder.mkdir(parents=True, exist_ok=True)
    write_text(save.folder / index_file(save.number), plan["index"])
    (save.folder / UNNAMED).write_text(plan["state"], encoding="utf-8")
    sync(save.folder / UNNAMED)


def _name(save: Save, plan: Report) -> None:
    """Give ``state.json`` its name: from now on the checkpoint is complete."""
    if (save.folder / STATE_FILE).is_file():  # what was made of the old pieces, if anything was
        named = [*keeping.named_files(save.folder), *plan["files"], UNNAMED]
        keeping.remove_unnamed(save.folder, named)
    put_in_place(save.folder / UNNAMED, save.folder / STATE_FILE)


def _tidy(save: Save, plan: Report) -> None:
    """Let ``latest`` name the checkpoint; what the folder had before goes."""
    keeping.mark_latest(save.folder)
    keeping.remove_unnamed(save.folder, plan["files"])


def _discard(save: Save) -> None:
    """Delete what a save that failed has left on this disk: on a full one its bytes are missed."""
    if save.folder.is_dir():
        keeping.remove_leftovers(save.folder.parent)


def hash_of_json(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)
