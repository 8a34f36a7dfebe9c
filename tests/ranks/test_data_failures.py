"""Two ranks on damaged or unreachable data: continue and count, or stop with one message."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from bigdet import distributed, train
from bigdet.data.format import remote
from bigdet.data.format.shard_set import ShardSet
from bigdet.host import reading
from tests.spawn import ROOT, run_ranks
from tests.unit.data.shard_server import ShardServer
from tests.unit.data.small_shards import write_set

NUM_SHARDS, PER_SHARD = 10, 4
BAD_ROWS = (7, 30)
TINY = [
    "model.detector=faster_rcnn", "model.width=16", "model.fc_width=16",
    "model.rpn.train_proposals=20", "model.rpn.test_proposals=10", "model.roi.rois_per_image=8",
    "phases.pretrain.steps=10", "phases.pretrain.warmup_steps=1", "phases.pretrain.resize.size=32",
    "phases.pretrain.images_per_gpu=2", "phases.pretrain.images_per_step=8",
    "phases.finetune.steps=2", "phases.finetune.warmup_steps=1", "phases.finetune.resize.size=32",
    "phases.finetune.resize.cap=64", "phases.finetune.freeze_stages=0",
    "phases.finetune.images_per_gpu=2", "phases.finetune.images_per_step=8",
    "log.every=1", "log.tensorboard=false", "evaluation.pictures=0", "data.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "train", num_shards=NUM_SHARDS, per_shard=PER_SHARD)
    write_set(folder / "val", num_shards=1, per_shard=2, seed=700)
    return folder


@pytest.fixture(scope="module")
def damaged(sets: Path) -> ShardSet:
    """A copy of the training set with a kilobyte of zeros in 5% of the images, ``BAD_ROWS``."""
    shutil.copytree(sets / "train", sets / "damaged")
    shards = ShardSet(sets / "damaged")
    for row in BAD_ROWS:
        with shards.path(row).open("r+b") as file:
            file.seek(int(shards.index[row]["image_offset"]))
            file.write(bytes(1024))
    return shards


def train_and_tell(words: list[str], retry_seconds: float) -> str:
    """On each rank: run the training command; return the message with which it stops, if any."""
    remote.RETRY_SECONDS = (retry_seconds,) * 3
    try:
        assert train.main(words) == 0
    except ValueError as error:
        return str(error)
    return ""


def train_with_a_failing_disk(words: list[str]) -> str:
    """As ``train_and_tell``, but from some read on the disk of rank 1 fails."""
    reading.RETRY_SECONDS = (0.0, 0.0)
    calls, pread = itertools.count(), os.pread

    def fail(*arguments: int) -> bytes:
        if distributed.rank() == 1 and next(calls) > 6:
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    os.pread = fail
    return train_and_tell(words, 0.0)


def arguments(folder: Path, train_set: str, val_set: Path, *more: str) -> list[str]:
    data = [f"data.train.shards={train_set}", f"data.val.shards={val_set}"]
    return [str(ROOT / "configs" / "quickstart.yaml"), *TINY, *data, f"output={folder}", *more]


def test_five_percent_damaged_samples_are_replaced_and_counted_once_each(sets, damaged, tmp_path):
    words = arguments(tmp_path / "run", damaged.folder, sets / "val", "data.train.max_damaged=2")
    assert run_ranks(train_and_tell, 2, tmp_path, words, 0.0) == ["", ""]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if "damaged_samples" in line]
    counts = [line["damaged_samples"] for line in lines]
    assert len(counts) == 12
    assert counts == sorted(counts)
    assert counts[4:] == [2] * 8  # two passes and another phase, on two ranks, add nothing
    assert lines[9]["seen/images"] == 80


def test_more_damaged_samples_than_allowed_end_all_ranks_with_their_list(sets, damaged, tmp_path):
    words = arguments(tmp_path / "run", damaged.folder, sets / "val", "data.train.max_damaged=1")
    one, other = run_ranks(train_and_tell, 2, tmp_path, words, 0.0)
    assert one == other
    assert "2 damaged" in one
    assert "max_damaged" in one
    listed = [line for line in one.splitlines() if line.startswith(f"  {damaged.folder}/0000")]
    for row, line in zip(BAD_ROWS, listed, strict=True):
        assert damaged.key(row) in line


def test_a_server_that_goes_away_ends_all_ranks_with_one_message(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ShardServer(sets / "train", last_request=2 + 1 + 5) as server:  # manifests, index, shards
        words = arguments(
            tmp_path / "run", server.address, sets / "val", f"data.cache.folder={tmp_path}/cache"
        )
        one, other = run_ranks(train_and_tell, 2, tmp_path, words, 0.05)
    assert one == other
    assert "\n" not in one
    assert f"{server.address}/00000" in one
    assert "the shard cannot be fetched: 4 attempts failed" in one
    fetched = [path for path in (tmp_path / "cache" / "shards").iterdir() if not path.suffix]
    assert 2 <= len(fetched) <= 5 + 1  # and the lock


def test_a_disk_that_fails_on_one_rank_ends_all_ranks_and_replaces_no_image(sets, tmp_path):
    words = arguments(tmp_path / "run", sets / "train", sets / "val")
    one, other = run_ranks(train_with_a_failing_disk, 2, tmp_path, words)
    assert one == other
    assert one.startswith("rank 1: ")
    assert ".tar: cannot be read (Input/output error). Check its disk" in one
    assert '"damaged_samples": 1' not in (tmp_path / "run" / "metrics.jsonl").read_text()
