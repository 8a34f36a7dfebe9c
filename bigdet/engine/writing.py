"""A checkpoint while it is written: by all ranks, during training, complete with its last file.

Each rank writes its pieces and reports them to rank 0, which writes the index and, when all of it
is on the disk, ``state.json``: a save that any rank did not finish leaves the checkpoints before
it as they were. Where hosts share no disk, the first rank of each host that does not see the disk
of rank 0 writes the same index and ``state.json`` there, next to the pieces of its host.
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
from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.pieces.index import STATE_FILE, Index, Place, index_file, key_in, pieces_file
from bigdet.pieces.tensor_file import Spec, write_tensors

logger = logging.getLogger(__name__)

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
    probe = ""
    with distributed.together():
        if distributed.is_main():
            checkpoints.mkdir(parents=True, exist_ok=True)
            probe = f".seen-{os.getpid()}-{time.time_ns()}"
            (checkpoints / probe).touch()
    probe = distributed.broadcast_object(probe)
    found = distributed.all_gather_objects((socket.gethostname(), (checkpoints / probe).exists()))
    if distributed.is_main():
        (checkpoints / probe).unlink()
    first: dict[str, int] = {}
    for rank, (host, is_seen) in enumerate(found):
        if not is_seen:
            first.setdefault(host, rank)
    return Disks(
        [0 if is_seen else first[host] for host, is_seen in found], [host for host, _ in found]
    )


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
    rank, others = distributed.rank(), range(1, distributed.world_size())
    notes = messages.Notes() if others else None
    report = _explained(save, lambda: _write_pieces(save, share))
    if notes is None or rank == 0:
        reports = [report]
        if notes is not None:
            reports += [json.loads(notes.take(f"{save.notes}/from {k}", must_end)) for k in others]
        verdict = _explained(save, lambda: _complete(save, share, reports))
        for owner in set(save.disks.owners) - {0}:
            assert notes is not None
            notes.leave(f"{save.notes}/to {owner}", json.dumps(verdict))
    else:
        notes.leave(f"{save.notes}/from {rank}", json.dumps(report))
        verdict = report
        if save.disks.is_owner:
            verdict = json.loads(notes.take(f"{save.notes}/to {rank}", must_end))
            _explained(save, lambda: _finish(save, verdict))
    if "problem" in verdict:
        if save.disks.is_owner:
            _discard(save)
        raise ValueError(verdict["problem"])


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


def _complete(save: Save, share: Share, reports: Sequence[Report]) -> Report:
    """Put the checkpoint together from what all ranks reported, and finish it (rank 0)."""
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
    verdict = {"index": index, "state": to_json(content, indent=1), "files": list(files)}
    _finish(save, verdict)
    return verdict


def _finish(save: Save, verdict: Report) -> None:
    """Write the index and, last, ``state.json``; what the folder had before goes."""
    if "problem" in verdict:
        return
    save.folder.mkdir(parents=True, exist_ok=True)
    write_text(save.folder / index_file(save.number), verdict["index"])
    if (save.folder / STATE_FILE).is_file():  # what was made of the old pieces, if anything was
        named = [*keeping.named_files(save.folder), *verdict["files"]]
        keeping.remove_unnamed(save.folder, named)
    write_text(save.folder / STATE_FILE, verdict["state"])
    keeping.mark_latest(save.folder)
    keeping.remove_unnamed(save.folder, verdict["files"])


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
