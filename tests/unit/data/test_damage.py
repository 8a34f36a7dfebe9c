"""Every kind of damage, counted exactly: what is lost is reported, what is not lost is used."""

from __future__ import annotations

import io
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigdet.data.examples.decode import decode_image
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.shard_check import check_shards
from bigdet.data.streams.stream import TrainStream
from tests.unit.data import streams
from tests.unit.data.small_shards import forget_hashes, noise_jpeg, write_set

NUM_SHARDS, PER_SHARD = 3, 8
ROWS = NUM_SHARDS * PER_SHARD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", num_shards=NUM_SHARDS, per_shard=PER_SHARD).folder


def open_stream(shards: ShardSet, **options) -> TrainStream:
    settings = {"max_damaged": ROWS, "images_per_step": 4}
    return streams.open_stream(shards, **settings | options)


def damage_of_a_pass(shards: ShardSet) -> tuple[dict[str, int], set[int]]:
    """The counts by kind, and the rows that were seen."""
    stream = open_stream(shards)
    batches = list(islice(stream, len(shards) // 2))
    rows = {image_id - 1 for batch in batches for image_id in batch.image_ids.tolist()}
    return stream.damaged, rows


def change_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rows_in(shards: ShardSet, shard: int, start: int, stop: int) -> set[int]:
    """The rows that have a byte of image or annotations in a span of a tar."""
    rows = set()
    for row, entry in enumerate(shards.index):
        for field in ("image", "annotation"):
            first = int(entry[f"{field}_offset"])
            if entry["shard"] == shard and first < stop:
                rows |= {row} if first + int(entry[f"{field}_size"]) > start else set()
    return rows


def first_scan(image: bytes) -> int:
    """Where the compressed data of a JPEG without thumbnail begins."""
    start = image.index(b"\xff\xda")
    return start + 2 + int.from_bytes(image[start + 2 : start + 4], "big")


def test_a_flipped_byte_in_a_header_loses_nothing(folder):
    path = ShardSet(folder).path(0)
    change_bytes(path, 148, b"\xff")  # in the checksum of the first member's header
    assert damage_of_a_pass(ShardSet(folder)) == ({}, set(range(ROWS)))
    (problem,) = check_shards(folder)
    assert (problem.place, problem.what) == (path.name, "SHA-256 is not that of the manifest")


def test_a_zeroed_kilobyte_loses_the_samples_that_it_touches(folder):
    shards = ShardSet(folder)
    start = int(shards.index[9]["image_offset"]) + 1500
    lost = rows_in(shards, 1, start, start + 1024)
    assert 1 <= len(lost) <= 2
    change_bytes(shards.path(9), start, bytes(1024))
    damaged, seen = damage_of_a_pass(shards)
    assert damaged == {"unreadable": len(lost)}
    assert seen == set(range(ROWS)) - lost


def test_a_cut_tar_is_refused_at_once_or_loses_what_was_behind_the_cut(folder):
    shards = ShardSet(folder)
    cut = int(shards.index[20]["image_offset"]) + 700
    lost = rows_in(shards, 2, cut, 10**9)
    assert lost == {20, 21, 22, 23}
    os.truncate(shards.path(20), cut)
    with pytest.raises(ShardError, match=rf"000002\.tar: {cut} bytes, manifest\.json says"):
        ShardSet(folder)
    damaged, seen = damage_of_a_pass(ShardSet(folder, check_files=False))
    assert (damaged, seen) == ({"unreadable": 4}, set(range(20)))


def test_images_that_were_damaged_before_are_found_although_their_crc_is_right(tmp_path):
    image = noise_jpeg(99)
    scan = first_scan(image)
    images = {
        3: image[: len(image) // 2],  # cut
        7: image[:scan] + bytes(len(image) - scan),  # zeros to the end
        8: image[:scan] + bytes(len(image) - scan - 2) + image[-2:],  # zeros, with an end marker
        15: image[: scan + 100] + bytes(200) + image[scan + 300 :],  # zeros inside
        16: image[: len(image) // 2] + image[-2:],  # cut, with an end marker
    }
    shards = write_set(tmp_path, num_shards=NUM_SHARDS, per_shard=PER_SHARD, images=images)
    damaged, seen = damage_of_a_pass(shards)
    assert damaged == {"undecodable": 5}
    assert seen == set(range(ROWS)) - images.keys()
    problems = list(check_shards(tmp_path))
    assert [problem.place for problem in problems] == [
        f"{shards.path(row).name} {shards.key(row)}" for row in images
    ]
    assert all(problem.what.startswith("image cannot be decoded") for problem in problems)


def test_stray_bytes_between_the_segments_of_a_jpeg_lose_nothing():
    image = noise_jpeg(1)
    for stray in (b"\x12\x34\x56", bytes(range(1, 200))):
        for place in (len(image) - 2, image.index(b"\xff\xdb"), image.index(b"\xff\xda")):
            found = decode_image(image[:place] + stray + image[place:])
            assert (found.int() - decode_image(image).int()).abs().max() <= 1, place


def test_a_progressive_jpeg_with_a_piece_gone_is_refused():
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    opened = io.BytesIO()
    Image.fromarray(pixels).save(opened, "jpeg", progressive=True)
    image = opened.getvalue()
    scans = [place for place in range(len(image)) if image[place : place + 2] == b"\xff\xda"]
    assert len(scans) == 10
    gone = {
        "the rest": image[: scans[5] + 60],
        "the rest but the end": image[: scans[5] + 60] + image[-2:],
        "from one scan into the next": image[: scans[5] - 40] + image[scans[5] + 200 :],
        "within a scan": image[: scans[4] + 80] + image[scans[4] + 160 :],
    }
    for damaged in gone.values():
        with pytest.raises(ValueError, match=r"JPEG|broken data stream"):
            decode_image(damaged)


def test_annotations_that_are_gone_lose_their_sample(folder):
    shards = ShardSet(folder)
    entry = shards.index[5]
    # The header and the block of KEY.json, as if there were none.
    change_bytes(shards.path(5), int(entry["annotation_offset"]) - 512, bytes(1024))
    damaged, seen = damage_of_a_pass(shards)
    assert (damaged, seen) == ({"unreadable": 1}, set(range(ROWS)) - {5})


def test_a_wrong_crc_in_the_index_is_refused_and_in_an_old_set_loses_its_sample(folder):
    index = np.load(folder / "index.npy")
    index["crc32"][4] ^= 1
    np.save(folder / "index.npy", index)
    with pytest.raises(ShardError, match=r"index\.npy: its SHA-256 is not that in manifest\.json"):
        ShardSet(folder)
    forget_hashes(folder)
    damaged, seen = damage_of_a_pass(ShardSet(folder))
    assert (damaged, seen) == ({"unreadable": 1}, set(range(ROWS)) - {4})


def test_a_shard_in_the_place_of_another_is_refused_at_once_or_loses_all_its_samples(
    folder, tmp_path
):
    other = write_set(tmp_path / "other", num_shards=1, per_shard=PER_SHARD, seed=500)
    path, size = folder / "000001.tar", (folder / "000001.tar").stat().st_size
    shutil.copy(other.path(0), path)
    os.truncate(path, size + 10240)
    with pytest.raises(ShardError, match=rf"000001\.tar: {size + 10240} bytes, manifest.json says"):
        ShardSet(folder)
    os.truncate(path, size)
    damaged, seen = damage_of_a_pass(ShardSet(folder))
    assert damaged == {"unreadable": PER_SHARD}
    assert seen == set(range(ROWS)) - set(range(PER_SHARD, 2 * PER_SHARD))


def test_a_manifest_that_was_edited_is_refused(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"dog"', '"cow"'))
    with pytest.raises(ShardError, match=r"manifest\.json: its values do not have the SHA-256"):
        ShardSet(folder)


def test_a_manifest_never_leads_out_of_its_folder(folder):
    forget_hashes(folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"000001.tar"', '"../000001.tar"'))
    with pytest.raises(ShardError, match=r"names a shard '\.\./000001\.tar', expected a file name"):
        ShardSet(folder)
