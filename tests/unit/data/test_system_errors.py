"""What the system says while files are read is no damage: tried again, or the end of it all."""

from __future__ import annotations

import errno
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bigdet.cli.inputs import list_inputs
from bigdet.cli.running import explain
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import ShardSet, UnavailableShardError
from bigdet.data.making.indexing import index_shards
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.shard_tar import SampleLog
from bigdet.data.making.sources.coco import convert_coco
from bigdet.data.making.sources.voc import convert_voc
from bigdet.host import reading
from bigdet.predict import collect
from tests.unit.data.coco_trial import Trial, image_of
from tests.unit.data.small_shards import write_set
from tests.unit.data.test_damage import open_stream
from tests.unit.data.test_indexing import CATEGORIES, record_of, sample, write_tar
from tests.unit.data.test_source_voc import Voc, object_of

PASSING = ["EMFILE", "ENFILE", "ESTALE", "EIO", "ENOMEM", "EAGAIN", "ETIMEDOUT"]
LASTING = ["EACCES", "EPERM", "ENODEV", "ENOENT", "ENOTCONN"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_set(tmp_path / "set", num_shards=2, per_shard=4)


class Failing:
    """Replaces a function of ``os``: fails so many times, then works; ``calls`` counts."""

    def __init__(
        self, monkeypatch: Any, name: str, number: int, times: int, only: str = ""
    ) -> None:
        self._work, self._number, self._times, self._only = getattr(os, name), number, times, only
        self.calls = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._only not in str(arguments[0]):
            return self._work(*arguments, **options)
        self.calls += 1
        if self.calls <= self._times:
            raise OSError(self._number, os.strerror(self._number), str(arguments[0]))
        return self._work(*arguments, **options)


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again_from_a_file_opened_anew(shards, monkeypatch, name):
    whole = shards.read(1)
    opened = Failing(monkeypatch, "open", 0, 0, "000000.tar")
    read = Failing(monkeypatch, "pread", getattr(errno, name), 2)
    assert shards.read(1) == whole
    assert read.calls == 2 + 2  # two attempts fail; then the image and the annotations are read
    assert opened.calls == 2  # the file was open before; after each failure it is opened anew


@pytest.mark.parametrize("name", PASSING + LASTING)
def test_what_stays_ends_training_with_its_reason_and_replaces_nothing(shards, monkeypatch, name):
    number = getattr(errno, name)
    stream = open_stream(shards)
    read = Failing(monkeypatch, "pread", number, 10**6)
    with pytest.raises(UnavailableShardError) as caught:
        list(islice(stream, 4))
    message = str(caught.value)
    assert read.calls == (3 if name in PASSING else 1)
    assert f".tar: cannot be read ({os.strerror(number)}). " in message
    assert "nothing is known to be damaged" in message
    assert "again" not in message  # no advice to make or copy the shards
    assert not stream.damages


def test_advice_fits_the_reason():
    def advice(name: str) -> str:
        return reading.why_unread(OSError(getattr(errno, name), "", "x"))

    assert "chmod" in advice("EACCES")
    assert "ulimit -n" in advice("EMFILE")
    assert "is mounted" in advice("ENOENT")
    assert "is mounted" in advice("ESTALE")
    assert "dmesg" in advice("EIO")
    assert "memory" in advice("ENOMEM")
    assert "memory" in reading.why_unread(MemoryError())
    told = explain(MemoryError("4 GiB"))
    assert told.startswith("out of memory: 4 GiB: ")
    assert told.endswith(" Lower data.workers or --processes, or end other programs.")


def test_a_tar_that_may_not_be_read_is_reported_when_the_set_is_opened(shards, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("000001.tar"))
    with pytest.raises(UnavailableShardError, match=r"000001\.tar: cannot be read \(Permission"):
        ShardSet(shards.folder)


def test_memory_that_ends_while_an_image_is_decoded_is_no_damage(shards, monkeypatch):
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("bigdet.data.examples.samples.decode_image", full)
    stream = open_stream(shards)
    with pytest.raises(UnavailableShardError, match=r"sample 0+\d cannot be read .*no memory left"):
        list(islice(stream, 1))
    assert not stream.damages


def test_check_shards_reports_the_reason_once_for_a_tar_and_continues(shards, monkeypatch):
    Failing(monkeypatch, "pread", errno.EACCES, 1)
    problems = list(check_shards(shards.folder))
    assert len(problems) == 1
    assert "cannot be read (Permission denied)" in problems[0].what
    assert "SHA-256" not in problems[0].what


def test_index_shards_reports_the_reason_of_a_tar(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", sample("1", record_of(1)))
    failing = Failing(monkeypatch, "pread", errno.EIO, 10**6)
    with pytest.raises(ShardError, match=r"a\.tar: cannot be read \(Input/output error\)\. Check"):
        index_shards(tmp_path, CATEGORIES)
    assert failing.calls == 3
    monkeypatch.undo()
    monkeypatch.setattr(reading, "RETRY_SECONDS", (0.0,))
    Failing(monkeypatch, "pread", errno.ESTALE, 1)
    assert index_shards(tmp_path, CATEGORIES).images == 1


@pytest.mark.parametrize("name", ["EACCES", "EIO"])
def test_an_image_that_may_not_be_read_ends_a_conversion(tmp_path, monkeypatch, name):
    trial = Trial(tmp_path)
    trial.picture("1.jpg")
    trial.picture("2.jpg")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "2.jpg":
            raise OSError(getattr(errno, name), "", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ShardError, match=r"2\.jpg: cannot be read \((Permission|Input/output)"):
        trial.convert([image_of(1), image_of(2, file_name="2.jpg")], [])
    monkeypatch.undo()
    monkeypatch.setattr(reading, "RETRY_SECONDS", ())
    Failing(monkeypatch, "stat", getattr(errno, name), 10**6, "2.jpg")  # its folder is closed
    with pytest.raises(ShardError, match=r"2\.jpg: cannot be read \((Permission|Input/output)"):
        trial.convert([image_of(1), image_of(2, file_name="2.jpg")], [])


def test_an_image_that_goes_while_it_is_converted_ends_a_conversion(tmp_path, monkeypatch):
    trial = Trial(tmp_path)
    trial.picture("1.jpg")
    trial.picture("2.jpg")
    monkeypatch.setattr("bigdet.data.making.sources.coco.convert", lambda source, *_: source)
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "images": [image_of(1), image_of(2), image_of(3)],
                "annotations": [],
                "categories": [{"id": 1, "name": "dog"}],
            }
        )
    )
    source = convert_coco(trial.images, tmp_path / "a.json", trial.out)
    (trial.images / "2.jpg").unlink()  # 3.jpg never was there
    log = SampleLog()
    assert list(source.span(2, 3).samples(log)) == [None]
    with pytest.raises(ShardError, match=r"2\.jpg: was there when the conversion began"):
        list(source.span(0, 3).samples(log))


def test_annotations_that_may_not_be_read_end_a_conversion_of_voc(tmp_path, monkeypatch):
    voc = Voc(tmp_path)
    voc.add("a", object_of("dog", (1, 1, 9, 9)))
    (voc.root / "ImageSets/Main/train.txt").write_text("a\n")
    Failing(monkeypatch, "stat", errno.EACCES, 10**6, "a.xml")
    with pytest.raises(ShardError, match=r"a\.xml: cannot be read \(Permission denied\)"):
        convert_voc(voc.root, "train", tmp_path / "out", categories=[Category(1, "dog")])


def test_predict_ends_where_a_shard_cannot_be_read_and_leaves_no_image_out(shards, monkeypatch):
    images, _ = list_inputs([str(shards.folder)])
    Failing(monkeypatch, "pread", errno.ENODEV, 10**6)

    class Reading:
        def __init__(self, read: Any) -> None:
            self.result = read

    with pytest.raises(UnavailableShardError, match="No such device"):
        collect(images[:1], [Reading(images[0].read)])
