"""A source of samples to a shard set: in parallel, resumable, in parts over machines.

Which samples go into which tar is planned first, from the sizes of the files, so the bytes depend
on neither the number of processes nor on what was there before. While a set is in the making:

    DIR/.unfinished/plan.json      what is being made; another input or other options are refused
    DIR/000012.tar                 complete
    DIR/.unfinished/000012.json    written after it: its hash and index records, so it is finished

When all tars are finished, ``skipped.jsonl``, ``index.npy`` and at last ``manifest.json`` are
written from these, and ``.unfinished`` is removed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bigdet.data.format.manifest import Category, Manifest, Shard, ShardError
from bigdet.data.format.shard_set import INDEX_DTYPE
from bigdet.data.making.processes import Tick, run_jobs, useful_processes
from bigdet.data.making.reencoding import Reencoding, reencode
from bigdet.data.making.shard_tar import FinishedShard, SampleLog, ShardTar, stored_bytes
from bigdet.data.making.shard_writer import (
    SetInfo,
    category_values,
    only_log,
    shard_name,
    summarize,
    write_summary,
)
from bigdet.data.making.storage import (
    PLAN_NAME,
    UNFINISHED,
    Storage,
    open_storage,
    open_unused,
    refuse_shards,
)
from bigdet.pictures.pixels import Exif

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class MadeSample:
    """One image that can be used; see ``shard_set.Sample``.

    Attributes:
        image_bytes: those of the file, or of a PNG if tars do not hold its format.
        pixels: ``(H, W, 3)`` uint8, decoded and turned.
        orientation: how they were turned.
        record: its annotations.
    """

    image_bytes: bytes
    pixels: NDArray[np.uint8]
    orientation: int
    record: dict[str, Any]


class Span(Protocol):
    """Some consecutive samples of a source, small enough to be sent to another process."""

    def samples(self, log: SampleLog) -> Iterator[MadeSample | None]:
        """Yield one sample after the other; None after noting in the log why one is left out."""


class Source(Protocol):
    """What can be converted; its samples have a fixed order.

    Attributes:
        info: for the manifest.
        notes: what was left out so far, lines for ``skipped.jsonl``.
        file_bytes: ``(N,)`` int64, size of each image's file, 0 if it is absent.
        annotation_bytes: ``(N,)`` int64, estimated size of its annotations.
        pixels: ``(N,)`` int64, height x width as recorded.
        long_sides: ``(N,)`` int64, pixels as recorded.
        fingerprint: a hash of all that the result depends on, except the images' bytes.
    """

    info: SetInfo
    notes: list[dict[str, Any]]
    file_bytes: NDArray[np.int64]
    annotation_bytes: NDArray[np.int64]
    pixels: NDArray[np.int64]
    long_sides: NDArray[np.int64]
    fingerprint: str

    def span(self, first: int, end: int) -> Span:
        """Return samples ``first..end - 1``."""


@dataclass(frozen=True)
class Making:
    """How shards are made from a source.

    Attributes:
        shard_megabytes: approximate size of a tar (10^6 bytes).
        processes: how many work at a time; the result does not depend on it.
        part: ``"2/3"``: make the second third of the tars; ``merge_parts`` finishes the set.
        reencoding: images are made smaller; None keeps their bytes.
        exif: which image the annotations are of if EXIF turns it and the recorded size does not
            decide: as shown or as stored.
    """

    shard_megabytes: int = 256
    processes: int = 1
    part: str | None = None
    reencoding: Reencoding | None = None
    exif: Exif = "shown"

    def __post_init__(self) -> None:
        if self.shard_megabytes < 1 or self.processes < 1:
            raise ShardError(
                f"{self.shard_megabytes} megabytes a shard, {self.processes} processes: both must "
                "be at least 1."
            )
        if self.part is not None:
            number, _, parts = self.part.partition("/")
            if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
                raise ShardError(f"part {self.part!r}: expected i/n with i from 1 to n, like 2/3.")

    def has(self, shard: int) -> bool:
        """Return whether a tar belongs to the part to be made."""
        number, parts = map(int, (self.part or "1/1").split("/"))
        return shard % parts == number - 1

    def options(self) -> dict[str, Any]:
        """Return the options that the manifest records."""
        sizes = asdict(self.reencoding) if self.reencoding else {}
        exif = {"exif": self.exif} if self.exif != "shown" else {}
        return {"shard_megabytes": self.shard_megabytes, **sizes, **exif}


DEFAULT_MAKING = Making()


@dataclass(frozen=True)
class ShardJob:
    """What a process needs to make one tar."""

    storage: Storage
    number: int
    span: Span
    reencoding: Reencoding | None


def convert(
    source: Source, out: str | Path, making: Making, progress: Progress = no_progress
) -> Manifest | None:
    """Write a source as shards, continuing where an earlier call was stopped.

    Args:
        source: what to convert.
        out: folder, or address that fsspec knows.
        making: size of the tars, number of processes, part and the like.
        progress: called now and then with the number of images done and in all.

    Returns:
        The manifest; None if only a part was to be made.

    Raises:
        ShardError: nothing can be used, or ``out`` holds something else. Finished shards stay.
    """
    storage = open_unused(out)
    sizes = _stored_bytes(source, making.reencoding)
    spans = plan_shards(sizes, making.shard_megabytes * 10**6)
    with storage.claim(making.part):
        refuse_shards(storage)  # another process may have finished it since
        _begin(storage, source, making, len(spans))
        try:
            _make_missing(storage, source, making, spans, sizes, progress)
            return _finish(storage) if making.part is None else None
        except BaseException as error:
            kept = _clear_if_useless(storage, len(spans), making)
            if not isinstance(error, OSError):
                raise
            raise ShardError(
                f"{storage.address}: {error}. {kept} of {len(spans)} shards are finished and stay. "
                "Fix it (free space if the disk is full), and start again to continue."
            ) from error


def _make_missing(
    storage: Storage,
    source: Source,
    making: Making,
    spans: list[tuple[int, int]],
    sizes: NDArray[np.int64],
    progress: Progress,
) -> None:
    """Make the tars of the part that are not finished."""
    wanted = [number for number in range(len(spans)) if making.has(number)]
    todo = [number for number in wanted if _read_note(storage, number) is None]
    num_images = sum(end - first for first, end in (spans[number] for number in wanted))
    num_left = sum(end - first for first, end in (spans[number] for number in todo))
    num_bytes = sum(int(sizes[slice(*spans[number])].sum()) for number in todo)
    jobs = (
        ShardJob(storage, number, source.span(*spans[number]), making.reencoding) for number in todo
    )
    processes = min(making.processes, len(todo), useful_processes(num_bytes))

    def report(num_done: int) -> None:
        progress(num_images - num_left + num_done, num_images)

    report(0)
    for _ in run_jobs(make_shard, jobs, processes, report):
        pass
    report(num_left)


def merge_parts(out: str | Path) -> Manifest:
    """Finish a set whose parts are all made and in one folder; ``ShardError`` if one is missing."""
    storage = open_storage(out)
    if storage.size(PLAN_NAME) is None:
        raise ShardError(
            f"{storage.address}: no parts of a conversion. Give the folder that "
            "`bigdet shards ... --part` wrote to."
        )
    with storage.claim(None):
        return _finish(storage)


def plan_shards(sizes: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Return the first sample of each tar and the one after its last, by their sizes in bytes."""
    ends = np.cumsum(sizes)
    spans: list[tuple[int, int]] = []
    first, start = 0, 0
    while first < len(sizes):
        end = max(first + 1, int(np.searchsorted(ends, start + limit, side="right")))
        spans.append((first, end))
        first, start = end, int(ends[end - 1])
    return spans


def make_shard(job: ShardJob, tick: Tick) -> None:
    """Write one tar and, when it is in place, the note that it is finished."""
    storage, log = job.storage, SampleLog()
    with storage.scratch() as scratch:
        tar = ShardTar(scratch / shard_name(job.number))
        try:
            for sample in job.span.samples(log):
                if sample is not None and job.reencoding is not None:
                    sample_bytes, record = reencode(
                        sample.image_bytes, sample.pixels, sample.record, job.reencoding, log
                    )
                    is_same = sample_bytes is sample.image_bytes  # else it was turned
                    tar.add(sample_bytes, record, sample.orientation if is_same else 1)
                elif sample is not None:
                    tar.add(sample.image_bytes, sample.record, sample.orientation)
                tick()
            finished = tar.close()
        except BaseException:
            tar.abandon()
            raise
        if finished.shard.samples:
            storage.take(scratch / finished.shard.file, finished.shard.file)
    note = {"shard": asdict(finished.shard), "classes": finished.classes, "log": log.lines}
    text = json.dumps({**note, "rows": finished.rows.tolist()})
    storage.write(_note_name(job.number), text.encode())


def _stored_bytes(source: Source, reencoding: Reencoding | None) -> NDArray[np.int64]:
    """Return the estimated size of each sample in a tar, ``(N,)`` bytes."""
    images = source.file_bytes
    if reencoding is not None:
        images = reencoding.estimate_bytes(images, source.pixels, source.long_sides)
    sizes = [
        stored_bytes(image, text)
        for image, text in zip(images.tolist(), source.annotation_bytes.tolist(), strict=True)
    ]
    return np.array(sizes, dtype=np.int64)


def _begin(storage: Storage, source: Source, making: Making, num_shards: int) -> None:
    """Write the plan, or check that it is the one of what was begun."""
    info = source.info
    made_of = {"source": info.source, "input": source.fingerprint, **making.options()}
    plan = {
        "made_of": hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        "shards": num_shards,
        "name": info.name,
        "source": info.source,
        "categories": [category_values(category) for category in info.categories],
        "options": {**info.options, **making.options()},
        "federated": info.federated,
        "notes": source.notes,
    }
    if storage.size(PLAN_NAME) is None:
        storage.write(PLAN_NAME, json.dumps(plan).encode())
    elif json.loads(storage.read(PLAN_NAME))["made_of"] != plan["made_of"]:
        raise ShardError(
            f"{storage.address}: holds the beginning of another conversion, of other images, "
            "annotations or options. Give the same ones to continue, or delete the folder."
        )


def _note_name(number: int) -> str:
    return f"{UNFINISHED}/{number:06d}.json"


def _read_note(storage: Storage, number: int) -> FinishedShard | None:
    """Return the note of a finished tar; None if it is not finished."""
    if storage.size(_note_name(number)) is None:
        return None
    note = json.loads(storage.read(_note_name(number)))
    shard = Shard(**note["shard"])
    if "classes" not in note:  # of an older version: made again
        return None
    if shard.samples and storage.size(shard.file) != shard.bytes:
        return None
    rows = np.array([tuple(row) for row in note["rows"]], dtype=INDEX_DTYPE)
    return FinishedShard(shard, rows, note["classes"], note["log"])


def _clear_if_useless(storage: Storage, num_shards: int, making: Making) -> int:
    """Return how many tars are finished; if none is, leave the folder as it was before."""
    notes = [_read_note(storage, number) for number in range(num_shards)]
    kept = sum(note is not None and note.shard.samples > 0 for note in notes)
    if not kept and making.part is None:
        storage.clear()
    return kept


def _finish(storage: Storage) -> Manifest:
    """Write index and manifest from the notes of all tars."""
    plan = json.loads(storage.read(PLAN_NAME))
    categories = [Category(**values) for values in plan["categories"]]
    names = ("name", "source", "options", "federated")
    info = SetInfo(categories=categories, **{name: plan[name] for name in names if name in plan})
    lacking = [n for n in range(plan["shards"]) if _read_note(storage, n) is None]
    if lacking:
        raise ShardError(
            f"{storage.address}: {len(lacking)} of {plan['shards']} shards are not finished "
            f"({', '.join(shard_name(number) for number in lacking[:3])}). Make all parts first, "
            "and put what they wrote into one folder, .unfinished included."
        )

    def finished() -> Iterator[FinishedShard]:
        yield only_log(plan["notes"])
        for number in range(plan["shards"]):
            note = _read_note(storage, number)
            assert note is not None
            yield note

    log = io.StringIO()
    manifest, index = summarize(info, finished(), log)
    if manifest is None:
        lines = [line for line in map(json.loads, log.getvalue().splitlines()) if "skipped" in line]
        reasons = Counter(line["skipped"] for line in lines)
        skipped = "".join(f"; {count} x {reason}" for reason, count in sorted(reasons.items()))
        first = ", ".join(f"{name} {value}" for line in lines[:1] for name, value in line.items())
        raise ShardError(
            f"{storage.address}: not one image could be used{skipped}. The first: {first}."
        )
    write_summary(storage, manifest, index, log.getvalue())
    return manifest
