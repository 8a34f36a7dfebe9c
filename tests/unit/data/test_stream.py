"""The stream: the same groups on any number of ranks and processes, from any step on."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import time
import zlib
from itertools import islice
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from bigdet.config.augment import AugmentConfig
from bigdet.config.data import DataConfig, SubsetConfig, TrainSplitConfig
from bigdet.config.phase import PhaseConfig
from bigdet.config.resize import ResizeConfig
from bigdet.data.format.manifest import ShardError
from bigdet.data.format.mix import MixedSet
from bigdet.data.format.shard_set import ShardSet
from bigdet.data.making.sources.coco import convert_coco
from bigdet.data.streams.stream import EvalStream, TrainStream
from bigdet.ops.random import Words
from tests.unit.data import streams

DIRECT = ResizeConfig(kind="direct", size=96)
SHORT_SIDE = ResizeConfig(kind="short_side", size=100, cap=150)
VARIED = {
    "direct": {},
    "short_side": {"resize": SHORT_SIDE},
    "list": {"resize": ResizeConfig(kind="short_side", size=100, cap=150, sizes=[64, 96])},
    "paper": {"resize": ResizeConfig(kind="direct", size=96, variant="paper")},
    "stitcher": {"resize": ResizeConfig(kind="stitcher", size=200)},
    "everything": {
        "resize": ResizeConfig(kind="jitter", size=96),
        "augment": AugmentConfig(color_jitter=0.5, copy_paste=0.5, mosaic=0.3),
        "scaled_decoding": True,
        "images_per_gpu": 4,
    },
}
BATCH_TENSORS = ["images", "image_sizes", "original_sizes", "image_ids", "weights"]
TARGET_TENSORS = ["boxes", "labels", "is_crowd", "offsets"]
MASK_TENSORS = ["bits", "offsets", "origins", "sizes"]


def open_stream(shards, **options) -> TrainStream:
    """16 images in 2 steps of 4 lanes x 3 images, so 8 masked slots."""
    settings = {
        "max_damaged": 0,
        "resize": DIRECT,
        "with_masks": True,
        "images_per_gpu": 3,
        "images_per_step": 12,
    }
    return streams.open_stream(shards, **settings | options)


def take(stream, num_steps):
    """The next batches as {(step, lane): batch}, and the stream closed."""
    first = stream._first_step + 1
    keys = [(step, lane) for step in range(first, first + num_steps) for lane in stream.lanes]
    try:
        return dict(zip(keys, islice(stream, len(keys)), strict=True))
    finally:
        stream.close()


def assert_same(one, other):
    """Bitwise the same batches under the same keys."""
    assert one.keys() == other.keys()
    for key in one:
        pairs = [(one[key], other[key], BATCH_TENSORS)]
        pairs.append((one[key].targets, other[key].targets, TARGET_TENSORS))
        pairs.append((one[key].targets.masks, other[key].targets.masks, MASK_TENSORS))
        for left, right, names in pairs:
            for name in names:
                assert torch.equal(getattr(left, name), getattr(right, name)), (key, name)
        assert one[key].seed == other[key].seed


@pytest.fixture(scope="module")
def shards(shapes_shards):
    return ShardSet(shapes_shards / "train")


@pytest.fixture
def damaged_shards(shapes_shards, tmp_path):
    """A copy of the training shards in which the image of row 5 has a byte changed."""
    shutil.copytree(shapes_shards / "train", tmp_path / "damaged")
    shards = ShardSet(tmp_path / "damaged")
    with shards.path(5).open("r+b") as file:
        file.seek(int(shards.index[5]["image_offset"]) + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))
    return shards


@pytest.mark.parametrize("settings", VARIED.values(), ids=VARIED)
def test_groups_depend_on_neither_ranks_nor_workers(shards, settings):
    settings = {"images_per_step": 4 * settings.get("images_per_gpu", 3), **settings}
    expected = take(open_stream(shards, **settings), 3)
    for world_size, workers, kind in (
        (1, 2, "processes"),
        (2, 0, "processes"),
        (4, 1, "processes"),
        (1, 3, "threads"),
    ):
        found = {}
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size}
            options |= {"workers": workers, "worker_kind": kind}
            found |= take(open_stream(shards, **settings, **options), 3)
        assert_same(dict(sorted(found.items())), expected)


def test_a_pass_shows_every_image_once_and_masked_slots_are_real_images(shards):
    batches = list(take(open_stream(shards), 2).values())
    ids = torch.cat([batch.image_ids for batch in batches])
    weights = torch.cat([batch.weights for batch in batches])
    assert sorted(ids[weights == 1].tolist()) == sorted(shards.index["image_id"].tolist())
    assert weights[:12].all()  # masked slots are in the last step only
    assert all(image.any() for batch in batches for image in batch.images)


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_stops_at_random_steps_and_other_ranks_change_nothing(shards, order):
    options = {"order": order, "subset": SubsetConfig(images=15), "repeat_threshold": 0.9}
    whole = open_stream(shards, **options)
    words = Words("stops", order)
    done = 0
    while done < 12:
        world_size, workers = (1, 2, 4)[words.integer(3)], words.integer(2)
        num_steps = 1 + words.integer(3)  # loader processes have read ahead by then
        for rank in range(world_size):
            split = {"rank": rank, "world_size": world_size, "workers": workers}
            part = take(open_stream(shards, first_step=done, **split, **options), num_steps)
            for key, batch in part.items():
                expected = whole.read_group(*key)
                assert batch.image_ids.tolist() == expected.image_ids.tolist()
                assert batch.weights.tolist() == expected.weights.tolist()
                assert torch.equal(batch.images, expected.images)
        done += num_steps


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_global_generators_change_nothing(shards, order):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(take(open_stream(shards, order=order, workers=seed - 1), 2))
    assert_same(*found)


def test_a_sample_that_comes_twice_in_a_pass_looks_different(shards):
    options = {"weights": [2.0], "images_per_gpu": 1, "images_per_step": 4, "flip": 0.0}
    batches = take(open_stream(shards, **options), 8)  # one pass
    sizes = {}
    for batch in batches.values():
        sizes.setdefault(int(batch.image_ids), []).append(batch.image_sizes[0].tolist())
    assert {len(of_image) for of_image in sizes.values()} == {2}
    assert sum(first != second for first, second in sizes.values()) >= 12  # of 16


@pytest.mark.parametrize("first_step", [1, 2, 5])
def test_a_stream_continues_from_any_step_on_another_number_of_ranks(shards, first_step):
    whole = take(open_stream(shards), first_step + 2)
    rest = {key: batch for key, batch in whole.items() if key[0] > first_step}
    found = {}
    for rank in range(2):
        stream = open_stream(shards, first_step=first_step, rank=rank, world_size=2)
        found |= take(stream, 2)
    assert_same(dict(sorted(found.items())), rest)


def test_any_group_can_be_made_alone(shards):
    whole = take(open_stream(shards), 3)
    stream = open_stream(shards, world_size=4, rank=1)
    assert_same({(3, 2): stream.read_group(3, 2)}, {(3, 2): whole[3, 2]})


def test_ids_come_from_the_index_alone_and_masked_slots_have_none(shards):
    batches = take(open_stream(shards), 2)
    stream = open_stream(shards)
    for key, batch in batches.items():
        expected = [
            image_id if weight else None
            for image_id, weight in zip(batch.image_ids.tolist(), batch.weights, strict=True)
        ]
        assert stream.group_ids(*key) == expected


def test_augmentation_differs_between_passes_and_seeds_between_groups(shards):
    batches = take(open_stream(shards, flip=0.0), 4)  # two passes
    boxes = {}
    for (step, _), batch in batches.items():
        for slot, image_id in enumerate(batch.image_ids.tolist()):
            boxes.setdefault(image_id, {})[step > 2] = batch.image_sizes[slot].tolist()
    assert any(sizes[False] != sizes[True] for sizes in boxes.values() if len(sizes) == 2)
    assert len({batch.seed for batch in batches.values()}) == len(batches)


def test_canvases_are_square_for_direct_and_tight_for_short_side(shards):
    for batch in take(open_stream(shards), 1).values():
        assert batch.images.shape == (3, 3, 96, 96)
    for batch in take(open_stream(shards, resize=SHORT_SIDE), 1).values():
        tallest, widest = batch.image_sizes.max(dim=0).values.tolist()
        assert batch.images.shape == (3, 3, -(-tallest // 32) * 32, -(-widest // 32) * 32)


def test_images_are_left_out_without_boxes_unless_kept(shards):
    index = shards.index.copy()
    index["num_boxes"] = 1
    index["num_boxes"][[2, 7]] = 0
    thinned = ShardSet(shards.folder)
    thinned.index = index
    assert open_stream(thinned, keep_empty=False).state()["samples"] == 14
    assert open_stream(thinned, keep_empty=True).state()["samples"] == 16
    ids = [
        open_stream(thinned, keep_empty=False).group_ids(step, lane)
        for step in (1, 2)
        for lane in range(4)
    ]
    found = {image_id for group in ids for image_id in group} - {None}
    assert found == set(index["image_id"].tolist()) - set(index["image_id"][[2, 7]].tolist())


def test_no_global_generator_is_touched(shards):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    for workers in (0, 1):
        take(open_stream(shards, workers=workers), 1)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_a_set_smaller_than_a_step_is_refused(shards):
    with pytest.raises(ValueError, match="16 samples that can be used, one step needs 20"):
        open_stream(shards, images_per_gpu=5, images_per_step=20)


def test_a_step_that_is_no_multiple_of_a_batch_is_refused(shards):
    with pytest.raises(ValueError, match=r"phases\.train\.images_per_step: 13 .* 3"):
        open_stream(shards, images_per_step=13)


LOADING = [
    {"workers": 0},
    {"workers": 1},
    {"workers": 2, "worker_kind": "threads"},
]


@pytest.mark.parametrize("loading", LOADING)
def test_a_damaged_sample_is_replaced_and_counted_once(damaged_shards, caplog, loading):
    bad_id = int(damaged_shards.index[5]["image_id"])
    stream = open_stream(damaged_shards, max_damaged=1, **loading)
    with caplog.at_level(logging.WARNING):
        batches = take(stream, 4)  # two passes
    assert stream.damaged == {"unreadable": 1}
    (warning,) = caplog.records
    assert str(damaged_shards.path(5)) in warning.message
    assert str(damaged_shards.index[5]["image_offset"]) in warning.message
    assert all(bad_id not in batch.image_ids for batch in batches.values())
    # What comes in its place is a function of the sample: the same on two ranks.
    halves = [
        take(open_stream(damaged_shards, max_damaged=1, rank=rank, world_size=2), 4)
        for rank in range(2)
    ]
    assert_same(dict(sorted((halves[0] | halves[1]).items())), batches)


@pytest.mark.parametrize("loading", LOADING)
def test_too_many_damaged_samples_end_the_stream_with_their_list(damaged_shards, loading):
    with pytest.raises(ShardError, match="1 damaged training samples") as error:
        take(open_stream(damaged_shards, max_damaged=0, **loading), 2)
    assert "data.train.max_damaged allows 0" in str(error.value)
    assert damaged_shards.key(5) in str(error.value)


@pytest.mark.parametrize(
    ("change", "kind"),
    [("height", "wrong_size"), ("annotations", "bad_annotation"), ("image", "undecodable")],
)
def test_kinds_of_damage_are_told_apart(shards, monkeypatch, change, kind):
    read = ShardSet.read

    def read_damaged(self, row):
        sample = read(self, row)
        if row != 5:
            return sample
        if change == "height":
            sample.record["height"] += 1
        elif change == "annotations":
            sample.record["annotations"][0]["segmentation"] = "circle"
        else:
            sample = type(sample)(sample.image_bytes[:200], sample.record)
        return sample

    monkeypatch.setattr(ShardSet, "read", read_damaged)
    stream = open_stream(shards, max_damaged=1)
    take(stream, 2)
    assert stream.damaged == {kind: 1}


def test_a_checkpoint_of_another_stream_is_refused_with_what_differs(shards):
    saved = open_stream(shards).state()
    open_stream(shards, rank=1, world_size=4, workers=1).check_state(saved)  # these may change
    with pytest.raises(ValueError, match="seed was 0 and is 9") as error:
        open_stream(shards, seed=9, images_per_gpu=4).check_state(saved)
    assert "images_per_gpu was 3 and is 4" in str(error.value)
    assert "phase was" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"order": "windowed"}, "order was 'shuffled' and is 'windowed'; window was None"),
        ({"weights": [2.0]}, "weights was None and is [2.0]"),
        ({"repeat_threshold": 0.5}, "repeat_threshold was None and is 0.5"),
        ({"subset": SubsetConfig(images=16, seed=1)}, "subset was None and is"),
        ({"subset": SubsetConfig(images=13)}, "samples was 16 and is 13"),
    ],
)
def test_every_option_of_the_order_is_compared_with_a_checkpoint(shards, options, differs):
    saved = json.loads(json.dumps(open_stream(shards).state()))
    changed = open_stream(shards, **options)
    with pytest.raises(ValueError, match="another data stream") as error:
        changed.check_state(saved)
    assert differs in str(error.value)
    changed.check_state(json.loads(json.dumps(changed.state())))


def test_another_index_is_reported(shards, shapes_shards):
    mix = MixedSet([shards, ShardSet(shapes_shards / "val")], shards.categories)
    with pytest.raises(ValueError, match="index was"):
        open_stream(mix).check_state(open_stream(shards).state())


def test_a_checkpoint_from_before_these_options_fits(shards):
    saved = open_stream(shards).state()
    for name in ("window", "subset", "weights", "repeat_threshold"):
        del saved[name]
    open_stream(shards).check_state(saved)
    with pytest.raises(ValueError, match="weights was None"):
        open_stream(shards, weights=[3.0]).check_state(saved)


def test_a_mix_is_streamed_like_one_set(shards, shapes_shards):
    mix = MixedSet([shards, ShardSet(shapes_shards / "val")], shards.categories)  # 16 + 8 images
    options = {"weights": [1.0, 2.0], "images_per_gpu": 2, "images_per_step": 8}
    expected = take(open_stream(mix, **options), 4)  # one pass of 32
    found = {}
    for rank in range(2):
        found |= take(open_stream(mix, rank=rank, world_size=2, workers=1, **options), 4)
    assert_same(dict(sorted(found.items())), expected)
    ids = torch.cat([batch.image_ids for batch in expected.values()]).tolist()
    both = set(mix.parts[1].index["image_id"].tolist())  # these ids are in both sets: 1 + 2 times
    for number in shards.index["image_id"].tolist():
        assert ids.count(number) == (3 if number in both else 1)


def test_loader_processes_ignore_stop_signals_and_end_with_the_stream(shards):
    before = set(active_children())
    stream = open_stream(shards, workers=1)
    batches = iter(stream)
    next(batches)
    (process,) = set(active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)
    for _ in range(10):
        next(batches)
    assert process.is_alive()
    start = time.monotonic()
    stream.close()
    assert not process.is_alive()
    assert time.monotonic() - start < 5


def test_the_config_says_what_the_stream_is(shards, shapes_shards):
    data = DataConfig(train=TrainSplitConfig(shards=str(shapes_shards / "train")), workers=0)
    phase = PhaseConfig(steps=1, images_per_gpu=2, lr=1.0, resize=DIRECT)
    options = {"name": "train", "with_masks": False, "seed": 0, "rank": 1, "world_size": 3}
    stream = TrainStream(shards, data, phase, **options)
    assert stream.state()["lanes"] == 3  # one batch per rank
    assert list(stream.lanes) == [1]
    assert next(iter(stream)).targets.masks is None


@pytest.mark.parametrize(("world_size", "loading"), [(1, 0), (2, 2), (3, 1)])
def test_evaluation_sees_every_image_once_in_equally_many_batches(
    shapes_shards, world_size, loading
):
    shards = ShardSet(shapes_shards / "val")  # 8 images
    ids, numbers = [], set()
    for rank in range(world_size):
        stream = EvalStream(
            shards,
            size_cap=(100, 150),
            images_per_gpu=3,
            rank=rank,
            world_size=world_size,
            **LOADING[loading],
        )
        batches = list(stream)
        numbers.add(len(batches))
        assert len(stream) == len(batches)
        for batch in batches:
            ids += batch.image_ids[batch.weights == 1].tolist()
            assert batch.targets.boxes.shape == (0, 4)
            assert (batch.image_sizes.min(dim=1).values <= 100).all()
            assert all(image.any() for image in batch.images)
    assert sorted(ids) == sorted(shards.index["image_id"].tolist())
    assert len(numbers) == 1


@pytest.mark.parametrize("loading", LOADING)
def test_a_damaged_evaluation_image_is_one_clear_error(damaged_shards, loading):
    stream = EvalStream(
        damaged_shards, size_cap=(100, 150), images_per_gpu=1, rank=0, world_size=1, **loading
    )
    with pytest.raises(ShardError) as error:
        list(stream)
    assert str(error.value).startswith(str(damaged_shards.path(5)))
    assert damaged_shards.key(5) in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.fixture(scope="module")
def coco_shards(coco_dir, tmp_path_factory):
    annotations = coco_dir / "annotations" / "instances_val2017.json"
    folder = tmp_path_factory.mktemp("coco") / "val"
    convert_coco(coco_dir / "val2017", annotations, folder)
    return ShardSet(folder)


def checksums(stream, num_steps):
    """CRC-32 of the pixels of every group."""
    batches = take(stream, num_steps)
    return {key: zlib.crc32(batch.images.contiguous().numpy()) for key, batch in batches.items()}


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_real_images_are_the_same_on_any_number_of_ranks(coco_shards, order):
    options = {"keep_empty": False, "resize": ResizeConfig(kind="direct", size=128), "order": order}
    expected = checksums(open_stream(coco_shards, **options), 4)
    assert len(set(expected.values())) == 16
    for world_size, workers in ((1, 2), (2, 0), (2, 2), (4, 0), (4, 2)):
        found = {}
        for rank in range(world_size):
            split = {"rank": rank, "world_size": world_size, "workers": workers}
            found |= checksums(open_stream(coco_shards, **split, **options), 4)
        assert dict(sorted(found.items())) == expected


def test_a_set_of_empty_images_says_why_they_are_left_out(shards):
    few = ShardSet(shards.folder)
    few.index = np.array(few.index)
    few.index["num_boxes"][3:] = 0
    message = r"has 3 samples that can .* 13 of 16 images have no object that is not crowd; data"
    with pytest.raises(ValueError, match=rf"{message}\.train\.keep_empty=true"):
        open_stream(few, keep_empty=False, images_per_gpu=4, images_per_step=8)
