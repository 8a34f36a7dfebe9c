"""Annotation files of all kinds of nonsense: a clear error, or a set in which nothing is wrong."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.sources.coco import convert_coco
from bigdet.host import files
from tests.unit.data.coco_trial import CATEGORIES, HEIGHT, WIDTH, Trial, box_of, image_of

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same examples every time: a test that fails, fails for everyone
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.floats(-3, 12),
    st.sampled_from([0, -0.0, 1e-9, 1e300, -1e300, float("nan"), float("inf"), 2**53 + 1, 2**70]),
    st.sampled_from([10**400, True, None, "5", [], {}]),
)
ANYTHING = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=3)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
POLYGONS = st.lists(st.lists(NUMBERS, max_size=9), max_size=3)
RUNS = st.fixed_dictionaries(
    {
        "size": st.sampled_from([[HEIGHT, WIDTH], [WIDTH, HEIGHT], [6.0, 8], [0, 0], "x"]),
        "counts": st.one_of(
            st.lists(st.one_of(st.integers(0, 48), NUMBERS), max_size=5),
            st.text("0123456789:PQoab\x00\u00e9", max_size=8),
            st.sampled_from([[48], [0, 48], [20, 8, 20], "P1", "08X1"]),
        ),
    }
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "bbox": st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), ANYTHING),
        "area": NUMBERS,
        "iscrowd": st.sampled_from([0, 1, True, 2, "0", None, 0.5, []]),
        "segmentation": st.one_of(POLYGONS, RUNS, ANYTHING),
        "keypoints": st.one_of(st.lists(NUMBERS, max_size=7), ANYTHING),
    },
)
RARE_CHANGES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "image_id", "category_id"), NUMBERS)
)
IMAGE_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "id": NUMBERS,
        "height": NUMBERS,
        "width": NUMBERS,
        "file_name": st.sampled_from(
            ["1.jpg", "../1.jpg", "/1.jpg", "", "\x00", "a" * 300, 5, None]
        ),
    },
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    trial = Trial(tmp_path_factory.mktemp("fuzz"))
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        trial.picture(name)
    with pytest.MonkeyPatch.context() as patch:  # waiting for the disk would take most of the time
        patch.setattr(files, "sync", lambda path: None)
        yield trial.images


def assert_refused_or_whole(images: Path, data: bytes) -> ShardSet | None:
    """Convert; return the set if there is one, after looking for anything wrong in it."""
    folder = Path(tempfile.mkdtemp(dir=images.parent))
    (folder / "a.json").write_bytes(data)
    try:
        convert_coco(images, folder / "a.json", folder / "out")
    except ShardError as error:
        message = str(error)
    else:
        assert list(check_shards(folder / "out")) == []
        shards = ShardSet(folder / "out")
        shutil.rmtree(folder)
        return shards
    assert str(folder) in message or str(images) in message
    assert "\n" not in message
    assert sorted(path.name for path in folder.iterdir()) == ["a.json"]
    shutil.rmtree(folder)
    return None


def content_of(images: list[Any], annotations: list[Any], categories: Any = CATEGORIES) -> bytes:
    content = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(content).encode()


@SETTINGS
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_annotations_of_all_kinds_are_used_dropped_or_clipped(
    images: Path, changes: list[dict[str, Any]]
) -> None:
    annotations = [box_of(number, **change) for number, change in enumerate(changes)]
    annotations.append(box_of(len(changes)))  # boxes within 0 to 1 alone would be relative
    kept = assert_refused_or_whole(images, content_of([image_of(1), image_of(2)], annotations))
    assert kept is not None  # no annotation is a reason to stop
    manifest = kept.manifest
    dropped = sum(n for what, n in manifest.changed.items() if what.startswith("annotation"))
    assert manifest.instances + manifest.crowd + dropped == len(annotations)


@SETTINGS
@given(
    st.lists(st.one_of(IMAGE_CHANGES, st.just({})), min_size=1, max_size=3),
    st.lists(RARE_CHANGES, max_size=3),
    st.one_of(st.just(CATEGORIES), ANYTHING),
)
def test_images_ids_and_categories_of_all_kinds_are_refused_or_left_out(
    images: Path, image_changes: list[dict[str, Any]], changes: list[dict[str, Any]], groups: Any
) -> None:
    listed = [image_of(number, **change) for number, change in enumerate(image_changes, 1)]
    annotations = [box_of(number, **change) for number, change in enumerate(changes)]
    kept = assert_refused_or_whole(images, content_of(listed, annotations, groups))
    if kept is not None:
        assert kept.manifest.images + sum(kept.manifest.skipped.values()) == len(listed)


@SETTINGS
@given(st.data())
def test_files_with_bytes_changed_or_cut_off_are_refused_or_whole(
    images: Path, data: st.DataObject
) -> None:
    mask = {"segmentation": [[1, 2, 4, 2, 4, 4]]}
    text = bytearray(content_of([image_of(1), image_of(2)], [box_of(1, **mask), box_of(2, 2)]))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.one_of(st.sampled_from(b'{}[]",:-19e. \\'), st.integers(0, 255)))
    size = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
    assert_refused_or_whole(images, bytes(text[:size]))
