"""Fixtures that several test folders use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigdet.data.making.sources.shapes import make_shapes

PROJECT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, before torch looks for them, from all tests but those of ``-m gpu``."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Leaves bigdet's logger as it was: a command that runs in this process sets it up anew."""
    found = logging.getLogger("bigdet")
    handlers, level, propagate = found.handlers[:], found.level, found.propagate
    yield
    for handler in set(found.handlers) - set(handlers):
        handler.close()
    found.handlers[:], found.level, found.propagate = handlers, level, propagate


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """Leaves the variables as they were: a command that ran in this process may have set some."""
    found = dict(os.environ)
    yield
    now = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update({**found, **({"PYTEST_CURRENT_TEST": now} if now else {})})


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced to the disk, and which names are given, in this order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


@pytest.fixture(scope="session")
def coco_dir() -> Path:
    """The folder of a real COCO subset with train2017, val2017 and annotations."""
    data = os.environ.get("BIGDET_TEST_DATA", PROJECT.parent / "shared" / "data")
    folder = Path(data) / "coco"
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no COCO subset in {folder}; BIGDET_TEST_DATA names the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def shapes_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shard sets train (16 images) and val (8 images), 128 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder / "train", split="train", images=16)
    make_shapes(folder / "val", split="val", images=8)
    return folder
