from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from bigdet.data.format import tars as tars_module
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.shard_set import (
    FLAG_CROWD,
    FLAG_MASKS,
    FLAG_NOT_JPEG,
    FLAG_PROGRESSIVE,
    INDEX_DTYPE,
    ShardSet,
)
from bigdet.data.making.shard_check import check_shards
from bigdet.data.making.shard_tar import image_flags
from bigdet.data.making.shard_writer import ShardWriter
from bigdet.data.making.storage import UNFINISHED

HEIGHT, WIDTH = 6, 8


def encode(image_format: str, color: int = 100, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (color, 50, 200)).save(file, image_format, **options)
    return file.getvalue()


def box_of(number: int, **extra: Any) -> dict[str, Any]:
    about = {"id": number, "label": 1, "bbox": [1.0, 2.0, 3.0, 2.5], "area": 7.5, "iscrowd": 0}
    return {**about, **extra}


def record_of(image_id: int, *annotations: dict[str, Any]) -> dict[str, Any]:
    name = f"{image_id}.img"
    about = {"image_id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH}
    return {**about, "annotations": list(annotations)}


POLYGON = [[1, 2, 4, 2, 4, 4.5]]
SAMPLES = [
    (encode("JPEG"), record_of(7, box_of(1, segmentation=POLYGON), box_of(2))),
    (encode("PNG"), record_of(8)),
    (encode("JPEG", progressive=True), record_of(123456789012, box_of(3, iscrowd=1))),
    (encode("WEBP"), record_of(2**40, box_of(4))),
]
CATEGORIES = [Category(18, "dog", "animal"), Category(90, "toothbrush")]


def writer_for(folder: Path, shard_megabytes: int = 256) -> ShardWriter:
    return ShardWriter(
        folder,
        name="tiny",
        source="test",
        categories=CATEGORIES,
        options={"seed": 3},
        shard_megabytes=shard_megabytes,
    )


def write_samples(folder: Path, samples: list[tuple[bytes, dict[str, Any]]] = SAMPLES) -> Path:
    with writer_for(folder) as writer:
        for image, record in samples:
            writer.add(image, record)
    return folder


def write_half(folder: Path) -> None:
    with writer_for(folder) as writer:
        writer.add(*SAMPLES[0])
        assert len(list((folder / UNFINISHED).rglob("000000.tar"))) == 1
        raise RuntimeError("stop")


def change_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "set")


def test_the_index_record_has_the_48_bytes_that_other_programs_read() -> None:
    assert INDEX_DTYPE.descr == [
        ("image_id", "<i8"),
        ("image_offset", "<u8"),
        ("image_size", "<u4"),
        ("annotation_offset", "<u8"),
        ("annotation_size", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("flags", "<u2"),
        ("num_boxes", "<u2"),
        ("shard", "<u4"),
    ]
    assert INDEX_DTYPE.itemsize == 48


def test_the_first_row_says_what_was_written(folder: Path) -> None:
    image, record = SAMPLES[0]
    text = json.dumps(record, separators=(",", ":")).encode()
    row = np.load(folder / "index.npy")[0]
    padded = -(-len(image) // 512) * 512
    assert row["image_id"] == 7
    assert row["image_offset"] == 512  # behind one header of 512 bytes
    assert row["image_size"] == len(image)
    assert row["annotation_offset"] == 512 + padded + 512
    assert row["annotation_size"] == len(text)
    assert row["crc32"] == zlib.crc32(image + text)
    assert (row["height"], row["width"], row["num_boxes"], row["shard"]) == (HEIGHT, WIDTH, 2, 0)


def test_flags_tell_crowds_masks_progressive_and_other_formats(folder: Path) -> None:
    flags = np.load(folder / "index.npy")["flags"].tolist()
    expected = [FLAG_MASKS, FLAG_NOT_JPEG, FLAG_CROWD | FLAG_PROGRESSIVE, FLAG_NOT_JPEG]
    assert flags == expected == [2, 16, 9, 16]


def test_a_start_of_frame_inside_another_segment_does_not_make_an_image_progressive() -> None:
    image = encode("JPEG")
    comment = b"\xff\xfe\x00\x06\xff\xc2\x00\x00"  # a comment of 4 bytes that look like a frame
    assert image_flags(image[:2] + comment + image[2:]) == 0
    assert image_flags(image[:2] + b"\xff\xff" + image[2:]) == 0  # fill bytes before a marker


def test_tars_hold_adjacent_files_at_the_offsets_of_the_index(folder: Path) -> None:
    with tarfile.open(folder / "000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        "000000000007.jpg",
        "000000000007.json",
        "000000000008.json",
        "000000000008.png",
        "123456789012.jpg",
        "123456789012.json",
        "1099511627776.json",
        "1099511627776.webp",
    ]
    offsets = {member.name: (member.offset_data, member.size) for member in members}
    for row in np.load(folder / "index.npy"):
        key = f"{row['image_id']:012d}"
        (image,) = (name for name in offsets if name.startswith(key) and "json" not in name)
        assert offsets[image] == (row["image_offset"], row["image_size"])
        assert offsets[f"{key}.json"] == (row["annotation_offset"], row["annotation_size"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tar open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(folder: Path) -> None:
    found = list(webdataset.WebDataset(str(folder / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"{r['image_id']:012d}" for _, r in SAMPLES]
    suffixes = ["jpg", "png", "jpg", "webp"]
    for sample, (image, record), suffix in zip(found, SAMPLES, suffixes, strict=True):
        assert sample[suffix] == image
        assert json.loads(sample["json"]) == record


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    again = write_samples(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.tar", "index.npy", "manifest.json"]
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_manifest_counts(folder: Path) -> None:
    manifest = ShardSet(folder).manifest
    assert (manifest.images, manifest.instances, manifest.crowd) == (4, 3, 1)
    assert manifest.pixels == 4 * HEIGHT * WIDTH
    assert manifest.categories == CATEGORIES
    assert manifest.options == {"seed": 3}
    (shard,) = manifest.shards
    assert (shard.file, shard.samples) == ("000000.tar", 4)
    assert shard.bytes == (folder / "000000.tar").stat().st_size


def test_samples_come_back_as_they_were_given(folder: Path) -> None:
    shards = ShardSet(folder)
    assert len(shards) == 4
    assert shards.num_classes == 2
    for row in (3, 0, 2, 1):
        sample = shards.read(row)
        assert (sample.image_bytes, sample.record) == SAMPLES[row]
        assert shards.record(row) == SAMPLES[row][1]
    shards.close()
    assert shards.read(0).image_bytes == SAMPLES[0][0]


def test_a_pickled_reader_opens_its_own_files_and_carries_no_index(folder: Path) -> None:
    shards = ShardSet(folder)
    shards.read(0)
    pickled = pickle.dumps(shards)
    shards.close()
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.read(1).record == SAMPLES[1][1]
    assert isinstance(copy.index, np.memmap)


def test_a_tar_is_closed_before_it_grows_beyond_the_limit(tmp_path: Path) -> None:
    large = encode("JPEG") + bytes(400_000)  # behind the end of the image
    with writer_for(tmp_path, shard_megabytes=1) as writer:
        for image_id in range(5):
            writer.add(large, record_of(image_id))
    shards = ShardSet(tmp_path)
    assert [shard.samples for shard in shards.manifest.shards] == [2, 2, 1]
    assert shards.index["shard"].tolist() == [0, 0, 1, 1, 2]
    assert shards.index["image_offset"].tolist()[::2] == [512, 512, 512]
    assert list(check_shards(tmp_path)) == []


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars_module, "MAX_OPEN_FILES", 2)
    large = encode("JPEG") + bytes(900_000)
    with writer_for(tmp_path, shard_megabytes=1) as writer:
        for image_id in range(5):
            writer.add(large, record_of(image_id))
    shards = ShardSet(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for row in (0, 1, 2, 3, 4, 0):
        assert shards.read(row).record["image_id"] == row
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_threads_share_index_open_files_and_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars_module, "MAX_OPEN_FILES", 2)
    large = encode("JPEG") + bytes(900_000)
    with writer_for(tmp_path, shard_megabytes=1) as writer:
        for image_id in range(9):
            writer.add(large, record_of(image_id))
    shards = ShardSet(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    copies = [shards.for_thread() for _ in range(4)]
    assert all(own.index is shards.index for own in copies)

    def read(number: int) -> list[int]:
        rows = [(3 * number + 2 * i) % 9 for i in range(200)]
        return [copies[number].read(row).record["image_id"] - row for row in rows]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [[0] * 200] * 4
    assert len(os.listdir("/proc/self/fd")) == before + 2
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_index_hash_tells_sets_apart(tmp_path: Path, folder: Path) -> None:
    same = write_samples(tmp_path / "same")
    other = write_samples(tmp_path / "other", SAMPLES[:3])
    assert ShardSet(same).index_hash() == ShardSet(folder).index_hash()
    assert ShardSet(other).index_hash() != ShardSet(folder).index_hash()


@pytest.mark.parametrize("field", ["image_offset", "annotation_offset"])
def test_one_changed_byte_is_an_error_with_shard_key_and_offset(folder: Path, field: str) -> None:
    shards = ShardSet(folder)
    offset = int(shards.index[2][field])
    change_byte(folder / "000000.tar", offset + 30)
    start = int(shards.index[2]["image_offset"])
    where = rf"000000\.tar: sample 123456789012 \(row 2, offset {start}\): CRC-32 is [0-9a-f]+, "
    with pytest.raises(ShardError, match=where):
        shards.read(2)
    assert shards.read(1).record == SAMPLES[1][1]
    found = [(problem.place, problem.what[:7]) for problem in check_shards(folder)]
    assert found == [("000000.tar", "SHA-256"), ("000000.tar 123456789012", "CRC-32 ")]


def test_a_change_outside_of_the_samples_is_found_by_the_hash(folder: Path) -> None:
    change_byte(folder / "000000.tar", 3)  # in the first header
    (problem,) = check_shards(folder)
    assert (problem.place, problem.what[:7]) == ("000000.tar", "SHA-256")


def test_a_tar_that_is_cut_is_refused_at_once_and_every_lost_sample_listed(folder: Path) -> None:
    size = (folder / "000000.tar").stat().st_size
    shards = ShardSet(folder)
    cut = int(shards.index[3]["image_offset"]) + 10
    os.truncate(folder / "000000.tar", cut)
    with pytest.raises(ShardError, match=rf"000000\.tar: {cut} bytes, manifest.json says {size}"):
        ShardSet(folder)
    with pytest.raises(ShardError, match=r"row 3, .* the tar ends after 10 of"):
        shards.read(3)
    places = [problem.place for problem in check_shards(folder)]
    assert places == ["000000.tar", "000000.tar 1099511627776"]


def test_a_missing_tar_is_reported_once(folder: Path) -> None:
    (folder / "000000.tar").unlink()
    with pytest.raises(ShardError, match=r"000000\.tar: the file is missing"):
        ShardSet(folder)
    assert [problem.what for problem in check_shards(folder)] == ["the file is missing"]


def test_images_that_do_not_decode_or_are_of_another_size_are_found(tmp_path: Path) -> None:
    image, record = SAMPLES[0]
    wrong = {**record_of(8), "height": HEIGHT + 1}
    far = record_of(9, box_of(5, bbox=[6.0, 2.0, 5.0, 2.0]), box_of(6, label=2))
    write_samples(tmp_path, [(image[:-40], record), (image, wrong), (image, far)])
    places = [f"000000.tar {image_id:012d}" for image_id in (7, 8, 9, 9)]
    found = list(check_shards(tmp_path))
    assert [problem.place for problem in found] == places
    assert found[0].what.startswith("image cannot be decoded")
    assert found[1].what == "image is (6, 8) pixels, its record says (7, 8)"
    assert found[2].what == "annotation 5: box [6.0, 2.0, 5.0, 2.0] in (6, 8)"
    assert found[3].what == "annotation 6: label 2, there are 2 classes"


def test_counts_that_differ_from_the_manifest_are_found(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    del values["sha256"]  # as in sets of older versions
    values["instances"] += 1
    values["shards"][0]["samples"] = 5
    (folder / "manifest.json").write_text(json.dumps(values))
    assert [f"{problem.place}: {problem.what}" for problem in check_shards(folder)] == [
        "manifest.json: instances: 4, found 3",
        "000000.tar: 4 samples, the manifest says 5",
    ]


def test_a_folder_that_is_no_finished_set_is_an_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere: expected a shard set, but there is no such"):
        ShardSet(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"000000\.tar: expected a shard set, but this is a file"):
        ShardSet(folder / "000000.tar")
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"has no manifest.json.*`bigdet shards`"):
        ShardSet(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the manifest of a shard set"),
        ("[]", "not the manifest of a shard set"),
        ('{"version": 1, "name": "x"}', "not the manifest of a shard set"),
        ('{"version": 2}', "shard format version 2, this bigdet reads 1"),
    ],
)
def test_a_manifest_of_something_else_is_an_error(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        ShardSet(folder)


def test_an_index_of_another_set_is_an_error(tmp_path: Path, folder: Path) -> None:
    other = write_samples(tmp_path / "other", SAMPLES[:3])
    shutil.copy(other / "index.npy", folder / "index.npy")
    with pytest.raises(ShardError, match=r"has \(3,\) records of 48 bytes; .* says 4 samples"):
        ShardSet(folder)
    (folder / "index.npy").write_bytes(b"no numpy file")
    with pytest.raises(ShardError, match=r"index\.npy: not the index of a shard set"):
        ShardSet(folder)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_a_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="stop"):
        write_half(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_set_without_samples_is_an_error(tmp_path: Path) -> None:
    expected = "not one image was given"
    with pytest.raises(ShardError, match=expected), writer_for(tmp_path / "set"):
        pass
    assert not (tmp_path / "set").exists()


def test_what_a_killed_writer_left_is_cleared_and_looks_unfinished(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "000009.tar").write_bytes(b"half")
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        ShardSet(tmp_path)
    write_samples(tmp_path)
    assert not (tmp_path / UNFINISHED).exists()
    assert len(ShardSet(tmp_path)) == len(SAMPLES)


def test_two_writers_at_a_time_are_refused(tmp_path: Path) -> None:
    with writer_for(tmp_path) as writer:
        writer.add(*SAMPLES[0])
        with pytest.raises(ShardError, match=r"process \d+ on .* writes"), writer_for(tmp_path):
            pass
    assert len(ShardSet(tmp_path)) == 1


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "000003.tar"])
def test_a_folder_with_shards_is_never_written_to(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    expected = rf"has shards already \({name}\)\. Give another"
    with pytest.raises(ShardError, match=expected), writer_for(tmp_path):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_folder_with_an_interrupted_conversion_is_left_alone(tmp_path: Path) -> None:
    plan = tmp_path / UNFINISHED / "plan.json"
    plan.parent.mkdir()
    for path in (plan, tmp_path / "000000.tar"):
        path.write_text("mine")
    with pytest.raises(ShardError, match=r"has shards already \(000000"), writer_for(tmp_path):
        pass
    assert plan.read_text() == "mine"


def test_what_the_index_cannot_hold_is_an_error(tmp_path: Path) -> None:
    expected = r"image 7 \(7.img\): 70000 x 8 pixels"
    with pytest.raises(ShardError, match=expected), writer_for(tmp_path) as writer:
        writer.add(SAMPLES[0][0], {**SAMPLES[0][1], "height": 70_000})
